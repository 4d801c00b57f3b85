"""A clip and its map as one picture with the frames side by side, and as a GIF.

The colours of all frames use one scale; below each frame is its share of the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from xattn.pictures.design import LIGHT
from xattn.pictures.lettering import load_font, shorten
from xattn.pictures.overlay import overlay

GAP, LINE, BAR = 6, 16, 6  # pixels between pictures, for a line of text, for the bar of a share


def strip(
    photos: Sequence[Image.Image],
    maps: NDArray[Any],
    labels: Sequence[str],
    shares: Sequence[float],
    title: str,
) -> Image.Image:
    """The frames from left to right, at their own size, each above its overlay.

    Args:
        maps: (T, H, W) in [0, 1], on the pixels of ``photos``.
        labels, shares: a text and a number in [0, 1] for each frame.
    """
    below = [overlay(photo, values) for photo, values in zip(photos, maps, strict=True)]
    width, height = below[0].size
    full = LINE + GAP + 2 * (height + GAP) + BAR + GAP + LINE
    made = Image.new("RGB", (len(below) * (width + GAP) - GAP, full), LIGHT.ground)
    draw, font, bold = ImageDraw.Draw(made), load_font(12), load_font(12, bold=True)
    draw.text((0, 0), shorten(title, bold, made.width), LIGHT.text, bold)
    for i, (photo, drawn, label, share) in enumerate(
        zip(photos, below, labels, shares, strict=True)
    ):
        left, top = i * (width + GAP), LINE + GAP
        made.paste(photo, (left, top))
        made.paste(drawn, (left, top + height + GAP))
        top += 2 * (height + GAP)
        draw.rectangle((left, top, left + width - 1, top + BAR - 1), LIGHT.line)
        if share > 0:
            draw.rectangle((left, top, left + share * (width - 1), top + BAR - 1), LIGHT.accent)
        draw.text((left, top + BAR + 2), shorten(label, font, width), LIGHT.quiet, font)
    return made


def write_gif(
    path: str | Path, photos: Sequence[Image.Image], maps: NDArray[Any], seconds: float
) -> Path:
    """The overlays as a looping GIF that runs for ``seconds``, with 0.04 to 1 s per frame; the arguments
    are those of :func:`strip`."""
    first, *others = [overlay(photo, values) for photo, values in zip(photos, maps, strict=True)]
    each = int(np.clip(1000 * seconds / len(photos), 40, 1000))
    first.save(path, save_all=True, append_images=others, duration=each, loop=0)
    return Path(path)
