"""Pixel flipping: how much the score falls as regions are removed, starting with the most relevant.

    AOPC = 1 / (T + 1) sum_{t=0..T} f(x) - f(x_t)

x_t is x without its t x ``per_step`` most relevant regions (Samek et al. 2017, arXiv 1509.06321). A region
is a square of a regular grid, and its relevance is the mean of the raw, signed map in it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
from xattn.eval.metrics.curves import (
    check_count,
    check_curve,
    check_fill,
    fill_options,
    is_constant,
    removals,
)
from xattn.eval.metrics.mean_metric import MeanMetric


def aopc(scores: Tensor) -> Tensor:
    """Compute the area over perturbation curves (..., T + 1), (...) float64; s_0 is the clean score.

    Higher is better. For probabilities, the absolute value is at most T / (T + 1).

    >>> aopc(torch.tensor([1.0, 0.4, 0.0]))
    tensor(0.5333, dtype=torch.float64)

    Raises:
        ValueError: if there are fewer than two scores.
    """
    s = check_curve(scores)
    return s[..., 0] - s.mean(-1)


def pixel_flipping_auc(scores: Tensor) -> Tensor:
    """Compute the area under s_1..s_T of scores (..., T + 1), (...) float64, by the trapezoidal rule with
    unit spacing. For probabilities, it is in [0, T - 1].

    This is the value of Quantus 0.6 (``PixelFlipping(return_auc_per_sample=True)``), which leaves out the
    clean score and does not divide by the number of steps. Lower is better. Quantus counts channel values,
    not pixels. For maps without ties, its ``features_in_step=3 * k`` is the same as
    ``patch=1, per_step=k, steps=None`` here. Quantus rejects step sizes that do not divide HW, and at 224
    pixels no multiple of 3 divides HW. Its "black" is the smallest value of the network's input.
    ``perturb_baseline=0.0`` is ``fill="black"`` for a network that normalises its input itself.
    """
    s = check_curve(scores)[..., 1:]
    return s.sum(-1) - (s[..., 0] + s[..., -1]) / 2


@dataclass(frozen=True)
class PixelFlippingMetric(PerturbationMetric):
    """AOPC, which needs ``steps`` forward passes; higher is better.

    The defaults remove 15 % of an image of 224 pixels, as the paper does (100 squares of 9 pixels).
    Equally relevant regions are removed in row-major order. A constant map has no order, so its value is
    NaN.

    Args:
        patch: side of a region in pixels; 1 removes single pixels. If it does not divide the size of the
            image, regions at the right and lower border are smaller.
        per_step: the number of regions removed in one step.
        steps: T, the largest number of steps. With None, regions are removed until nothing is left.
        fill: what replaces a region, see :class:`~xattn.eval.metrics.curves.InsertionDeletionMetric`. The
            paper uses noise. Here, noise is drawn once per image and is the same for all methods.
        mean: (3,) the colour for ``fill="mean"``, raw pixels in [0, 1].
    """

    patch: int = 16
    per_step: int = 1
    steps: int | None = 30
    fill: str = "black"
    mean: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_count("patch", self.patch)
        check_count("per_step", self.per_step)
        if self.steps is not None:
            check_count("steps", self.steps)
        check_fill("fill", self.fill, self.mean)

    def column_options(self, column: Column) -> dict[str, Any]:
        sizes = {"patch": self.patch, "per_step": self.per_step, "steps": self.steps}
        return {**sizes, **fill_options(self.fill, self.mean)}

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        if is_constant(sample.raw):
            return lambda scores: {Column("AOPC"): math.nan}
        height, width = sample.raw.shape[-2:]
        regions = rank_regions(grid(height, width, self.patch), sample.raw)
        count = len(regions)
        starts = range(0, count, self.per_step)[: self.steps]
        parts = (torch.cat(regions[start : start + self.per_step]) for start in starts)
        images = removals(sample.image, parts, self.fill, mean=self.mean, seed=sample.seed)
        for start, image in zip(starts, images, strict=True):
            yield Request("flipping", image, shared=start + self.per_step >= count)

        def finish(scores: Mapping[str, Tensor]) -> dict[Column, float]:
            return {Column("AOPC"): float(aopc(with_clean(sample.score, scores["flipping"])))}

        return finish


class PixelFlipping(MeanMetric):
    """Mean AOPC. ``update(scores, valid=None)`` takes curves (B, T + 1), with the clean score first."""

    metric = "AOPC"
    higher_is_better = True
    values = aopc


# ---------------------------------------------------------------- regions


def grid(height: int, width: int, patch: int) -> Tensor:
    """Return the number of each pixel's square, (H, W) int64, counted in row-major order."""
    columns = torch.arange(width, device="cpu") // patch
    rows = torch.arange(height, device="cpu") // patch
    return rows[:, None] * (columns[-1] + 1) + columns


def region_sums(labels: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of ``values`` (1, H, W) in each region, (R,) float64, and its number of pixels, (R,).

    ``labels`` (H, W) are region numbers 0..R-1. Both results are computed on the CPU, because sums on a GPU
    can differ from run to run.
    """
    flat = labels.flatten().cpu()
    return torch.bincount(flat, values.flatten().cpu().double()), torch.bincount(flat)


def rank_regions(labels: Tensor, values: Tensor) -> list[Tensor]:
    """Return the flat pixel indices of each region, in descending order of the mean of ``values`` (1, H,
    W).

    ``labels`` (H, W) contains every number in 0..R-1. Regions with equal means keep their order.
    """
    sums, pixels = region_sums(labels, values)
    by_region = labels.flatten().argsort(stable=True).to(values.device).split(pixels.tolist())
    ranking = (sums / pixels).argsort(descending=True, stable=True)
    return [by_region[i] for i in ranking.tolist()]


def with_clean(clean: float, scores: Tensor) -> Tensor:
    """Prepend the clean score to the scores (T,) of the steps; return the curve (T + 1,) float64."""
    return torch.cat([scores.new_full((1,), clean, dtype=torch.float64), scores.double()])


GROUP = MetricGroup(
    "pixel-flipping",
    PixelFlippingMetric,
    {
        "AOPC": MetricInfo(
            "mean over steps of f(x) - f(x_t), patches removed by rank",
            True,
            -1,
            reads=MetricInputs("class", "squares", "black"),
        ),
    },
    words={
        "AOPC": (
            "Pixel flipping",
            "How much confidence is lost while patches are removed, the most important first",
        ),
    },
    classes=(PixelFlipping,),
    cases=({"patch": 5},),
)
