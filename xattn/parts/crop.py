"""The image with its evidence cropped away: MemeTector's Visual Part Utilization (arXiv 2205.13268).

    p in linspace(.1, .9, 17),   r in linspace(sqrt(p), 1 / sqrt(p), 10)
    width = sqrt(p) r W,   height = sqrt(p) / r H

at 10 x 10 positions, evenly spread so that the rectangle stays inside the image. Of the rectangles
without evidence the one of the largest p is taken, at random among equals. Published for the text of
image macros; evidence may be any pixels. The crop is a hard negative: it shares everything with its
image except the evidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FRACTIONS = tuple(np.linspace(0.1, 0.9, 17).tolist())
ASPECTS = 10
CENTRES = 10
_ROUNDING = 1e-6  # pixels; keeps edges that lie on a pixel's border there


@dataclass(frozen=True)
class Crop:
    """``box`` (x0, y0, x1, y1) in whole pixels, ends excluded, and the ``fraction`` p it was cut for."""

    box: tuple[int, int, int, int]
    fraction: float

    def cut(self, image: Image.Image) -> Image.Image:
        return image.crop(self.box)


@lru_cache(maxsize=4)
def rectangles(
    fractions: tuple[float, ...] = FRACTIONS, aspects: int = ASPECTS, centres: int = CENTRES
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """All rectangles of the search: p (n,), and x0, y0, x1, y1 as fractions of width and height, (n, 4)."""
    if not fractions or not all(0 < p <= 1 for p in fractions) or aspects < 1 or centres < 1:
        raise ValueError(
            f"fractions, aspects, centres: got {fractions}, {aspects}, {centres}; give fractions in "
            f"(0, 1] and counts of at least 1"
        )
    place = np.linspace(0, 1, centres)
    grid = np.meshgrid(fractions, np.linspace(0, 1, aspects), place, place, indexing="ij")
    p, step, y, x = (axis.ravel() for axis in grid)
    root = np.sqrt(p)
    r = root + step * (1 / root - root)
    width, height = root * r, root / r
    x0, y0 = x * (1 - width), y * (1 - height)
    return p, np.stack([x0, y0, x0 + width, y0 + height], 1)


def largest_crop(
    evidence: NDArray[np.bool_], seed: int = 0, index: int = 0, **search: Any
) -> Crop | None:
    """The largest rectangle of the search without a pixel of ``evidence`` (H, W).

    Rectangles are shrunk to whole pixels. Ties are broken at random by (seed, index) alone; ``index`` is
    the image's number.

    Args:
        search: ``fractions``, ``aspects`` and ``centres`` of :func:`rectangles`.

    Returns:
        None if every rectangle holds evidence.

    Raises:
        ValueError: ``evidence`` is not a bool map with pixels, or ``seed`` or ``index`` is negative.
    """
    if evidence.ndim != 2 or evidence.dtype != np.bool_ or 0 in evidence.shape:
        raise ValueError(f"evidence: got {evidence.dtype} of {evidence.shape}; give bool (H, W)")
    if seed < 0 or index < 0:
        raise ValueError(f"seed, index: got {seed}, {index}; give numbers of at least 0")
    import cv2

    p, unit = rectangles(**search)
    height, width = evidence.shape
    x0, y0 = np.ceil(unit[:, :2] * (width, height) - _ROUNDING).astype(int).T
    x1, y1 = np.floor(unit[:, 2:] * (width, height) + _ROUNDING).astype(int).T
    table = cv2.integral(evidence.astype(np.uint8))
    covered = table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0]
    free = (covered == 0) & (x0 < x1) & (y0 < y1)
    if not free.any():
        return None
    ties = np.flatnonzero(free & (p == p[free].max()))
    i = ties[np.random.default_rng([seed, index]).integers(len(ties))]
    return Crop((int(x0[i]), int(y0[i]), int(x1[i]), int(y1[i])), float(p[i]))


def area(crop: Crop, size: tuple[int, int]) -> float:
    """The crop's share of the pixels of an image of ``size`` (width, height)."""
    x0, y0, x1, y1 = crop.box
    return (x1 - x0) * (y1 - y0) / math.prod(size)
