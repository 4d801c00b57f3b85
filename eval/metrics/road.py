"""ROAD (remove and debias): scores of images whose most or least relevant pixels are imputed.

    MoRF = mean_l s(x without the l most relevant),    LeRF likewise with 1 - map,
    ROAD = mean_l (s_LeRF(l) - s_MoRF(l)) / 2

At level l, all pixels whose value is at least the linearly interpolated (1 - l) quantile of the map are
removed, including ties. :func:`xattn.eval.fills.impute` fills the hole, so that its shape reveals nothing
about the class. Rong et al. 2022 (arXiv 2202.00449).

s is the protocol's score of the imputed image. pytorch-grad-cam's ROADMostRelevantFirstAverage and
ROADLeastRelevantFirstAverage return the mean change s(imputed) - s(clean) instead, which is the value here
minus the score of the clean image. This score cancels out in pytorch-grad-cam's ROADCombined, which equals
the ROAD of this module if the levels are the same. (Its percentile p is the level 1 - p / 100 here. By
default, pytorch-grad-cam uses nine levels from 0.1 to 0.9, and the paper uses seven.) The paper itself
reports how often the prediction stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.eval import functional
from xattn.eval.fills.imputation import impute
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

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)


def removed_pixels(maps: Tensor, levels: Sequence[float] = LEVELS) -> Tensor:
    """Return which pixels of maps (B, 1, H, W) are removed at each of L levels, (B, L, H, W) bool.

    These are the pixels whose value is at least the (1 - level) quantile, as numpy defines it. If the
    quantile is the smallest value of a map, everything is removed.
    """
    functional.check_maps(maps)
    _check_levels(levels)
    flat = maps.flatten(1)
    thresholds = [functional.quantile(flat, 1 - level) for level in levels]
    return maps >= torch.stack(thresholds, 1)[:, :, None, None]


def road_values(scores: Tensor) -> Tensor:
    """Average scores (B, L) over the levels, (B,) float64; NaN if one of an image's scores is not
    finite."""
    scores = functional.as_tensor(scores).detach().double()
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}; give (B, L), one per level")
    return torch.where(scores.isfinite().all(1), scores.mean(1), torch.nan)


def road_combined_values(lerf: Tensor, morf: Tensor) -> Tensor:
    """Average (LeRF - MoRF) / 2, from scores (B, L) each, over the levels; return (B,) float64."""
    if lerf.shape != morf.shape:
        raise ValueError(
            f"lerf, morf: got shapes {tuple(lerf.shape)} and {tuple(morf.shape)}; give both (B, L)"
        )
    return (road_values(lerf) - road_values(morf)) / 2


class _RoadMetric(MeanMetric):
    """``update(scores, valid=None)`` takes scores (B, L), one per level."""

    values = road_values


class RoadMoRF(_RoadMetric):
    """ROAD-MoRF, the mean score without the most relevant pixels; lower is better."""

    metric = "ROAD-MoRF"
    higher_is_better = False


class RoadLeRF(_RoadMetric):
    """ROAD-LeRF, the mean score without the least relevant pixels; higher is better."""

    metric = "ROAD-LeRF"
    higher_is_better = True


class RoadCombined(MeanMetric):
    """ROAD; higher is better. ``update(lerf, morf, valid=None)`` takes scores (B, L) each."""

    metric = "ROAD"
    higher_is_better = True
    values = road_combined_values


@dataclass(frozen=True)
class RoadMetric(PerturbationMetric):
    """ROAD-MoRF, ROAD-LeRF and ROAD. For each order of removal, all levels are imputed in one batch.

    Args:
        levels: the fractions of pixels to remove, in (0, 1).
        noise: standard deviation of the noise on imputed pixels. The same noise is used at all levels and
            for all methods.
        tolerance: tolerance of the imputation, see :func:`xattn.eval.fills.imputation.impute`.

    A constant map has no order, so its value is NaN.
    """

    levels: tuple[float, ...] = LEVELS
    noise: float = 0.01
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        _check_levels(self.levels)
        if not self.noise >= 0:
            raise ValueError(f"noise: got {self.noise}; give a standard deviation >= 0")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance: got {self.tolerance}; give a positive value")

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        if sample.grey.min() == sample.grey.max():
            return lambda scores: dict.fromkeys(self.columns, math.nan)
        for key, grey in (("morf", sample.grey), ("lerf", 1 - sample.grey)):
            removed = removed_pixels(grey[None], self.levels).transpose(0, 1)
            images = impute(
                sample.image[None],
                removed,
                noise=self.noise,
                seed=sample.seed,
                tolerance=self.tolerance,
            )
            for image in images:
                yield Request(key, image, shared=False)

        def finish(scores: Mapping[str, Tensor]) -> dict[Column, float]:
            morf, lerf = scores["morf"][None], scores["lerf"][None]
            values = road_values(morf), road_values(lerf), road_combined_values(lerf, morf)
            return {c: float(value) for c, value in zip(self.columns, values, strict=True)}

        return finish


def _check_levels(levels: Sequence[float]) -> None:
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels: got {tuple(levels)}; give removed fractions in (0, 1)")


_REPLACED = "pixels are replaced by what is around them"
_READS = MetricInputs("class", "thresholds of the map", "imputed")
GROUP = MetricGroup(
    "road",
    RoadMetric,
    {
        "ROAD-MoRF": MetricInfo(
            "mean score with the most relevant pixels imputed", False, reads=_READS
        ),
        "ROAD-LeRF": MetricInfo(
            "mean score with the least relevant pixels imputed", True, reads=_READS
        ),
        "ROAD": MetricInfo("mean (LeRF - MoRF) / 2", True, -0.5, 0.5, reads=_READS),
    },
    words={
        "ROAD-MoRF": (
            "ROAD, most important first",
            f"How much confidence is left when the most important {_REPLACED}",
        ),
        "ROAD-LeRF": (
            "ROAD, least important first",
            f"How much confidence is left when the least important {_REPLACED}",
        ),
        "ROAD": (
            "ROAD",
            "How much more confidence the most important pixels carry than the least important",
        ),
    },
    classes=(RoadMoRF, RoadLeRF, RoadCombined),
)
