"""Max-sensitivity: how much a map changes when the image changes only slightly.

    SENS = max_d ||phi(x + d) - phi(x)|| / ||phi(x)||,    |d_i| <= r

The norm is Euclidean, and phi is the raw map at the explainer's own resolution. The maximum is over random
d, uniform in the ball, so it is a lower bound on the true maximum. Yeh et al. 2019, arXiv 1901.09392.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

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

BATCH = 16  # largest number of perturbed images in memory


def max_sensitivity_values(maps: Tensor, perturbed: Tensor) -> Tensor:
    """Compute max-sensitivity (B,), float64, at least 0; lower is better.

    It is NaN if a map is zero everywhere or not finite. (``captum.metrics.sensitivity_max`` divides by 1 if
    the map is zero.)

    Args:
        maps: phi(x), (B, 1, h, w).
        perturbed: phi(x + d), (B, S, 1, h, w).

    Raises:
        ValueError: if the shapes are wrong.
    """
    if maps.ndim != 4 or perturbed.ndim != 5 or maps.shape != perturbed[:, 0].shape:
        raise ValueError(
            f"maps, perturbed: got {tuple(maps.shape)} and {tuple(perturbed.shape)}; give "
            f"(B, 1, h, w) and (B, S, 1, h, w)"
        )
    moves, norms = _moves(maps, perturbed)
    return _ratio(moves.amax(1), norms)


def _moves(maps: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ||phi(x + d) - phi(x)||, (B, S), and ||phi(x)||, (B,)."""
    phi = maps.detach().double().flatten(1)
    moves = (perturbed.detach().double().flatten(2) - phi[:, None]).norm(dim=2)
    return moves, phi.norm(dim=1)


def _ratio(moves: Tensor, norms: Tensor) -> Tensor:
    good = (norms > 0) & norms.isfinite() & moves.isfinite()
    return torch.where(good, moves / norms, torch.nan)


@dataclass(frozen=True)
class MaxSensitivityMetric(PerturbationMetric):
    """Max-sensitivity. It explains ``samples`` perturbed images, and the image itself once more.

    x + d is clamped to [0, 1], because explainers require this; ``captum.metrics.sensitivity_max`` does not
    clamp. The two agree if every pixel is at least ``radius`` away from 0 and 1; otherwise the clamped
    perturbation is smaller. d depends only on the image, not on the method.

    Args:
        radius: r, for pixel values in [0, 1].
        samples: the number of perturbations d.
    """

    radius: float = 0.02
    samples: int = 10
    explains_again: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("samples", self.samples)
        if not 0 < self.radius <= 1:
            raise ValueError(f"radius: got {self.radius}; give a change of pixel values in (0, 1]")

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        if sample.explain is None:
            raise ValueError(
                "explain: None; max-sensitivity explains perturbed images; give explain=..."
            )
        yield from ()
        image = sample.image
        generator = torch.Generator().manual_seed(sample.seed)
        # The clean image is first in the first batch, because maps from a batch of a different shape may
        # differ in their last bits.
        images, clean, moves = [image], None, []
        for left in reversed(range(self.samples)):
            d = self.radius * (2 * torch.rand(image.shape, generator=generator, device="cpu") - 1)
            images.append((image + d.to(image)).clamp(0, 1))
            if len(images) == BATCH or left == 0:
                maps = sample.explain(torch.stack(images)).detach().double()
                if clean is None:
                    clean, maps = maps[:1], maps[1:]
                moves.append(_moves(clean, maps[None])[0])
                images = []
        assert clean is not None
        value = float(_ratio(torch.cat(moves, 1).amax(1), clean.flatten(1).norm(dim=1)))
        return lambda scores: {Column("max-sensitivity"): value}


class MaxSensitivity(MeanMetric):
    """Mean max-sensitivity. ``update(maps, perturbed, valid=None)`` takes the arguments of
    :func:`max_sensitivity_values`."""

    metric = "max-sensitivity"
    higher_is_better = False
    values = max_sensitivity_values


GROUP = MetricGroup(
    "sensitivity",
    MaxSensitivityMetric,
    {
        "max-sensitivity": MetricInfo(
            "max |phi(x + d) - phi(x)| / |phi(x)|, |d| <= r", False, 0, math.inf, "robustness"
        ),
    },
    words={
        "max-sensitivity": (
            "Greatest change",
            "The largest change of the map when the photo changes a little",
        ),
    },
    classes=(MaxSensitivity,),
    cases=({"samples": 3},),
)
