"""Photos as points in a plane: choose some with a lasso, a rectangle, the legend or the keyboard."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xattn.app.components import component

LEVELS = 65_535  # of a coordinate, and of a value of a scale
GROUPS = 8  # colours; a ninth group and those after it share the last


def scatter(
    points: NDArray[np.floating],
    ids: Sequence[str],
    key: str,
    *,
    label: str,
    words: Sequence[Sequence[str]],
    legend: Sequence[Mapping[str, Any]] = (),
    groups: NDArray[np.integer] | None = None,
    scale: Mapping[str, str] | None = None,
    values: NDArray[np.floating] | None = None,
    picture: str = "",
    chosen: Sequence[int] = (),
    on_choose: Any = None,
    on_open: Any = None,
) -> None:
    """Show points; ``sent(key, "choose")`` are the numbers of those that were chosen, a list.

    In the map the arrow keys go from point to point, with Shift they draw a rectangle, the space bar
    chooses a point, Enter opens it (``sent(key, "open")`` is its number), and Escape chooses none.

    Args:
        points: (n, 2), any range; both axes are drawn to one scale.
        ids: of the photos; ``picture`` and an id, quoted, make the address of a photo's picture.
        label: what the whole is called by a screen reader.
        words: up to three columns of n texts each, what is said of a point beside its picture.
        legend: the groups: each ``{"name", "kind"}``; kinds are ``class``, ``rest``, ``good`` and ``bad``.
        groups: (n,) the group of each point.
        scale: instead of groups ``{"name", "low", "high"}``; ``values``: (n,) of the points in [0, 1], NaN
            where there is none.
        chosen: the points that are chosen when the map is first shown; later ones are the person's.
        on_choose, on_open: called before the script runs again, without arguments.
    """
    x, y = _levels(points).T
    data: dict[str, Any] = {
        "label": label,
        "x": _packed(x),
        "y": _packed(y),
        "ids": list(ids),
        "words": [_coded(column) for column in words],
        "legend": [dict(group) for group in legend],
        "picture": picture,
        "chosen": list(chosen),
    }
    if groups is not None:
        data["groups"] = _packed(groups.astype(np.uint16))
    if scale is not None and values is not None:
        known = np.nan_to_num(values, nan=0.0) * (LEVELS - 1) + 1
        data["scale"] = dict(scale)
        data["values"] = _packed(np.where(np.isfinite(values), known, 0).astype(np.uint16))
    component("scatter")(
        data=data,
        key=key,
        on_choose_change=on_choose or (lambda: None),
        on_open_change=on_open or (lambda: None),
    )


def _levels(points: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Both coordinates on one scale, the shorter axis in the middle; y upwards becomes y downwards."""
    low, high = points.min(0), points.max(0)
    span = float((high - low).max()) or 1.0
    placed = (points - (low + high) / 2) / span * [1, -1] + 0.5
    return np.round(np.clip(placed, 0, 1) * LEVELS).astype(np.uint16)


def _packed(values: NDArray[np.uint16]) -> str:
    """Two bytes a value, little-endian, in base64."""
    return base64.b64encode(np.ascontiguousarray(values, "<u2").tobytes()).decode("ascii")


def _coded(column: Sequence[str]) -> list[str] | dict[str, Any]:
    """A column of texts, or where few texts come often, these and which of them each point has."""
    known = list(dict.fromkeys(column))
    if len(known) > min(len(column) // 2, LEVELS):
        return list(column)
    number = {text: i for i, text in enumerate(known)}
    return {"texts": known, "at": _packed(np.array([number[t] for t in column], np.uint16))}
