"""A picture cut into patches, one of which is picked: by the pointer, or by the arrow keys."""

from __future__ import annotations

from typing import Any

import streamlit as st

from xattn.app.components import component


def patches(
    photo: str,
    grid: tuple[int, int],
    key: str,
    *,
    aspect: float,
    map: str | None = None,
    picked: tuple[int, int] | None = None,
    label: str,
    alt: str,
    on_pick: Any = None,
) -> tuple[int, int] | None:
    """Show a photo under its patch grid; returns the patch that was just picked, (row, column) from 0.

    The arrow keys, Home and End (with Ctrl: of the whole grid) move a cursor, which is picked when it
    rests, or at once by Enter; the row and column are read out. A slider fades the map.

    Args:
        photo: URL of the picture, which the grid divides evenly.
        grid: rows and columns; ``aspect``: width over height of the photo, known before it is there.
        map: URL of a picture with one pixel a patch, to lay over the photo.
        picked: the patch that is outlined, (row, column) from 0.
        label: what the whole is called by a screen reader; ``alt``: what the picture shows.
        on_pick: called before the script runs again; :func:`picked_patch` of ``key`` is the patch then.
    """
    rows, columns = grid
    data = {
        "photo": photo,
        "map": map,
        "aspect": aspect,
        "rows": rows,
        "columns": columns,
        "picked": None if picked is None else list(picked),
        "label": label,
        "alt": alt,
    }
    result = component("patches")(data=data, key=key, on_pick_change=on_pick or (lambda: None))
    return _checked(result.pick, grid)


def picked_patch(key: str, grid: tuple[int, int]) -> tuple[int, int] | None:
    """What was just picked in the picture ``key``, inside its ``on_pick``."""
    return _checked(getattr(st.session_state.get(key), "pick", None), grid)


def _checked(value: Any, grid: tuple[int, int]) -> tuple[int, int] | None:
    """A browser's answer, if it is a patch of the grid."""
    try:
        row, column = (int(v) for v in value)
    except (TypeError, ValueError):
        return None
    return (row, column) if 0 <= row < grid[0] and 0 <= column < grid[1] else None
