"""Comprehensiveness and sufficiency: the score lost without a map's top pixels, or with only these pixels.

    comprehensiveness = mean_q (p - p(x without the top q))
    sufficiency = mean_q (p - p(the top q alone))

DeYoung et al. 2020, arXiv 1911.03429, with q = 1, 5, 10, 20, 50 %. All explainers are beaten by a search
that optimises the metric itself (Zhou and Shah 2022, arXiv 2205.08696).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.eval.fills import fill
from xattn.eval.metrics.base import (
    Column,
    Finish,
    MetricGroup,
    MetricInfo,
    MetricInputs,
    PerturbationMetric,
    Request,
    Sample,
)
from xattn.eval.metrics.curves import check_fill
from xattn.eval.metrics.mean_metric import MeanMetric


def mean_loss(p: Tensor, scores: Tensor) -> Tensor:
    """Compute p (B,) minus the mean of ``scores`` (B, Q), (B,) float64."""
    if scores.ndim != 2 or p.shape != scores.shape[:1]:
        raise ValueError(
            f"p, scores: got {tuple(p.shape)} and {tuple(scores.shape)}; give (B,) and (B, Q)"
        )
    return p.double() - scores.double().mean(1)


@dataclass(frozen=True)
class EraserMetric(PerturbationMetric):
    """Comprehensiveness and sufficiency, with two passes per level.

    Args:
        levels: q, fractions of the photo in (0, 1).
        fill: what replaces hidden pixels.
        mean: (3,) the colour for ``fill="mean"``.
    """

    levels: Sequence[float] = (0.01, 0.05, 0.1, 0.2, 0.5)
    fill: str = "black"
    mean: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.levels or not all(0 < level < 1 for level in self.levels):
            raise ValueError(f"levels: got {tuple(self.levels)}; give fractions in (0, 1)")
        check_fill("fill", self.fill, self.mean)

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        order = sample.raw.flatten().argsort(descending=True, stable=True)
        every = torch.ones_like(sample.image[:1], dtype=torch.bool)
        behind = fill(sample.image, every, self.fill, mean=self.mean, seed=sample.seed)
        for level in self.levels:
            top = torch.zeros_like(every)
            top.view(-1)[order[: max(1, round(level * len(order)))]] = True
            yield Request("without", torch.where(top, behind, sample.image))
            yield Request("alone", torch.where(top, sample.image, behind))

        def finish(scores: Mapping[str, Tensor]) -> dict[Column, float]:
            p = torch.tensor([sample.score], dtype=torch.float64, device="cpu")
            both = (mean_loss(p, scores[key][None]) for key in ("without", "alone"))
            return {c: float(value) for c, value in zip(self.columns, both, strict=True)}

        return finish


class Comprehensiveness(MeanMetric):
    """Mean loss without the top pixels. ``update(p, scores, valid=None)`` takes (B,) and (B, Q)."""

    metric = "comprehensiveness"
    higher_is_better = True
    values = mean_loss


class Sufficiency(MeanMetric):
    """Mean loss with only the top pixels. ``update(p, scores, valid=None)`` takes (B,) and (B, Q)."""

    metric = "sufficiency"
    higher_is_better = False
    values = mean_loss


_READS = MetricInputs("class", "thresholds of the map", "black")
GROUP = MetricGroup(
    "eraser",
    EraserMetric,
    {
        "comprehensiveness": MetricInfo(
            "mean score lost without the first pixels", True, -1, reads=_READS
        ),
        "sufficiency": MetricInfo(
            "mean score lost with the first pixels alone", False, -1, reads=_READS
        ),
    },
    words={
        "comprehensiveness": (
            "Comprehensiveness",
            "How much confidence is lost without the most important pixels",
        ),
        "sufficiency": (
            "Sufficiency",
            "How much confidence is lost with the most important pixels alone",
        ),
    },
    classes=(Comprehensiveness, Sufficiency),
    cases=({"levels": (0.2, 0.5)},),
    by_name=True,
)
