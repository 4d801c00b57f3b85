"""Randomisation check: does a map change when the network's weights are replaced by random ones?

    mean_k similarity(|phi|, |phi_k|),    phi_k on the network with k + 1 random parts

This is the cascading randomisation of Adebayo et al. 2018 (arXiv 1810.03292), from the classifier down to
the first layer (:func:`xattn.eval.sanity.cascade`). A map that stays the same does not depend on what the
network has learned. A low value is good but proves nothing, since noise is also dissimilar. A map that does
not use the classifier, such as that of a trained head or of Eigen-CAM, stays the same at the first stage,
and rightly so.

Similarity is Spearman's rank correlation, or structural similarity (Wang et al. 2004, doi
10.1109/TIP.2003.819861), where m, s^2 and s_ab are means, variances and the covariance in a window around
u:

    SSIM = mean_u l(a, b; u) cs(a, b; u)
    l = (2 m_a m_b + C1) / (m_a^2 + m_b^2 + C1),    cs = (2 s_ab + C2) / (s_a^2 + s_b^2 + C2)
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from xattn.correlation import check_same, pearson, ranks, varies
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

SPEARMAN, SSIM = Column("randomization-Spearman"), Column("randomization-SSIM")
WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def randomization_curves(
    maps: Tensor, randomized: Tensor, *, absolute: bool = True
) -> dict[Column, Tensor]:
    """Compute the similarity at each stage, (B, S) float64 in [-1, 1] for each column.

    Maps (by default their absolute values) are min-max scaled and compared with
    :func:`xattn.correlation.spearman` and :func:`ssim`. If the map of a randomised network is constant,
    the similarity is 0. It is NaN if the map itself is constant, or if one of the two is not finite.

    Args:
        maps: raw maps, (B, 1, H, W).
        randomized: raw maps of the randomised networks at the same resolution, (B, S, 1, H, W).

    Raises:
        ValueError: if the shapes are wrong, or a side is shorter than 11 pixels.
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
    """Average :func:`randomization_curves` over the stages, (B,) float64 for each column.

    Lower is better. The mean is NaN if the value of a stage is NaN.
    """
    curves = randomization_curves(maps, randomized, absolute=absolute)
    return {column: values.mean(1) for column, values in curves.items()}


def _prepared(maps: Tensor, absolute: bool) -> tuple[Tensor, Tensor]:
    return functional.minmax(maps.abs() if absolute else maps)


def ssim(a: Tensor, b: Tensor, data_range: float = 1.0) -> Tensor:
    """Compute the structural similarity of maps (B, 1, H, W); return (B,) float64 in [-1, 1].

    The value is NaN if one of the maps is constant or not finite. The settings are those of Wang et al.: a
    Gaussian window of 11 x 11 pixels with sigma 1.5, variances divided by the window's weight (not by n -
    1), C1 = (0.01 L)^2 and C2 = (0.03 L)^2, and the mean over the pixels whose window is inside the map. In
    scikit-image this is ``structural_similarity(a, b, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=L)``; its own default is a uniform 7 x 7 window.

    Args:
        data_range: L, the largest possible value minus the smallest possible one; 1 for min-max scaled
            maps.

    Raises:
        ValueError: if the shapes do not match, or a side is shorter than 11 pixels.
    """
    check_same(a, b)
    if a.ndim != 4 or a.shape[1] != 1 or min(a.shape[2:]) < WINDOW:
        raise ValueError(
            f"a, b: got shape {tuple(a.shape)}; give (B, 1, H, W) of at least {WINDOW} pixels per side"
        )
    a, b = a.detach().double(), b.detach().double()
    mean_a, mean_b, aa, bb, ab = _windowed(torch.cat([a, b, a * a, b * b, a * b], 1)).unbind(1)
    var_a, var_b, cov = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    value = (luminance * structure).mean((1, 2))
    return torch.where(varies(a.flatten(1)) & varies(b.flatten(1)), value, torch.nan)


