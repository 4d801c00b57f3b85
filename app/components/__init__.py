"""Components that Streamlit lacks, such as the grid of pictures.

A component is a ``.js`` and a ``.css`` file of its name in this folder. What it shows comes in as
data and becomes text by ``textContent``, never HTML.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import streamlit as st

TAKEN = "_acts"  # the session's key of its :class:`_Taken`


@cache
def component(name: str, *parts: str) -> Any:
    """The component ``name`` of this folder, registered once; its root is ``<div class=name>``.

    ``parts`` are files of functions and rules that it uses, of the same folder; every component has
    those of ``element.js``.
    """
    folder = resources.files(__name__)
    css, js = (
        "\n".join(
            (folder / f"{n}.{kind}").read_text(encoding="utf-8") for n in (*first, *parts, name)
        )
        for kind, first in (("css", ()), ("js", ("element",)))
    )
    html = f'<div class="{name}"></div>'
    return st.components.v2.component(f"xattn_{name}", html=html, css=css, js=js)


def sent(key: str, name: str) -> Any:
    """What the component of ``key`` sent as ``name``, for its callback.

    None if Streamlit has already forgotten the component, because a click interrupted the run that would
    have shown it.
    """
    return getattr(st.session_state.get(key), name, None)


class _Taken:
    """The last act that was taken up, by component; two runs of a session may be under way."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.last: dict[str, int] = {}


def _taken() -> _Taken:
    found: _Taken = st.session_state.setdefault(TAKEN, _Taken())
    return found


def acts(key: str) -> Iterator[dict[str, Any]]:
    """What a person did by keys in the component of ``key``, for its ``on_act``: each act once, in their
    order.

    An act counts as done when it is given out. Whoever asks must neither read the session meanwhile nor
    call what Streamlit caches: there it ends a callback when the next act is there, and this one would be
    lost.
    """
    taken, found = _taken(), sent(key, "act") or ()
    with taken.lock:
        for act in found:
            number = act.get("n") if isinstance(act, dict) else None
            if isinstance(number, int) and number > taken.last.get(key, 0):
                taken.last[key] = number
                yield act


def keys(names: Sequence[str], key: str, on_act: Any) -> None:
    """Keys of a page that has no grid for them; :func:`acts` has them as ``{"key": name}``.

    Args:
        names: of "1" to "9", "j", "k", "x", "undo" (Z), "redo" (Shift+Z) and "escape".
        on_act: called before the script runs again, without arguments.
    """
    data = {"keys": list(names), "taken": _taken().last.get(key, 0)}
    component("keys", "acts")(data=data, key=key, on_act_change=on_act)


def grid(
    cells: Sequence[Mapping[str, Any]],
    key: str,
    *,
    label: str = "Pictures",
    columns: int | None = None,
    width: int | None = None,
    aspect: float = 4 / 3,
    cover: bool = False,
    scroll: int = 0,
    linked: Mapping[str, Any] | None = None,
    on_open: Any = None,
    on_turn: Any = None,
    on_act: Any = None,
) -> str | None:
    """Pictures with captions; returns the id of the cell that was just opened.

    The arrow keys, Home and End move the focus, Enter and a click open. Pictures load when they
    come into sight.

    Args:
        cells: each ``{"id", "src", "bare", "alt", "title", "value", "lines": [str], "badge": {"text",
            "kind"} | None, "selected": bool, "href": str}``, where kinds are ``good``, ``bad`` and
            ``plain``; everything but ``id``, ``src`` and ``title`` may be left out. ``bare`` is the
            photo without its map, which stands in the picture's place while somebody points at it;
            ``value`` stands beside the title. ``href`` is where the cell leads in another tab. With
            ``on_act`` also ``{"photo", "chosen": bool, "marks": [str]}``: whose cells are chosen
            together, and what stands on the picture.
        label: what the whole is called by a screen reader.
        columns: how many side by side, at most where ``width`` is given; by default as many as fit.
        width: of a cell in pixels, at least; by default 168, or 132 on a narrow screen.
        aspect: width over height of a picture's place.
        cover: pictures fill their place, and what is beyond it is cut off; else they fit into it.
        scroll: when this changes, the grid's top comes into sight.
        linked: of pictures of one photo: all zoom and move together, and a cell's ``map``
            (:func:`xattn.app.pictures.linked.map_cells`) tells its value under the pointer. ``{"aspect",
            "subject", "outlines"}``: width over height of the pictures, what they show, so that another
            photo begins unzoomed, and outlines ``{"points": [[x, y]], "own": bool}`` in shares of them.
        on_open: called before the script runs again, without arguments.
        on_turn: as ``on_open``, for page keys inside the grid; ``sent(key, "turn")`` is -1 or 1.
        on_act: as ``on_open``, and photos can be chosen: by x, by the box on a cell, by Ctrl, Cmd or Shift
            and a click. :func:`acts` has ``{"of": photos of this page, "chosen": those of them}``, and for
            the keys of :func:`keys` ``{"key", "photo": the one in focus or None}``; J and K move.
    """
    data = {
        "cells": [dict(cell) for cell in cells],
        "label": label,
        "columns": columns,
        "width": width,
        "aspect": aspect,
        "cover": cover,
        "scroll": scroll,
        "linked": None if linked is None else dict(linked),
        "keys": on_act is not None,
        "taken": _taken().last.get(key, 0),
    }
    result = component("grid", "zoom", "acts")(
        data=data,
        key=key,
        on_open_change=on_open or (lambda: None),
        on_turn_change=on_turn or (lambda: None),
        on_act_change=on_act or (lambda: None),
    )
    return result.open
