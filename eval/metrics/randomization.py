"""Randomisation check: does a map change when the network's weights are replaced by random ones?

    mean_k similarity(|phi|, |phi_k|),    phi_k on the network of which k + 1 parts are random

Adebayo et al. 2018 (arXiv 1810.03292): cascading, from the classifier down to the first layer
(:func:`xattn.eval.sanity.cascade`). A map that stays the same does not depend on what the network has
learned. Low is good, and no proof: noise is dissimilar too. A map that never reads the classifier
(a trained head, Eigen-CAM) rightly stays the same at the first stage.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from xattn.eval import functional
from xattn.eval.metrics.base import (
    Column,
    Finish,
    MetricGroup,
    MetricInfo,
    PerturbationMetric,
    Request,
    Sample,
)
from xattn.eval.metrics.curves import check_count
from xattn.eval.metrics.mean_metric import MeanMetric
from xattn.eval.similarity import pearson, ranks, ssim

SPEARMAN, SSIM = Column("randomization-Spearman"), Column("randomization-SSIM")


def randomization_curves(
    maps: Tensor, randomized: Tensor, *, absolute: bool = True
) -> dict[Column, Tensor]:
    """Similarity at each stage, (B, S) float64 in [-1, 1] by column.

    Maps are min-maxed, their absolute values by default, and compared by
    :func:`xattn.eval.similarity.spearman` and :func:`~xattn.eval.similarity.ssim`. A constant map of
    a randomised network shares nothing with a map that varies: 0. NaN where the map itself is
    constant, or either is not finite.

    Args:
        maps: (B, 1, H, W), raw.
        randomized: (B, S, 1, H, W), raw maps of the randomised networks at the same resolution.

    Raises:
        ValueError: other shapes, or sides below 11 pixels.
    """
    if randomized.ndim != 5 or randomized.shape[1] == 0 or maps.shape != randomized[:, 0].shape:
        raise ValueError(
            f"maps, randomized: got {tuple(maps.shape)} and {tuple(randomized.shape)}; give "
            f"(B, 1, H, W) and (B, S, 1, H, W)"
        )
    before, varied = _prepared(maps, absolute)
    before_ranks = ranks(before)
    rows: dict[Column, list[Tensor]] = {SPEARMAN: [], SSIM: []}
    for stage in randomized.unbind(1):
        after, _ = _prepared(stage, absolute)
        gone = varied & stage.isfinite().flatten(1).all(1) & ranks(after).isnan().all(1)
        for column, value in (
            (SPEARMAN, pearson(before_ranks, ranks(after))),
            (SSIM, ssim(before, after)),
        ):
            rows[column].append(torch.where(gone, 0.0, value))
    return {column: torch.stack(values, 1) for column, values in rows.items()}


def randomization_values(
    maps: Tensor, randomized: Tensor, *, absolute: bool = True
) -> dict[Column, Tensor]:
    """The mean of :func:`randomization_curves` over the stages, (B,) float64 by column.

    Lower is better; NaN where a stage is.
    """
    curves = randomization_curves(maps, randomized, absolute=absolute)
    return {column: values.mean(1) for column, values in curves.items()}


def _prepared(maps: Tensor, absolute: bool) -> tuple[Tensor, Tensor]:
    return functional.minmax(maps.abs() if absolute else maps)


@dataclass(frozen=True)
class RandomizationMetric(PerturbationMetric):
    """Similarity of a map to those of the method on randomised networks, mean over ``stages``.

    Needs ``sample.explain_randomized``, which :class:`xattn.eval.sanity.Cascade` gives; a method without
    it has NaN. Maps are compared at the image's resolution.

    Args:
        stages: how many stages the cascade behind ``explain_randomized`` has.
        absolute: compare absolute values, as most of the paper does; False for signed maps.
    """

    stages: int = 5
    absolute: bool = True
    explains_again: ClassVar[bool] = True
    explains_randomized: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("stages", self.stages)

    @property
    def columns(self) -> tuple[Column, ...]:
        return SPEARMAN, SSIM

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        yield from ()
        if sample.explain_randomized is None:
            return lambda scores: dict.fromkeys(self.columns, math.nan)
        size = sample.raw.shape[-2:]
        stages = []
        for stage in range(self.stages):
            raw = sample.explain_randomized(stage, sample.image[None]).detach().float()
            stages.append(functional.upsample(raw, size, sample.resize))
        randomized = torch.stack(stages, 1).to(sample.raw.device)
        found = randomization_values(sample.raw[None], randomized, absolute=self.absolute)
        values = {column: float(value) for column, value in found.items()}
        return lambda scores: values


class _Similarity(MeanMetric):
    """``update(maps, randomized, valid=None)`` as in :func:`randomization_values`."""

    higher_is_better = False
    column: ClassVar[Column]

    def update(self, maps: Tensor, randomized: Tensor, valid: Tensor | None = None) -> None:
        self._add(randomization_values(maps, randomized)[self.column], valid)


class RandomizationSpearman(_Similarity):
    """Mean rank correlation with the maps of randomised networks."""

    metric = "randomization-Spearman"
    column = SPEARMAN


class RandomizationSSIM(_Similarity):
    """Mean structural similarity to the maps of randomised networks."""

    metric = "randomization-SSIM"
    column = SSIM


GROUP = MetricGroup(
    "randomization",
    RandomizationMetric,
    {
        "randomization-Spearman": MetricInfo(
            "rank correlation with the map after randomising weights", False, -1, 1, "sanity"
        ),
        "randomization-SSIM": MetricInfo(
            "structural similarity to the map after randomising weights", False, -1, 1, "sanity"
        ),
    },
    classes=(RandomizationSpearman, RandomizationSSIM),
)
