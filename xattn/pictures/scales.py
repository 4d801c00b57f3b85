"""Colour scales over the values of a map, and their legends.

A :class:`Scale` defines what a colour means. By default this is the min-maxed map in [0, 1]; for a map with
negative values, it is the values themselves on a diverging scale centred on 0. With ``clip``, a map's scale
ends at the 1st and the 99th percentile of its values, so that a few extreme values leave the rest visible.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xattn.pictures.explained import Explained
from xattn.pictures.overlay import DIVERGING, SEQUENTIAL, overlay

RELEVANCE = "relevance for the named class, min-max per map"
CLIP = (1, 99)  # percentiles of a map's values at which a clipped scale ends
# A map is spiky if its values between these percentiles span less than this share of all its values.
SPIKY = 0.5
DIMMED = "; dimmed: outside the model's view"
OUTLINE = "outline"  # for a legend that shows a line and no colours


@dataclass(frozen=True)
class Legend:
    """The text of a colour scale: labels for its two ends, and what the colours mean.

    ``cmap`` names the scale's colours; ``OUTLINE`` stands for an outline, whose legend has no end labels.
    """

    low: str
    high: str
    text: str
    cmap: str = SEQUENTIAL


@dataclass(frozen=True)
class Scale:
    """A colour scale, defined by the values at its two ends in the map's own unit."""

    low: float
    high: float
    cmap: str = SEQUENTIAL
    clipped: bool = False

    def __call__(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Values as positions in [0, 1], clipped; all 0 (or the centre) if both ends are equal."""
        if self.high <= self.low:
            return np.full(values.shape, 0.5 if self.cmap == DIVERGING else 0.0, np.float32)
        at = (values.astype(np.float64) - self.low) / (self.high - self.low)
        return np.clip(at, 0, 1).astype(np.float32)

    @property
    def ends(self) -> tuple[str, str]:
        """Both ends as short texts."""
        return f"{self.low:.3g}", f"{self.high:.3g}"


def make_scale(limits: Iterable[tuple[float, float]], cmap: str | None = None) -> Scale:
    """One scale for several maps, each given by its (smallest, largest) values.

    ``cmap=None`` is inferno from the smallest to the largest value or, if one is negative, the diverging
    scale, which always reaches equally far on both sides of 0.
    """
    pairs = list(limits)
    if not pairs or not np.isfinite(pairs).all():
        raise ValueError(f"limits: got {pairs}; give the least and the greatest value of each map")
    low, high = min(pair[0] for pair in pairs), max(pair[1] for pair in pairs)
    cmap = cmap or (DIVERGING if low < 0 else SEQUENTIAL)
    if cmap == DIVERGING:
        high = max(abs(low), abs(high))
        low = -high
    return Scale(low, high, cmap)


def own_scale(explanation: Explained, cmap: str | None = None, clip: bool | None = False) -> Scale:
    """The scale of a single map: its minimum to its maximum, or [0, 1] for a mask; see
    :func:`make_scale`.

    Args:
        clip: whether the scale ends at the percentiles ``CLIP`` of the map; None: if the map is spiky. A
            map whose percentiles are equal is not clipped.
    """
    values = explanation.map
    if explanation.is_mask and cmap != DIVERGING:
        return Scale(0.0, 1.0, cmap or SEQUENTIAL)
    ends = float(values.min()), float(values.max())
    if clip is not False and np.isfinite(ends).all():
        low, high = (float(end) for end in np.percentile(values, CLIP))
        if low < high and (clip or high - low < SPIKY * (ends[1] - ends[0])):
            return replace(make_scale([(low, high)], cmap), clipped=True)
    return make_scale([ends], cmap)


def overlay_of(
    explanation: Explained,
    photo: Image.Image,
    opacity: float = 0.55,
    cmap: str = SEQUENTIAL,
    style: str = "overlay",
) -> Image.Image:
    """The map drawn over its photo. The style "overlay" shows the min-maxed map in ``cmap``; other styles
    use :func:`own_scale`."""
    values = explanation.on_photo((photo.height, photo.width))
    if style != "overlay":
        scale = own_scale(explanation)
        if not explanation.is_mask:
            low, high = float(explanation.map.min()), float(explanation.map.max())
            values = scale(low + values.astype(np.float64) * (high - low))
        cmap = scale.cmap
    return overlay(photo, values, opacity, cmap, style=style)


def legend_of(
    scale: Scale, shared: bool = False, style: str = "overlay", whole: bool = True
) -> Legend:
    """The legend of a scale: separate for each map, or one scale shared by several maps.

    Args:
        style: as in :func:`xattn.pictures.overlay.overlay`.
        whole: whether the photo is shown beyond the model's view, where it is dimmed.
    """
    signed = scale.cmap == DIVERGING
    if shared:
        low, high, text = *scale.ends, "score of the named class, one scale for all maps"
    elif signed:
        end = "99 % of its values" if scale.clipped else "its own largest"
        low, high, text = "−", "+", f"score of the named class, each map up to {end}"
    else:
        low, high, text = "0", "1", RELEVANCE
        if scale.clipped:
            text = text.replace("min-max", "1st to 99th percentile")
    cmap = scale.cmap
    if style == "outline":
        what = "positive values" if signed else "map"
        low, high, cmap = "", "", OUTLINE
        text = f"around the smallest region that holds half of the {what}"
    elif style == "spotlight":
        low, text, cmap = "0" if signed else low, f"brightness: {text}", "gray"
    elif signed:
        text += "; orange is evidence for the class, blue against it"
    return Legend(low, high, text + (DIMMED if whole else ""), cmap)
