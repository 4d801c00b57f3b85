"""Efficient randomisation test: how much more complex is the map of a network with random weights?

    eMPRT = (H(phi_random) - H(phi)) / H(phi)

H is the entropy of a histogram of the map's values. Hedstroem et al. 2024, arXiv 2401.06465, expect the map
of a faithful method to become more complex when there is nothing left to explain. Noise also has a large H,
so the test cannot distinguish a noisy method from a good one. (Their smoothed test, sMPRT, is
``randomization`` with ``smooth=50``.)
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from xattn.eval.metrics.base import (
    Finish,
    MetricGroup,
    MetricInfo,
    PerturbationMetric,
    Request,
    Sample,
)
from xattn.eval.metrics.curves import check_count


def histogram_entropy(maps: Tensor, bins: int = 100) -> Tensor:
    """Compute the entropy in nats of the histogram of each map's values, (B, 1, H, W) -> (B,) float64.

    Bins of equal width span the values of each map. The entropy of a constant map is 0; for a map that is
    not finite, it is NaN.

    >>> histogram_entropy(torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 2, 2))
    tensor([0.6931], dtype=torch.float64)
    """
    values = []
    for one in maps.detach().double().flatten(1).cpu():
        if not bool(one.isfinite().all()):
            values.append(math.nan)
            continue
        counts = torch.histc(one, bins)
        share = counts[counts > 0] / len(one)
        values.append(float(-(share * share.log()).sum()))
    return torch.tensor(values, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class EMPRTMetric(PerturbationMetric):
    """Compares the map with the method's map of the same class on a network whose weights are all random.

    Args:
        bins: the number of bins of the histogram.
    """

    bins: int = 100
    explains_again: ClassVar[bool] = True
    explains_randomized: ClassVar[bool] = True
    compares: ClassVar[str] = "network"

    def __post_init__(self) -> None:
        check_count("bins", self.bins)

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        yield from ()
        random = sample.cohort.on_random_weights(sample.place)
        own = float(histogram_entropy(sample.raw[None], self.bins))
        other = 0.0 if random is None else float(histogram_entropy(random[None], self.bins))
        value = (other - own) / own if own > 0 else math.nan
        return lambda scores: {self.columns[0]: value}


GROUP = MetricGroup.single(
    EMPRTMetric,
    "emprt",
    MetricInfo(
        "(entropy of the map's histogram on random weights - its own) / its own",
        True,
        -1,
        math.inf,
        kind="sanity",
    ),
    "Entropy gained on random weights",
    "How much more varied the map is when the network's weights are randomised",
    column="eMPRT",
    by_name=True,
)
