"""Tiles for the pictures of studies: a map drawn over its image, cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from xattn.pictures.contact_sheet import Cell
from xattn.pictures.overlay import DIVERGING, SEQUENTIAL, overlay
from xattn.pictures.scales import make_scale
from xattn.runtime.files import atomic_file

SIDE, QUALITY = 120, 80  # side of a strip's tile in pixels, and JPEG quality
CLIPPED = 0.995  # share of a map's values that lie within the scale of a strip


def map_tile(
    tile: Image.Image, title: str, values: Tensor, colours: str = SEQUENTIAL, what: str = ""
) -> Cell:
    """A map (h, w) over ``tile``; a constant map gets no colours. The caption below gives its least
    and greatest value, after ``what``."""
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


def strip_tile(pixels: Tensor, values: Tensor | None = None, kind: str = "positive") -> Image.Image:
    """A photo (C, H, W), under a map (h, w) if one is given, coloured on the map's own scale.

    ``kind`` sets the scale: "positive", from the map's least value; "signed", around 0; "mask",
    from 0 to 1.
    """
    drawn = Image.fromarray((255 * pixels.permute(1, 2, 0).numpy()).round().astype(np.uint8))
    drawn = drawn.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    if values is None:
        return drawn
    sides: Any = {"size": (SIDE, SIDE), "mode": "bilinear", "antialias": True}
    own = F.interpolate(values[None, None].double(), **sides)[0, 0].numpy()
    if kind == "signed":
        far = float(np.quantile(abs(own), CLIPPED))
        scale = make_scale([(-far, far)], DIVERGING)
    else:
        ends = (0.0, 1.0) if kind == "mask" else (own.min(), np.quantile(own, CLIPPED))
        scale = make_scale([ends], SEQUENTIAL)
    return overlay(drawn, scale(own), 0.65 if kind == "signed" else 0.55, scale.cmap)


def save_strip(path: Path, tiles: Sequence[Image.Image]) -> None:
    """Write tiles side by side, as JPEG."""
    strip = Image.new("RGB", (SIDE * len(tiles) + 4 * (len(tiles) - 1), SIDE), "white")
    for number, one in enumerate(tiles):
        strip.paste(one, ((SIDE + 4) * number, 0))
    with atomic_file(path) as temporary:
        strip.save(temporary, "JPEG", quality=QUALITY, optimize=True)
