"""Monotonicity correlation: does noise change the score more where features have larger attributions?

    rho = Spearman_i(sum_{u in i} |phi(u)|, e_i),    e_i = mean_k (f(x) - f(x_i^k))^2

x_i^k is x with patch i replaced by the k-th draw of uniform noise, so e_i estimates
E[(f(x) - f(X_i))^2 | x_{-i}] (Nguyen and Martinez 2020, arXiv 2007.07584).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.correlation import spearman
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
from xattn.eval.metrics.curves import check_count, is_constant
from xattn.eval.metrics.flipping import grid, region_sums
from xattn.eval.metrics.mean_metric import MeanMetric


def monotonicity_values(attributions: Tensor, effects: Tensor) -> Tensor:
    """Compute the Spearman correlation of attributions and effects, both (B, R); return (B,) float64.

    Values are in [-1, 1], and higher is better. Equal values share their mean rank. The result is NaN if
    either argument is constant or not finite.

    Raises:
        ValueError: if the arguments are not two tensors (B, R) of the same shape.
    """
    if attributions.ndim != 2 or attributions.shape != effects.shape:
        raise ValueError(
            f"attributions, effects: got {tuple(attributions.shape)} and {tuple(effects.shape)}; "
            f"give two of (B, R)"
        )
    return spearman(attributions, effects)


@dataclass(frozen=True)
class MonotonicityMetric(PerturbationMetric):
    """Monotonicity correlation on the squares of a grid, with ``samples`` forward passes per square.

    The noise depends only on the image, so the same perturbed images are scored for all methods. If the map
    or the scores are constant, the value is NaN. Quantus 0.6 divides e_i by f(x)^2, which does not change
    the ranks. It also groups pixels by rank instead of position and replaces each group by a single noise
    value, so its features and its numbers differ.

    Args:
        patch: side of a square in pixels (32 gives 49 squares at 224 pixels). If it does not divide the
            size of the image, squares at the right and lower border are smaller.
        samples: the number of times that noise is drawn for each square.
    """

    patch: int = 32
    samples: int = 1

    def __post_init__(self) -> None:
        check_count("patch", self.patch)
        check_count("samples", self.samples)

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        if is_constant(sample.raw.abs()):
            return lambda scores: {Column("monotonicity"): math.nan}
        image = sample.image
        height, width = image.shape[-2:]
        labels = grid(height, width, self.patch)
        attributions, _ = region_sums(labels, sample.raw.abs())
        squares = labels.to(image.device)
        generator = torch.Generator().manual_seed(sample.seed)
        for _ in range(self.samples):
            noise = torch.rand(image.shape, generator=generator, device="cpu").to(image.device)
            for i in range(len(attributions)):
                yield Request("monotonicity", torch.where(squares == i, noise, image))

        def finish(scores: Mapping[str, Tensor]) -> dict[Column, float]:
            changes = scores["monotonicity"].double() - sample.score
            effects = changes.view(self.samples, -1).square().mean(0)
            value = monotonicity_values(attributions[None], effects[None].to(attributions.device))
            return {Column("monotonicity"): float(value)}

        return finish


class MonotonicityCorrelation(MeanMetric):
    """Mean monotonicity. ``update(attributions, effects, valid=None)`` takes (B, R) each."""

    metric = "monotonicity"
    higher_is_better = True
    values = monotonicity_values


GROUP = MetricGroup(
    "monotonicity",
    MonotonicityMetric,
    {
        "monotonicity": MetricInfo(
            "Spearman correlation of |phi| of a patch and the change of f under noise there",
            True,
            -1,
            reads=MetricInputs("class", "squares", "noise"),
        ),
    },
    words={
        "monotonicity": (
            "Monotonicity",
            "How well a patch's value in the map goes with its effect on the score",
        ),
    },
    classes=(MonotonicityCorrelation,),
    cases=({"patch": 6},),
)
