"""Two ways to show where a map is high and leave the photo's own colours: an outline and a spotlight.

The outline runs around the smallest region that holds half of the map's mass: of all regions {w >= t} of
the weights w the first with sum(w >= t) w >= 1/2 sum w. The spotlight keeps the photo's brightness where
w is 1 and dims it towards w = 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

FINER = 3  # times the photo's raster: lines are drawn there, then shrunk, so that they are smooth
GAMMA = 2.2  # of sRGB: a pixel's light is its value to this power
DARK, LIGHT = 16, 255  # of the two lines of an outline, one inside the other: seen on any photo


def half_mass_level(weights: NDArray[Any], share: float = 0.5) -> float | None:
    """The level t of the smallest region {w >= t} that holds ``share`` of the mass of ``weights`` (H, W).

    Equal values stay together: of a binary mask the region is the whole mask. NaN and negative values have
    no mass; None where there is none at all.
    """
    falling = np.sort(weights[weights > 0], axis=None)[::-1]
    if not falling.size:
        return None
    mass = np.cumsum(falling, dtype=np.float64)
    return float(falling[np.searchsorted(mass, share * mass[-1])])


def outlines(weights: NDArray[Any], level: float) -> list[NDArray[np.float64]]:
    """Closed lines, each (n, 2) as (x, y) in pixels, around the region {w >= level} of ``weights`` (H, W).

    Along the border of the photo and where ``weights`` is NaN, the region ends.
    """
    from skimage.measure import find_contours

    known = np.where(np.isnan(weights), -1.0, weights)
    below = known[known < level]
    between = (level + float(below.max())) / 2 if below.size else level / 2
    found = find_contours(np.pad(known, 1, constant_values=-1.0), between)
    return [
        line[:, ::-1] - 0.5 for line in found
    ]  # (row, column) of padded cells: centres at halves


def draw_outline(pixels: NDArray[np.float32], weights: NDArray[Any]) -> None:
    """Draw the outline of ``weights`` (H, W) onto ``pixels`` (H, W, 3) in [0, 255], in place.

    Weights without mass have no outline.
    """
    level = half_mass_level(weights)
    if level is None:
        return
    lines = outlines(weights, level)
    width = max(2.0, max(weights.shape) / 160)
    for colour, wide in ((DARK, 2 * width), (LIGHT, width)):
        covered = _covered(lines, weights.shape, wide, margin=width)[..., None]
        pixels *= 1 - covered
        pixels += colour * covered


def line_sample(width: int, height: int) -> Image.Image:
    """The lines of an outline as an image, for legends."""
    rows = np.full((height, width), DARK, np.uint8)
    edge = max(round(height / 4), 1)
    rows[edge:-edge] = LIGHT
    return Image.fromarray(rows).convert("RGB")


def _covered(
    lines: list[NDArray[np.float64]], shape: tuple[int, ...], width: float, margin: float
) -> NDArray[np.float32]:
    """How much of each pixel (H, W) lies below lines of this width, in [0, 1].

    Lines stay ``margin`` pixels away from the photo's border, so that they are seen along it.
    """
    height, wide = shape
    far = np.maximum([wide - margin, height - margin], margin)
    canvas = Image.new("L", (wide * FINER, height * FINER))
    pen = ImageDraw.Draw(canvas)
    for line in lines:
        points = [tuple(p) for p in np.clip(line, margin, far) * FINER]
        pen.line([*points, points[1]], fill=255, width=round(width * FINER), joint="curve")
    return np.asarray(canvas.reduce(FINER), np.float32) / np.float32(255)


def spotlight(pixels: NDArray[np.float32], weights: NDArray[Any], dim: float) -> None:
    """Light ``pixels`` (H, W, 3) of sRGB in proportion to ``weights`` (H, W) in [0, 1], in place.

    Where a weight is 1 a pixel stays as it is; where it is 0 the share ``dim`` of its light is left.
    """
    light = dim + (1 - dim) * np.nan_to_num(weights, nan=0.0)
    pixels *= light.astype(np.float32)[..., None] ** np.float32(1 / GAMMA)
