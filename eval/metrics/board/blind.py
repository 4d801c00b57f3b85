"""Blind: how much of a map is in places that the network cannot see?

    mean over halves of sum_{u hidden} |phi(u)| / sum_u |phi(u)|,    phi of f'(x) = f(x o M + b o (1 - M))

M keeps the top, left, bottom or right half, and b is the mean colour. Gradients of f' with respect to its
input score 0. CAMs of the last layer score above 0 for two reasons: their receptive field crosses the
border, and cells in the hidden half are not 0 but have the value that stands for no evidence (arXiv
2404.01964).
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from xattn.backbone.halves import HALVES, visible_half
from xattn.eval import functional
from xattn.eval.metrics.base import (
    Finish,
    MetricGroup,
    MetricInfo,
    PerturbationMetric,
    Request,
    Sample,
)
from xattn.eval.metrics.mean_metric import MeanMetric


def leak_values(maps: Tensor, hidden: Tensor) -> Tensor:
    """Compute the share of |phi| of maps (B, 1, H, W) where ``hidden`` (H, W) is True, (B,) float64 in [0,
    1].

    It is NaN if a map is zero everywhere or not finite.

    Raises:
        ValueError: if the shapes do not match.
    """
    functional.check_maps(maps)
    if hidden.shape != maps.shape[2:]:
        raise ValueError(f"hidden: got {tuple(hidden.shape)}; give {tuple(maps.shape[2:])}")
    size = maps.detach().double().abs()
    return (size * hidden).sum((1, 2, 3)) / size.sum((1, 2, 3))


@dataclass(frozen=True)
class BlindMetric(PerturbationMetric):
    """The mean over four halves. For each of them, the method explains a network that sees only this
    half."""

    explains_again: ClassVar[bool] = True
    explains_randomized: ClassVar[bool] = True

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        yield from ()
        size = (sample.raw.shape[1], sample.raw.shape[2])
        values = []
        for half in HALVES if sample.explain_randomized else ():
            raw = sample.explain_randomized(half, sample.image[None]).detach().float()
            sized = functional.upsample(raw, size, sample.resize)
            values.append(float(leak_values(sized, ~visible_half(half, size).to(sized.device))))
        value = sum(values) / len(values) if values else math.nan
        return lambda scores: {self.columns[0]: value}


class BlindLeak(MeanMetric):
    """Mean share of the maps in the hidden half. ``update(maps, hidden, valid=None)`` takes maps (B, 1, H,
    W) and ``hidden`` (H, W) bool."""

    metric = "blind"
    higher_is_better = False
    values = leak_values


GROUP = MetricGroup.single(
    BlindMetric,
    "blind",
    MetricInfo(
        "share of |phi| in the half of the photo that the network does not see",
        False,
        kind="sanity",
        chance=0.5,
    ),
    "In the blind half",
    "How much of the map lies where the network cannot see",
    classes=(BlindLeak,),
    by_name=True,
)
