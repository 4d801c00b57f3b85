"""Latency and memory of converted networks, side by side with the network as it was trained.

In each round every network of a group runs once on the same photos, in turn; a ratio is taken within a
round, so that a slow moment of the machine hits both sides.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xattn.backbone import Backbone
from xattn.runtime.measuring import Job, peak_memory, times

GROUP = 5  # networks that share a run of the dense one


def latencies(
    dense: Backbone, networks: Mapping[str, Backbone], images: Tensor, rounds: int
) -> dict[str, dict[str, Any]]:
    """By name: seconds of a pass in each round, of the network and of ``dense``, and peak bytes of both
    for one photo."""

    def job(network: Backbone, photos: Tensor) -> Job:
        @torch.no_grad()
        def run() -> Tensor:
            return network.logits(photos)

        return run

    jobs = {"": job(dense, images), **{name: job(n, images) for name, n in networks.items()}}
    took = times(jobs, rounds)
    peak = {"": peak_memory(job(dense, images[:1]))}
    return {
        name: {
            "seconds": took[name],
            "dense seconds": took[""],
            "peak bytes": peak_memory(job(network, images[:1])),
            "dense peak bytes": peak[""],
        }
        for name, network in networks.items()
    }


def ratio(cost: Mapping[str, Any]) -> float:
    """Median over rounds of the network's time over the dense one's."""
    pairs = zip(cost["seconds"], cost["dense seconds"], strict=True)
    return statistics.median(own / dense for own, dense in pairs)
