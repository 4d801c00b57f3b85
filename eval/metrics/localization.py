"""Localisation: is the map on the object? The pointing game, its energy-based form, IoU, and VEA.

    pointing = 100 [min_{u in M} |argmax m - u| <= tolerance]    Zhang et al. 2016, arXiv 1608.00507
    energy = sum_{u in M} m(u) / sum_u m(u)                      Score-CAM, arXiv 1910.01279
    IoU = |S & M| / |S | M|                                      S: the map's |M| largest pixels
    VEA = mean over t of |{m > t} & M| / |{m > t} | M|           t = 0.1, 0.2, ..., 0.9

m is the grey map, and M is the set of pixels of all objects of the explained class, from a mask or boxes.
Both are in the model's input. A large object is easy to hit, and the `centre` row of a table shows how
easy. A network need not look at the object, so these metrics do not measure faithfulness.

VEA is visual explanation accuracy (Oramas et al., arXiv 1712.06302). Zhao and Chan, arXiv 2304.06354, use
it for detections with these thresholds. They show the curve over t, whereas here it is averaged. Unlike
IoU, VEA depends on the map's grey levels and not only on their order.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
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

POINTING, ENERGY, IOU = Column("pointing"), Column("energy-pointing"), Column("IoU")
VEA = Column("VEA")
THRESHOLDS = tuple(i / 10 for i in range(1, 10))


def pointing_values(maps: Tensor, masks: Tensor, tolerance: float = 15.0) -> Tensor:
    """Play the pointing game with maps and bool masks, (B, 1, H, W) each; return (B,) float64 in percent.

    The value is 100 if the map's maximum is at most ``tolerance`` pixels (Euclidean, between pixel centres)
    away from the object, else 0. If there are several equal maxima, it is the percentage of them that hit,
    which is the expected value of a random choice. It is NaN if the mask is empty or the map is not finite.

    Raises:
        ValueError: if the shapes do not match, the masks are not bool, or the tolerance is negative.
    """
    v, _, valid = _checked(maps, masks)
    _check_tolerance(tolerance)
    shares = []
    for i in range(len(v)):
        if not valid[i]:
            shares.append(math.nan)
            continue
        near = _within(masks[i, 0], tolerance).flatten()
        top = v[i] == v[i].max()
        shares.append(100 * int((top & near).sum()) / int(top.sum()))
    return torch.tensor(shares, dtype=torch.float64, device=v.device)


def energy_pointing_values(maps: Tensor, masks: Tensor) -> Tensor:
    """Compute the share of the map that is on the object, (B,) float64 in [0, 1]; higher is better.

    For a constant map, it is the object's share of the area. It is NaN if the mask is empty, or if the map
    is zero everywhere or not finite.

    Raises:
        ValueError: if the shapes do not match, the masks are not bool, or a map has negative values.
    """
    v, inside, valid = _checked(maps, masks)
    if bool((v < 0).any()):
        raise ValueError(
            f"maps: the smallest value is {float(v.min()):g}; give grey maps with values of at least 0"
        )
    energy = torch.where(inside, v, 0.0).sum(1) / v.sum(1)
    return torch.where(valid, energy, torch.nan)


def iou_values(maps: Tensor, masks: Tensor, threshold: float | None = None) -> Tensor:
    """Compute the intersection over union of the thresholded map and the object, (B,) float64 in [0, 1].

    With ``threshold=None``, as many pixels of the map are kept as the object has, the largest ones, so that
    only the order of the pixels matters. If several equal pixels compete for the last places, each of them
    counts as the same fraction, so that position does not decide between them. With a number, all pixels of
    at least ``threshold`` times the maximum are kept. The value is NaN if the mask is empty or the map is
    not finite. If ``threshold`` is a number, it is also NaN if no pixel is above 0.

    Raises:
        ValueError: if the shapes do not match, the masks are not bool, or the threshold is outside (0, 1].
    """
    v, inside, valid = _checked(maps, masks)
    _check_threshold(threshold)
    rows = zip(v, inside, valid.tolist(), strict=True)
    ious = [_iou(a, m, threshold) if good else math.nan for a, m, good in rows]
    return torch.tensor(ious, dtype=torch.float64, device=v.device)


def vea_values(maps: Tensor, masks: Tensor) -> Tensor:
    """Average the IoU of the object and the grey map above each of :data:`THRESHOLDS`, (B,) float64 in [0,
    1].

    A map that equals the object's mask scores 1. The value is NaN if the mask is empty or the map is not
    finite.

    Raises:
        ValueError: if the shapes do not match, or the masks are not bool.

    Example:
        >>> mask = torch.tensor([[[[True, False]]]])
        >>> vea_values(torch.tensor([[[[1.0, 0.5]]]]), mask).round(decimals=3).tolist()
        [0.778]
    """
    v, inside, valid = _checked(maps, masks)
    kept = v > v.new_tensor(THRESHOLDS)[:, None, None]  # (t, B, n)
    ious = (kept & inside).sum(2) / (kept | inside).sum(2)
    return torch.where(valid, ious.double().mean(0), torch.nan)


def _iou(values: Tensor, inside: Tensor, threshold: float | None) -> float:
    size = int(inside.sum())
    if threshold is None:
        cut = values.kthvalue(len(values) - size + 1).values
        above, ties = values > cut, values == cut
        kept = above + ties.double() * ((size - int(above.sum())) / int(ties.sum()))
    else:
        top = float(values.max())
        if top <= 0:
            return math.nan
        kept = (values >= threshold * top).double()
    both = float(kept[inside].sum())
    return both / (float(kept.sum()) + size - both)


def _within(mask: Tensor, tolerance: float) -> Tensor:
    """Return which pixels are at most ``tolerance`` away from a pixel of the mask; both (H, W) bool."""
    import cv2

    # The exact distance to the nearest zero; OpenCV's default transform has errors of several percent.
    away = (~mask).to(torch.uint8).cpu().numpy()
    distance = cv2.distanceTransform(away, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    exact = np.sqrt(np.rint(distance.astype(np.float64) ** 2))  # OpenCV returns float32
    return torch.from_numpy(exact <= tolerance).to(mask.device)


def _checked(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments; return maps (B, n) float64, masks (B, n), and which images are valid (B,)."""
    check_maps(maps)
    if masks.dtype != torch.bool or masks.shape != maps.shape:
        raise ValueError(
            f"masks: got {masks.dtype} of shape {tuple(masks.shape)}; give bool "
            f"{tuple(maps.shape)}, the shape of the maps"
        )
    v, inside = maps.detach().double().flatten(1), masks.to(maps.device).flatten(1)
    return v, inside, v.isfinite().all(1) & inside.any(1)


