"""Maps over photos: in perceptually uniform colours, as an outline or as a spotlight.

The outline surrounds the smallest region that holds half of the map's mass: of all regions {w >= t} of the
weights w, the first with sum(w >= t) w >= 1/2 sum w. The spotlight keeps the photo's brightness where
w is 1 and dims it towards w = 0. Outside the model's view the photo is dimmed and grey.
"""

from __future__ import annotations

import base64
import functools
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from xattn.runtime.names import did_you_mean

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
SEQUENTIAL, DIVERGING = "inferno", "diverging"
STYLES = ("overlay", "outline", "spotlight")
FINER = 3  # lines are drawn at this multiple of the photo's size, then shrunk, to be smooth
GAMMA = 2.2  # of sRGB: light is proportional to the pixel value to this power
DARK, LIGHT = 16, 255  # the two lines of an outline, one inside the other: visible on any photo


@functools.lru_cache(maxsize=8)
def _lut(cmap: str) -> NDArray[np.uint8]:
    """256 RGB colours of ``"diverging"`` or of a matplotlib colour map."""
    import matplotlib

    if cmap == DIVERGING:
        return _diverging()
    if cmap not in matplotlib.colormaps:
        hint = did_you_mean(cmap, list(matplotlib.colormaps), "see matplotlib.colormaps")
        raise ValueError(f"cmap: no colour map {cmap!r}; {hint}")
    return np.rint(matplotlib.colormaps[cmap](np.arange(256))[:, :3] * 255).astype(np.uint8)


