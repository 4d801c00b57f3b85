"""Tiles of the studies' pictures: a map drawn over what it is of, cell by cell."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

from xattn.pictures.contact_sheet import Cell
from xattn.pictures.overlay import SEQUENTIAL, overlay
from xattn.pictures.scales import make_scale


def map_tile(
    tile: Image.Image, title: str, values: Tensor, colours: str = SEQUENTIAL, what: str = ""
) -> Cell:
    """A map (h, w) over ``tile``; without colours if it is the same everywhere. Its least and greatest
    value stand below, after ``what``."""
    own = values.double().cpu().numpy()
    low, high = float(own.min()), float(own.max())
    if _short(low) == _short(high):
        return Cell(tile, title, f"{what}{_short(low)} everywhere")
    scaled = make_scale([(low, high)], colours)(own)
    cells = Image.fromarray(scaled).resize(tile.size, Image.Resampling.NEAREST)
    drawn = overlay(tile, np.asarray(cells), cmap=colours)
    return Cell(drawn, title, f"{what}{_short(low)} to {_short(high)}")


def _short(x: float) -> str:
    return f"{x:.3g}" if abs(x) >= 1 else f"{x:.2g}"
