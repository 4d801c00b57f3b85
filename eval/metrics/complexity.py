"""Complexity: over how many pixels a map spreads.

    Gini = sum_i (2 i - n - 1) v_i / (n sum v)    v = |phi| ascending, i = 1..n
    entropy = -sum_i pi_i log pi_i                pi = |phi| / sum |phi|, in nats

The Gini index is that of Chalasani et al. 2020 (arXiv 1810.06583), and the entropy is that of Bhatt et
al. 2020 (arXiv 2005.00631). phi is the explainer's raw map resized to the image's n pixels; it is not
min-max scaled, because this would move the zero of a signed map. Both metrics ignore the map's scale and
the position of its pixels. Entropy grows with n, so compare values only at the same image size.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.eval.functional import check_maps
from xattn.eval.metrics.base import (
    Column,
    Finish,
    MetricGroup,
    MetricInfo,
    PerturbationMetric,
    Request,
    Sample,
)
from xattn.eval.metrics.mean_metric import MeanMetric


def gini_values(maps: Tensor) -> Tensor:
    """Compute the Gini index of maps (B, 1, H, W), which may be signed; return (B,) float64 in [0, 1 -
    1/n].

    Higher is sparser: the value is 0 if all magnitudes are equal, and 1 - 1/n if a single pixel is
    non-zero. It is NaN for maps that are zero everywhere or not finite.

    >>> gini_values(torch.tensor([[[[0.0, 0.0], [-3.0, 0.0]]]]))
    tensor([0.7500], dtype=torch.float64)

    Raises:
        ValueError: if the shape is wrong.
    """
    v = _magnitudes(maps).sort(1).values
    n = v.shape[1]
    weights = 2 * torch.arange(1, n + 1, dtype=v.dtype, device=v.device) - n - 1
    return ((v * weights).sum(1) / (n * v.sum(1))).clamp_min(0)


def entropy_values(maps: Tensor) -> Tensor:
    """Compute the entropy of maps (B, 1, H, W), which may be signed; return (B,) float64 in [0, log n]
    nats.

    Lower is simpler. The value is NaN for maps that are zero everywhere or not finite.

    Raises:
        ValueError: if the shape is wrong.
    """
    v = _magnitudes(maps)
    return torch.special.entr(v / v.sum(1, keepdim=True)).sum(1)


def _magnitudes(maps: Tensor) -> Tensor:
    """Return |phi| / max |phi|, (B, n) float64, of maps (B, 1, H, W), so that sums cannot overflow. Maps
    that are zero everywhere or not finite give NaN."""
    check_maps(maps)
    v = maps.detach().double().abs().flatten(1)
    return v / v.amax(1, keepdim=True)


@dataclass(frozen=True)
class ComplexityMetric(PerturbationMetric):
    """Gini index and entropy of the raw map, without forward passes."""

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        yield from ()
        raw = sample.raw[None]
        values = {
            Column("Gini"): float(gini_values(raw)),
            Column("entropy"): float(entropy_values(raw)),
        }
        return lambda scores: values


class Gini(MeanMetric):
    """Mean Gini index. ``update(maps, valid=None)`` takes maps (B, 1, H, W)."""

    metric = "Gini"
    higher_is_better = True
    values = gini_values


class Entropy(MeanMetric):
    """Mean entropy in nats. ``update(maps, valid=None)`` takes maps (B, 1, H, W)."""

    metric = "entropy"
    higher_is_better = False
    values = entropy_values


GROUP = MetricGroup(
    "complexity",
    ComplexityMetric,
    {
        "Gini": MetricInfo(
            "sum (2 i - n - 1) v_i / (n sum v), v = |phi| ascending", True, kind="complexity"
        ),
        "entropy": MetricInfo(
            "-sum pi log pi, pi = |phi| / sum |phi|", False, 0, math.inf, "complexity"
        ),
    },
    words={
        "Gini": ("Concentration (Gini)", "How much the map concentrates on a few places"),
        "entropy": ("Entropy", "How widely the map is spread over the photo"),
    },
    classes=(Gini, Entropy),
)
