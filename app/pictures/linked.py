"""What the browser needs of maps to tell the value under the pointer: small arrays, and where they lie."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from xattn.packs.explanation import Explanation
    from xattn.photos.view import View

MOST_CELLS = 40  # a side of what is sent; larger maps are averaged


def map_cells(explanation: Explanation, crop: bool) -> dict[str, Any]:
    """A map for a cell of a linked grid, with ``crop`` over what the model saw, else over the whole photo.

    ``cells`` are 16 bits each, from ``low`` to ``high``, by rows, in base64; ``of`` is the map's own shape,
    ``most`` its greatest value, and ``box`` where it lies on the picture, see :func:`map_box`.
    """
    values = np.array(explanation.map, np.float64)
    rows, columns = (min(side, MOST_CELLS) for side in values.shape)
    if (rows, columns) != values.shape:
        values = _averaged(_averaged(values, rows).T, columns).T
    low, high = float(values.min()), float(values.max())
    steps = np.rint((values - low) / ((high - low) or 1.0) * 65535).astype("<u2")
    return {
        "rows": rows,
        "columns": columns,
        "cells": base64.b64encode(steps.tobytes()).decode("ascii"),
        "low": low,
        "high": high,
        "most": float(explanation.map.max()),
        "of": list(explanation.map.shape),
        "box": map_box(explanation.view, crop),
    }


def _averaged(values: np.ndarray, rows: int) -> np.ndarray:
    """(h, w) -> (rows, w): the means of neighbouring rows."""
    starts = np.arange(rows) * len(values) // rows
    counts = np.diff(starts, append=len(values))
    return np.add.reduceat(values, starts, axis=0) / counts[:, None]


def map_box(view: View, crop: bool) -> list[float]:
    """Top, left, bottom and right of the model's input, in shares of the photo, or of the part of it that
    the model saw; padding lies outside 0 to 1."""
    (rows, columns), (top, left, height, width) = view.resized, view.box
    corners = np.array(
        [[left / columns, top / rows], [(left + width) / columns, (top + height) / rows]]
    )
    (near, upper), (far, lower) = on_picture(corners, view, crop).tolist()
    return [upper, near, lower, far]


def on_picture(points: np.ndarray, view: View, crop: bool) -> np.ndarray:
    """Points (n, 2), x and y in shares of the photo, in shares of what is shown of it."""
    if not crop:
        return points
    (height, width), (top, left, bottom, right) = view.photo_size, view.photo_box
    start, size = (left / width, top / height), ((right - left) / width, (bottom - top) / height)
    return (points - start) / size
