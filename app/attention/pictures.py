"""Pictures of attention over a patch grid: one scale of colours a row, data URLs, legends in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st
from PIL import Image
from torch import Tensor

from xattn.pictures.contact_sheet import legends_html
from xattn.pictures.overlay import colorize, data_url
from xattn.pictures.scales import Legend, Scale, make_scale

if TYPE_CHECKING:
    from xattn.app.attention.attention_pass import Reading

SHARE, NUMBER = "{:.1%}", "{:.3g}"
SCALES = {"root": "Shared, square root", "linear": "Shared, linear", "own": "Each its own"}


def shares(maps: Sequence[Tensor], kind: str) -> Colours:
    """The colours of shares of attention, from 0 to the greatest; ``kind`` is one of ``SCALES``."""
    return Colours(Scale(0.0, max(float(m.max()) for m in maps)), kind)


class Colours:
    """A scale that several pictures share, or each picture's own from 0 to its greatest value.

    The root of a share in place of the share; not for a scale with values below 0.
    """

    def __init__(self, scale: Scale, kind: str) -> None:
        signed = scale.low < 0
        self.scale, self.own, self.root = scale, kind == "own", kind == "root" and not signed
        self.cmap = scale.cmap

    def __call__(self, values: np.ndarray) -> np.ndarray:
        scale = self.scale
        if self.own:
            scale = make_scale([(min(0.0, float(values.min())), float(values.max()))], self.cmap)
        return np.sqrt(scale(values)) if self.root else scale(values)


def png(values: Tensor, scale: Colours, kept: Tensor | None, side: int = 0) -> str:
    """A map (h, w) as a picture of one pixel a patch, or of whole pixels a patch up to ``side``.

    Patches that are not ``kept`` are transparent.
    """
    colours = colorize(scale(values.numpy()), scale.cmap)
    alpha = np.full(values.shape, 255, np.uint8)
    if kept is not None:
        alpha[~kept.numpy()] = 0
    image = Image.fromarray(np.dstack([colours, alpha]))
    times = max(1, -(-side // max(image.size)))
    image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    return data_url(image, "PNG")


def photo(seen: Reading) -> str:
    """The pixels that the model saw."""
    return data_url(seen.pixels, quality=92, subsampling=0)


def alt_text(what: str, map_: Tensor, seen: Reading, number: str = SHARE) -> str:
    """A map in words: where it is greatest."""
    row, column = divmod(int(map_.argmax()), seen.grid[1])
    most = number.format(float(map_.max()))
    return f"{what}: strongest at row {row + 1}, column {column + 1} ({most})"


def legend(scale: Colours, unit: str, number: str = SHARE) -> None:
    """Write what the colours mean below the pictures."""
    low, high = scale.scale.low, scale.scale.high
    if scale.own:
        words = Legend("0", "own greatest", unit, scale.cmap)
    else:
        middle = f"; the middle colour is {number.format(high / 4)}" if scale.root else ""
        ends = ("0" if low == 0 else number.format(low)), number.format(high)
        words = Legend(*ends, f"{unit}{middle}", scale.cmap)
    st.html(legends_html([words]))
