"""Writes smooth random JPEG photos for measuring how fast photos are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_photos(folder: Path, count: int = 64, size: tuple[int, int] = (500, 375)) -> Path:
    """Write ``count`` smooth random JPEG photos of ``size`` (width, height); return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        coarse = np.random.default_rng(i).integers(0, 256, (15, 20, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:04}.jpg")
    return folder
