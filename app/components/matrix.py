"""A matrix of counts whose cells open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xattn.app.components import component


def matrix(
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    key: str,
    *,
    label: str,
    corner: str = "",
    on_open: Any = None,
) -> str | None:
    """Show counts; returns the id of the cell that was just opened.

    The arrow keys move between cells that hold something, Enter and a click open.

    Args:
        columns: their headings.
        rows: each ``{"title", "cells"}``; a cell is None, or ``{"id", "text", "hint", "share", "kind",
            "selected": bool, "href": str}``: ``share`` in [0, 1] is how strong its ground is, ``kind`` is
            ``right``, ``wrong`` or ``plain``, and ``href`` is where it leads in another tab.
        label: what the whole is called by a screen reader; ``corner``: what stands in the corner.
        on_open: called before the script runs again, without arguments.
    """
    data = {
        "columns": list(columns),
        "rows": [dict(row) for row in rows],
        "label": label,
        "corner": corner,
    }
    result = component("matrix")(data=data, key=key, on_open_change=on_open or (lambda: None))
    return result.open
