"""Masks over the model's input: as the browser sends them, of superpixels, and of the top of a map.

A mask is (rows, columns) bool on a raster of the input's shape with at most ``MOST_SIDE`` cells a side.
What a browser sends is not believed: it has to have exactly the size of the raster.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xattn.eval.functional import upsample
from xattn.explainers.masking.masked_passes import superpixels

MOST_SIDE = 384  # cells of a raster's longer side
SEGMENTS = 60  # superpixels asked for
Mask = NDArray[np.bool_]


def raster_of(input_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the masks over an input of (height, width) pixels."""
    scale = min(1.0, MOST_SIDE / max(input_size))
    rows, columns = (max(1, round(side * scale)) for side in input_size)
    return rows, columns


def encoded(mask: Mask) -> str:
    """The bits row by row, the first one highest in its byte, in base64."""
    return base64.b64encode(np.packbits(mask).tobytes()).decode("ascii")


def decoded(sent: Any, raster: tuple[int, int]) -> Mask:
    """The mask of ``{"rows", "columns", "bits"}``, ``bits`` as :func:`encoded` writes them.

    Raises:
        ValueError: another form, size or encoding; nothing is decoded before its length is known.
    """
    rows, columns = raster
    want = f"give {rows} x {columns} bits in base64"
    if not isinstance(sent, Mapping) or not isinstance(sent.get("bits"), str):
        raise ValueError(f"mask: got no bits; {want}")
    if (sent.get("rows"), sent.get("columns")) != raster:
        size = " x ".join(str(sent.get(name))[:20] for name in ("rows", "columns"))
        raise ValueError(f"mask: got {size}; {want}")
    count = -(-rows * columns // 8)
    if len(sent["bits"]) != 4 * -(-count // 3):
        raise ValueError(f"mask: got {len(sent['bits']):,} characters; {want}")
    try:
        data = base64.b64decode(sent["bits"], validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"mask: got characters that are not base64; {want}") from None
    if len(data) != count:
        raise ValueError(f"mask: got {len(data):,} bytes; {want}")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=rows * columns)
    return bits.reshape(raster).astype(bool)


def on_input(mask: Mask, size: tuple[int, int]) -> Tensor:
    """A mask on the pixels of the input, (1, H, W) bool: each pixel has the cell that it lies in."""
    rows, columns = (
        ((np.arange(side) + 0.5) * cells / side).astype(int)
        for side, cells in zip(size, mask.shape, strict=True)
    )
    return torch.from_numpy(mask[rows[:, None], columns])[None]


def strongest(map: NDArray[Any], share: float, raster: tuple[int, int]) -> Mask:
    """The ``share`` of the raster's cells where a map (h, w) is greatest; of equal ones the first."""
    values = upsample(torch.from_numpy(np.array(map, np.float32))[None, None], raster)[0, 0]
    count = round(share * values.numel())
    order = values.flatten().argsort(descending=True, stable=True)[:count]
    mask = np.zeros(values.numel(), bool)
    mask[order.numpy()] = True
    return mask.reshape(raster)


def region_runs(pixels: Tensor, raster: tuple[int, int]) -> list[int]:
    """SLIC's superpixels of an input (3, H, W) on the raster: label, count, label, count, ... by rows."""
    small = torch.nn.functional.interpolate(
        pixels[None], raster, mode="bilinear", align_corners=False, antialias=True
    )[0]
    labels = superpixels(small, SEGMENTS).flatten().numpy()
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    counts = np.diff(starts, append=len(labels))
    return np.stack([labels[starts], counts], axis=1).flatten().tolist()