def _check_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: got {tolerance}; give a number of pixels, at least 0")


def _check_threshold(threshold: float | None) -> None:
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(
            f"iou_threshold: got {threshold}; give a fraction of the maximum in (0, 1], or None for "
            f"as many pixels as the object has"
        )


@dataclass(frozen=True)
class LocalizationMetric(PerturbationMetric):
    """Pointing game, energy-based pointing game, IoU and visual explanation accuracy, without forward
    passes.

    All values are NaN if the image has no annotation of the explained class.

    Args:
        tolerance: the number of pixels of the model's input by which the maximum may miss the object. In
            the paper, the 15 pixels are counted on the photo; at 224 pixels per side they are more lenient.
        iou_threshold: see :func:`iou_values`; None keeps as many pixels as the object has.
    """

    tolerance: float = 15.0
    iou_threshold: float | None = None
    needs_annotation: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_tolerance(self.tolerance)
        _check_threshold(self.iou_threshold)

    def column_options(self, column: Column) -> dict[str, Any]:
        if column == POINTING:
            return {"tolerance": self.tolerance}
        return {"iou_threshold": self.iou_threshold} if column == IOU else {}

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        yield from ()
        values = dict.fromkeys(self.columns, math.nan)
        mask = None if sample.annotation is None else sample.annotation.mask(sample.target)
        if mask is not None:
            maps, masks = sample.grey[None], mask[None].to(sample.grey.device)
            values[POINTING] = float(pointing_values(maps, masks, self.tolerance))
            values[ENERGY] = float(energy_pointing_values(maps, masks))
            values[IOU] = float(iou_values(maps, masks, self.iou_threshold))
            values[VEA] = float(vea_values(maps, masks))
        return lambda scores: values


class PointingGame(MeanMetric):
    """Percentage of hits. ``update(maps, masks, valid=None)`` takes maps and bool masks, (B, 1, H, W)
    each."""

    metric = "pointing"
    higher_is_better = True

    def __init__(self, backbone: Any = None, tolerance: float = 15.0, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.tolerance = tolerance

    def _values(self, maps: Tensor, masks: Tensor) -> Tensor:
        return pointing_values(maps, masks, self.tolerance)


class EnergyPointingGame(MeanMetric):
    """Mean share of the map on the object. ``update(maps, masks, valid=None)`` takes grey maps."""

    metric = "energy-pointing"
    higher_is_better = True
    values = energy_pointing_values


class LocalizationIoU(MeanMetric):
    """Mean IoU; ``update(maps, masks, valid=None)``."""

    metric = "IoU"
    higher_is_better = True

    def __init__(self, backbone: Any = None, threshold: float | None = None, **kwargs: Any) -> None:
        super().__init__(backbone, **kwargs)
        self.threshold = threshold

    def _values(self, maps: Tensor, masks: Tensor) -> Tensor:
        return iou_values(maps, masks, self.threshold)


class VisualExplanationAccuracy(MeanMetric):
    """Mean VEA. ``update(maps, masks, valid=None)`` takes grey maps."""

    metric = "VEA"
    higher_is_better = True
    values = vea_values


GROUP = MetricGroup(
    "localization",
    LocalizationMetric,
    {
        "pointing": MetricInfo(
            "100 mean [argmax lies on the object]", True, 0, 100, "localisation"
        ),
        "energy-pointing": MetricInfo(
            "sum of the map on the object / sum", True, kind="localisation"
        ),
        "IoU": MetricInfo(
            "intersection / union of the map's top pixels and the object",
            True,
            0,
            1,
            "localisation",
        ),
        "VEA": MetricInfo(
            "mean over t of intersection / union of the map above t and the object",
            True,
            kind="localisation",
        ),
    },
    words={
        "pointing": ("Pointing game", "How often the map's highest point lies on the object"),
        "energy-pointing": ("Share on the object", "How much of the map lies on the object"),
        "IoU": (
            "Overlap with the object",
            "How well the map's highest part covers the object alone",
        ),
        "VEA": (
            "Visual explanation accuracy",
            "How well the map covers the object alone, at any threshold",
        ),
    },
    classes=(PointingGame, EnergyPointingGame, LocalizationIoU, VisualExplanationAccuracy),
)