def _windowed(x: Tensor) -> Tensor:
    """Compute Gaussian-weighted means (B, C, H - 10, W - 10) over all windows inside (B, C, H, W)."""
    offset = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weight = torch.exp(-(offset**2) / (2 * SIGMA**2))
    weight = (weight / weight.sum()).expand(x.shape[1], 1, 1, WINDOW)
    rows = F.conv2d(x, weight, groups=x.shape[1])
    return F.conv2d(rows, weight.transpose(2, 3), groups=x.shape[1])


@dataclass(frozen=True)
class RandomizationMetric(PerturbationMetric):
    """Similarity of a map to the method's maps on randomised networks, averaged over ``stages``.

    It needs ``sample.explain_randomized``, which :class:`xattn.eval.sanity.Cascade` provides. Without this
    function, the value of a method is NaN. Maps are compared at the image's resolution.

    Args:
        stages: the number of stages of the cascade that ``explain_randomized`` uses.
        absolute: whether to compare absolute values, as most of the paper does. With False, signed maps are
            compared.
        smooth: the number of noisy copies of the photo whose maps are averaged before the comparison. sMPRT
            uses 50 (Hedstroem et al. 2024, arXiv 2401.06465). With 0, the map of the photo itself is used.
        noise: standard deviation of the noise, as a fraction of the photo's range of values.
    """

    stages: int = 5
    absolute: bool = True
    smooth: int = 0
    noise: float = 0.1
    explains_again: ClassVar[bool] = True
    explains_randomized: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("stages", self.stages)
        if self.smooth < 0 or not self.noise > 0:
            raise ValueError(
                f"smooth, noise: got {self.smooth} and {self.noise}; give a number of copies (0 for none) "
                f"and a positive standard deviation"
            )

    def options(self) -> dict[str, Any]:
        given = super().options()
        return given if self.smooth else {k: given[k] for k in ("stages", "absolute")}

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        yield from ()
        if sample.explain_randomized is None:
            return lambda scores: dict.fromkeys(self.columns, math.nan)
        stages = []
        images, own = sample.image[None], sample.raw[None]
        if self.smooth:
            images = self._noisy(sample)
            assert sample.explain is not None
            own = self._mean(sample, sample.explain(images)).to(own)
        for stage in range(self.stages):
            stages.append(self._mean(sample, sample.explain_randomized(stage, images)))
        randomized = torch.stack(stages, 1).to(own.device)
        found = randomization_values(own, randomized, absolute=self.absolute)
        values = {column: float(value) for column, value in found.items()}
        return lambda scores: values

    def _noisy(self, sample: Sample) -> Tensor:
        """Return noisy copies of the photo, (smooth, 3, H, W)."""
        generator = torch.Generator().manual_seed(sample.seed)
        shape = (self.smooth, *sample.image.shape)
        noise = torch.randn(shape, generator=generator, device="cpu").to(sample.image)
        return sample.image + self.noise * (sample.image.amax() - sample.image.amin()) * noise

    def _mean(self, sample: Sample, raw: Tensor) -> Tensor:
        """Resize raw maps (b, 1, h, w) to the photo's size and return their mean, (1, 1, H, W)."""
        sized = functional.upsample(raw.detach().float(), sample.raw.shape[-2:], sample.resize)
        return sized.mean(0, keepdim=True)


class _Similarity(MeanMetric):
    """``update(maps, randomized, valid=None)`` takes the arguments of :func:`randomization_values`."""

    higher_is_better = False

    def _values(self, maps: Tensor, randomized: Tensor) -> Tensor:
        return randomization_values(maps, randomized)[Column(self.metric)]


class RandomizationSpearman(_Similarity):
    """Mean rank correlation with the maps of randomised networks."""

    metric = "randomization-Spearman"


class RandomizationSSIM(_Similarity):
    """Mean structural similarity to the maps of randomised networks."""

    metric = "randomization-SSIM"


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
    words={
        "randomization-Spearman": (
            "Similarity on random weights, by ranks",
            "How similar the map stays when the network's weights are randomised",
        ),
        "randomization-SSIM": (
            "Similarity on random weights, by structure",
            "How similar the map looks when the network's weights are randomised",
        ),
    },
    classes=(RandomizationSpearman, RandomizationSSIM),
)
