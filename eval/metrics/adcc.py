"""ADCC: one number for how coherent, how small and how sufficient a map is.

    Coh = (Pearson(m(x), m(x o m)) + 1) / 2
    Com = mean_u |m(u)|
    AD = max(0, p - q) / p
    ADCC = 3 / (1 / Coh + 1 / (1 - Com) + 1 / (1 - AD))

Poppi et al. 2021 (arXiv 2104.10252). m is the grey map of image x, and m(x o m) is the map of the same
method and class for the image masked with m. p and q are the scores of the class on x and on the masked
image. All values are fractions.

The paper's equation and its published code (github.com/aimagelab/ADCC) define the value of a single image,
not of a data set. Here, the value of a data set is the mean of the per-image values. Since the harmonic
mean is concave, this is at most the harmonic mean of the three means.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
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
    MetricInputs,
    PerturbationMetric,
    Request,
    Sample,
)
from xattn.eval.metrics.mean_metric import MeanMetric


def coherency_values(maps: Tensor, others: Tensor) -> Tensor:
    """Compute (Pearson correlation + 1) / 2 of maps (B, 1, H, W), (B,) float64 in [0, 1]; higher is better.

    As in the paper's code, the value is 0 if either map is constant or not finite.

    Raises:
        ValueError: if the shapes do not match.
    """
    functional.check_maps(maps)
    if others.shape != maps.shape:
        raise ValueError(f"others: got shape {tuple(others.shape)}; give {tuple(maps.shape)}")
    a, b = (x.detach().double().flatten(1) for x in (maps, others))
    constant = (a.amin(1) == a.amax(1)) | (b.amin(1) == b.amax(1))
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    norms = a.norm(dim=1) * b.norm(dim=1)
    pearson = torch.where(constant, torch.nan, (a * b).sum(1) / norms).clamp(-1, 1)
    return ((pearson + 1) / 2).nan_to_num(0.0)


def complexity_values(maps: Tensor) -> Tensor:
    """Compute the mean magnitude of grey maps (B, 1, H, W), (B,) float64 in [0, 1]; lower is better."""
    functional.check_maps(maps)
    return maps.detach().double().abs().mean((1, 2, 3))


def adcc_values(coherency: Tensor, complexity: Tensor, drop: Tensor) -> Tensor:
    """Compute the harmonic mean of Coh, 1 - Com and 1 - AD, all fractions (B,); return (B,) float64 in [0,
    1].

    If one of the three is 0, the result is 0, which is the limit. If one is NaN, the result is NaN.

    >>> adcc_values(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([0.0]))
    tensor([0.7500], dtype=torch.float64)

    Raises:
        ValueError: if a value is outside [0, 1], as percentages are, or the shapes differ.
    """
    parts = {"coherency": coherency, "complexity": complexity, "drop": drop}
    for name, value in parts.items():
        # Means of float32 can come out slightly above 1.
        if bool(((value < 0) | (value > 1 + 1e-6)).any()):
            raise ValueError(
                f"{name}: values from {float(value.min()):g} to {float(value.max()):g}; give "
                f"fractions in [0, 1]"
            )
        if value.ndim != 1 or value.shape != coherency.shape:
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}; give (B,), the same for all three"
            )
    good = torch.stack([coherency.double(), 1 - complexity.double(), 1 - drop.double()])
    return 3 / good.clamp_min(0).reciprocal().sum(0)


@dataclass(frozen=True)
class AdccMetric(PerturbationMetric):
    """Coherency, complexity and ADCC, with one more explanation and one more forward pass per image.

    The pass scores image * grey, which is also the image that AD scores at level 1 on black. Min-max
    scaling of the maps does not affect coherency, because it does not change Pearson's correlation. If a
    method does not return a finite map that varies for the masked image, its coherency is 0. ADCC of logits
    is NaN unless 0 <= p - q <= p or q >= p >= 0, because otherwise AD is not a fraction.
    """

    explains_again: ClassVar[bool] = True

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        if sample.explain is None:
            raise ValueError("explain: None; ADCC explains the masked image; give the method")
        masked = sample.image * sample.grey
        yield Request("q", masked)
        grey = sample.grey[None]
        raw = sample.explain(masked[None]).to(grey.device)
        again, _ = functional.saliency(
            raw, grey.shape[-2:], normalization=sample.normalization, resize=sample.resize
        )
        coherency, complexity = coherency_values(grey, again), complexity_values(grey)
        p = torch.tensor([sample.score], dtype=torch.float64, device="cpu")

        def finish(scores: Mapping[str, Tensor]) -> dict[Column, float]:
            drop = functional.average_drop_values(p, scores["q"], bounded=False) / 100
            values = (float(coherency), float(complexity), math.nan)
            if sample.score >= 0 and float(drop) <= 1:
                adcc = adcc_values(coherency.cpu(), complexity.cpu(), drop)
                values = (*values[:2], float(adcc))
            return dict(zip(self.columns, values, strict=True))

        return finish


class Coherency(MeanMetric):
    """Mean coherency. ``update(maps, others, valid=None)`` takes maps (B, 1, H, W) each."""

    metric = "coherency"
    higher_is_better = True
    values = coherency_values


class Complexity(MeanMetric):
    """Mean complexity of grey maps. ``update(maps, valid=None)`` takes maps (B, 1, H, W)."""

    metric = "complexity"
    higher_is_better = False
    values = complexity_values


class ADCC(MeanMetric):
    """Mean of per-image ADCC. ``update(coherency, complexity, drop, valid=None)`` takes (B,) each."""

    metric = "ADCC"
    higher_is_better = True
    values = adcc_values


GROUP = MetricGroup(
    "adcc",
    AdccMetric,
    {
        "coherency": MetricInfo("(Pearson(m(x), m(x o m)) + 1) / 2", True, kind="robustness"),
        "complexity": MetricInfo(
            "mean of the grey map", False, kind="complexity", reads=MetricInputs("area", "the map")
        ),
        "ADCC": MetricInfo(
            "harmonic mean of coherency, 1 - complexity and 1 - AD",
            True,
            reads=MetricInputs("class", "the map", "black"),
        ),
    },
    words={
        "coherency": ("Coherency", "How similar the map stays when the photo is masked with it"),
        "complexity": ("Extent", "How much of the photo the map marks"),
        "ADCC": ("ADCC", "Average drop, coherency and extent in one number"),
    },
    classes=(Coherency, Complexity, ADCC),
)