def _diverging() -> NDArray[np.uint8]:
    """Blue below the centre, orange above it, and dark at the centre; CIELAB lightness rises linearly to
    both sides.

    As in inferno, dark means no relevance, and equal amounts of both signs are equally light.
    """
    from skimage.color import lab2rgb

    at = np.linspace(-1, 1, 256)
    size = np.abs(at)
    hue = np.deg2rad(np.where(at < 0, 262, 60))
    # Grey at the centre, and pale at the light ends, where sRGB has little chroma left.
    chroma = np.where(at < 0, 43, 58) * np.minimum(3 * size, 1) * np.minimum((1.35 - size) / 0.6, 1)
    lab = np.stack([8 + 82 * size, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    return np.rint(lab2rgb(lab) * 255).astype(np.uint8)


def colorize(values: NDArray[Any], cmap: str = SEQUENTIAL) -> NDArray[np.uint8]:
    """Values (..., H, W) in [0, 1] as colours (..., H, W, 3), uint8; NaN becomes black."""
    colours = _lut(cmap)[_index(values)]
    colours[np.isnan(values)] = 0
    return colours


def _index(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Indices into a table of 256 colours; 0 for NaN."""
    return np.rint(np.nan_to_num(np.clip(values, 0, 1)) * 255).astype(np.uint8)


def overlay(
    photo: Image.Image,
    values: NDArray[Any],
    opacity: float = 0.55,
    cmap: str = SEQUENTIAL,
    threshold: float = 0.0,
    style: str = "overlay",
) -> Image.Image:
    """A map over its photo.

    Args:
        photo: RGB, H x W pixels.
        values: (H, W) in [0, 1]; NaN outside the model's view, shown dimmed and without colour.
        opacity: 0 (photo) to 1 (map), the same everywhere so that a colour has one meaning; for a
            spotlight, how dark the outside is.
        threshold: in [0, 1]; values below it get no colour, or no light. On the diverging scale, the
            threshold is a distance from the centre, as a fraction of half the scale.
        style: "overlay", the map in colour; "outline", a line around the smallest region that holds half of
            the map's mass; or "spotlight", which dims the photo where the map is low. The last two use the
            positive half of the diverging scale.
    """
    if values.shape != (photo.height, photo.width):
        raise ValueError(
            f"values: got shape {values.shape} for a photo of {photo.height} x {photo.width}; "
            f"give View.to_photo(map, size)"
        )
    for name, share in (("opacity", opacity), ("threshold", threshold)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: got {share}; give a number from 0 to 1")
    if style not in STYLES:
        raise ValueError(f"style: got {style!r}; give one of {', '.join(STYLES)}")
    pixels = np.asarray(photo if photo.mode == "RGB" else photo.convert("RGB"))
    out = pixels.astype(np.float32)
    grey = (out @ LUMA)[..., None]
    signed = 2 * values - 1 if cmap == DIVERGING else values
    # In float32, like the values: a value equal to the threshold is not below it.
    low = np.abs(signed) < np.float32(threshold)
    dark = 0.35
    if style == "overlay":
        # Below the map the photo loses part of its own colour to grey.
        out *= (1 - opacity) ** 2
        out += opacity * (1 - opacity) * grey
        colours = (np.float32(opacity) * _lut(cmap)).astype(np.float32)
        out += colours.take(_index(values), axis=0)  # several times as fast as indexing
        if low.any():
            out[low] = pixels[low]
    elif style == "outline":
        _draw_outline(out, signed)
    else:
        _spotlight(out, np.where(low, 0, np.maximum(signed, 0)), (1 - opacity) ** 4)
        dark *= 1 - opacity
    outside = np.isnan(values)
    if outside.any():
        flat = out.reshape(-1, 3)
        at = np.flatnonzero(outside)
        flat[at] = dark * grey.reshape(-1, 1)[at]
        if not outside.all():
            edge = _frame(~outside, width=max(1, round(max(photo.size) / 400)))
            at = np.flatnonzero(edge)
            flat[at] = 0.45 * flat[at] + 0.55 * 255
    return Image.fromarray(np.rint(out, out=out).astype(np.uint8))


def _frame(inside: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """The outermost ``width`` pixels of the rectangle ``inside``, except along the photo's border."""
    core = inside.copy()
    for axis in (0, 1):
        for shift in (width, -width):
            moved = np.roll(inside, shift, axis)
            rim = slice(0, shift) if shift > 0 else slice(shift, None)
            moved[(rim,) if axis == 0 else (slice(None), rim)] = True  # the photo's own border
            core &= moved
    return inside & ~core


def data_url(image: Image.Image, kind: str = "JPEG", **options: Any) -> str:
    """The picture as a data URL, for self-contained pages; ``options`` are Pillow's."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    text = base64.b64encode(stream.getvalue()).decode("ascii")
    return f"data:image/{kind.lower()};base64,{text}"


def colour_bar(width: int = 256, height: int = 16, cmap: str = SEQUENTIAL) -> Image.Image:
    """The colour scale as an image, from 0 (left) to 1 (right)."""
    row = colorize(np.linspace(0, 1, width)[None], cmap)
    return Image.fromarray(np.repeat(row, height, axis=0))


def gradient(cmap: str = SEQUENTIAL) -> str:
    """The colour stops of a CSS ``linear-gradient``, from the lowest value to the highest."""
    return ", ".join("rgb({} {} {})".format(*_lut(cmap)[i]) for i in range(0, 256, 15))


# ---------------------------------------------------------------------- outlines and spotlights


def half_mass_level(weights: NDArray[Any]) -> float | None:
    """The level t of the smallest region {w >= t} that holds half of the mass of ``weights`` (H, W).

    Equal values stay together: for a binary mask the region is the whole mask. NaN and negative values have
    no mass; the result is None if there is no mass at all.
    """
    falling = np.sort(weights[weights > 0], axis=None)[::-1]
    if not falling.size:
        return None
    mass = np.cumsum(falling, dtype=np.float64)
    return float(falling[np.searchsorted(mass, 0.5 * mass[-1])])


def outlines(weights: NDArray[Any], level: float) -> list[NDArray[np.float64]]:
    """Closed lines, each (n, 2) as (x, y) in pixels, around the region {w >= level} of ``weights`` (H, W).

    The region ends along the border of the photo and where ``weights`` is NaN.
    """
    from skimage.measure import find_contours

    known = np.where(np.isnan(weights), -1.0, weights)
    below = known[known < level]
    between = (level + float(below.max())) / 2 if below.size else level / 2
    found = find_contours(np.pad(known, 1, constant_values=-1.0), between)
    return [
        line[:, ::-1] - 0.5 for line in found
    ]  # (row, column) of padded cells: centres at halves


def _draw_outline(pixels: NDArray[np.float32], weights: NDArray[Any]) -> None:
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
    """An image of an outline's lines, for legends."""
    rows = np.full((height, width), DARK, np.uint8)
    edge = max(round(height / 4), 1)
    rows[edge:-edge] = LIGHT
    return Image.fromarray(rows).convert("RGB")


def _covered(
    lines: list[NDArray[np.float64]], shape: tuple[int, ...], width: float, margin: float
) -> NDArray[np.float32]:
    """How much of each pixel (H, W) is covered by lines of this width, in [0, 1].

    Lines stay ``margin`` pixels away from the photo's border, so that they are visible along it.
    """
    height, wide = shape
    far = np.maximum([wide - margin, height - margin], margin)
    canvas = Image.new("L", (wide * FINER, height * FINER))
    pen = ImageDraw.Draw(canvas)
    for line in lines:
        points = [tuple(p) for p in np.clip(line, margin, far) * FINER]
        pen.line([*points, points[1]], fill=255, width=round(width * FINER), joint="curve")
    return np.asarray(canvas.reduce(FINER), np.float32) / np.float32(255)


def _spotlight(pixels: NDArray[np.float32], weights: NDArray[Any], dim: float) -> None:
    """Light ``pixels`` (H, W, 3) in sRGB in proportion to ``weights`` (H, W) in [0, 1], in place.

    Where a weight is 1 a pixel is unchanged; where it is 0, the share ``dim`` of its light remains.
    """
    light = dim + (1 - dim) * np.nan_to_num(weights, nan=0.0)
    pixels *= light.astype(np.float32)[..., None] ** np.float32(1 / GAMMA)
