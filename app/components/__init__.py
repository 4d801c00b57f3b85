"""Components that Streamlit lacks, such as the grid of pictures.

A component is a ``.js`` and a ``.css`` file of its name in this folder. What it shows comes in as
data and becomes text by ``textContent``, never HTML.
"""

from __future__ import annotations

import base64
import mimetypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray

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


def _show(
    name: str, key: str, on: Mapping[str, Callable[[], None] | None], *parts: str, **data: Any
) -> Any:
    """Show the component ``name``; ``on`` are its callbacks by what the browser sends."""
    callbacks = {f"on_{what}_change": act or (lambda: None) for what, act in on.items()}
    return component(name, *parts)(data=data, key=key, **callbacks)


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
    taken = _taken().last.get(key, 0)
    _show("keys", key, {"act": on_act}, "acts", keys=list(names), taken=taken)


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
            (:func:`xattn.app.pictures.rendering.map_cells`) tells its value under the pointer. ``{"aspect",
            "subject", "outlines"}``: width over height of the pictures, what they show, so that another
            photo begins unzoomed, and outlines ``{"points": [[x, y]], "own": bool}`` in shares of them.
        on_open: called before the script runs again, without arguments.
        on_turn: as ``on_open``, for page keys inside the grid; ``sent(key, "turn")`` is -1 or 1.
        on_act: as ``on_open``, and photos can be chosen: by x, by the box on a cell, by Ctrl, Cmd or Shift
            and a click. :func:`acts` has ``{"of": photos of this page, "chosen": those of them}``, and for
            the keys of :func:`keys` ``{"key", "photo": the one in focus or None}``; J and K move.
    """
    result = _show(
        "grid",
        key,
        {"open": on_open, "turn": on_turn, "act": on_act},
        "zoom",
        "acts",
        cells=[dict(cell) for cell in cells],
        label=label,
        columns=columns,
        width=width,
        aspect=aspect,
        cover=cover,
        scroll=scroll,
        linked=None if linked is None else dict(linked),
        keys=on_act is not None,
        taken=_taken().last.get(key, 0),
    )
    return result.open  # type: ignore[no-any-return]


def verdict(right: bool | None) -> dict[str, str] | None:
    """The badge of a cell: whether the prediction is right; None where that is not known."""
    if right is None:
        return None
    return {"text": "Right", "kind": "good"} if right else {"text": "Wrong", "kind": "bad"}


def brush(
    photo: str,
    raster: tuple[int, int],
    key: str,
    *,
    subject: str,
    aspect: float,
    mask: str,
    stamp: int,
    regions: Sequence[int],
    label: str,
    alt: str,
    said: str = "",
    on_paint: Any = None,
) -> None:
    """Show a picture that can be painted on; each stroke's end sends the whole mask.

    The arrow keys move a cursor, Enter or Space uses the tool there, [ and ] change the brush's size, E
    erases, Ctrl+Z takes the last stroke back.

    Args:
        photo: URL of the picture that lies below the paint, changed or not.
        raster: rows and columns of the mask; ``aspect``: width over height of the picture.
        subject: what the mask belongs to; with another one, earlier strokes are forgotten.
        mask: the bits of the mask that ``photo`` answers, row by row, in base64.
        stamp: has grown where the page itself changed the mask, and the picture is to follow.
        regions: label, count, label, count, ...: the raster's regions, row by row.
        label: what the whole is called by a screen reader; ``alt``: what the picture shows.
        said: read out when it changes.
        on_paint: called before the script runs again; ``sent(key, "paint")`` is the mask then.
    """
    _show(
        "brush",
        key,
        {"paint": on_paint},
        photo=photo,
        rows=raster[0],
        columns=raster[1],
        subject=subject,
        aspect=aspect,
        mask=mask,
        stamp=stamp,
        regions=list(regions),
        label=label,
        alt=alt,
        said=said,
    )


def film(
    source: str,
    titles: Sequence[str],
    key: str,
    *,
    rate: float = 25.0,
    start: int = 0,
    label: str = "Frame",
    on_rest: Any = None,
) -> None:
    """Show frame after frame; the arrow keys, Home and End move, Space plays and pauses.

    Args:
        source: URL of a frame up to its number, which is put behind it.
        titles: what each frame shows, in words; their number is the number of frames.
        rate: frames a second while playing.
        start: the frame to begin with.
        label: what the slider is called by a screen reader.
        on_rest: called before the script runs again, when the slider has come to rest;
            :func:`resting` of ``key`` is the frame then.
    """
    _show(
        "film",
        key,
        {"rest": on_rest},
        source=source,
        titles=list(titles),
        rate=rate,
        start=start,
        label=label,
    )


def resting(key: str, count: int) -> int | None:
    """The frame that the slider of ``key`` has come to rest at, inside its ``on_rest``."""
    found = sent(key, "rest")
    return found if type(found) is int and 0 <= found < count else None


def matrix(
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    key: str,
    *,
    label: str,
    corner: str = "",
    on_open: Any = None,
) -> None:
    """Show counts; ``sent(key, "open")`` is the id of the cell that was just opened.

    The arrow keys move between cells that hold something, Enter and a click open.

    Args:
        columns: their headings.
        rows: each ``{"title", "cells"}``; a cell is None, or ``{"id", "text", "hint", "share", "kind",
            "selected": bool, "href": str}``: ``share`` in [0, 1] is how strong its ground is, ``kind`` is
            ``right``, ``wrong`` or ``plain``, and ``href`` is where it leads in another tab.
        label: what the whole is called by a screen reader; ``corner``: what stands in the corner.
        on_open: called before the script runs again, without arguments.
    """
    _show(
        "matrix",
        key,
        {"open": on_open},
        columns=list(columns),
        rows=[dict(row) for row in rows],
        label=label,
        corner=corner,
    )


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
) -> None:
    """Show a photo under its patch grid, to pick a patch from.

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
    _show(
        "patches",
        key,
        {"pick": on_pick},
        photo=photo,
        map=map,
        aspect=aspect,
        rows=grid[0],
        columns=grid[1],
        picked=None if picked is None else list(picked),
        label=label,
        alt=alt,
    )


def boxes(
    photo: str,
    found: Sequence[Mapping[str, Any]],
    key: str,
    *,
    aspect: float,
    label: str,
    alt: str,
    draws: bool = False,
    drawn: Sequence[float] | None = None,
    on_open: Any = None,
    on_draw: Any = None,
) -> None:
    """Show a photo under boxes, each a button; a click, or Enter on one, opens it.

    Args:
        photo: URL of the picture; ``aspect``: its width over its height.
        found: each ``{"id", "at", "text", "kind", "selected": bool}``, ``at`` as left, top, right and
            bottom in shares of the photo; kinds ``missed`` and ``candidate`` are dashed.
        label: what the whole is called by a screen reader; ``alt``: what the picture shows.
        draws: whether a drag draws another box, ``drawn``, of which there is one at a time.
        on_open, on_draw: called before the script runs again; ``sent(key, "open")`` is an id, and
            ``sent(key, "draw")`` the box in shares of the photo.
    """
    _show(
        "boxes",
        key,
        {"open": on_open, "draw": on_draw},
        photo=photo,
        boxes=[dict(box) for box in found],
        aspect=aspect,
        label=label,
        alt=alt,
        draws=draws,
        drawn=None if drawn is None else list(drawn),
    )


def picked_patch(key: str, grid: tuple[int, int]) -> tuple[int, int] | None:
    """The patch that was just picked in the picture ``key``: (row, column) from 0."""
    value = sent(key, "pick")
    try:
        row, column = (int(v) for v in value)
    except (TypeError, ValueError):
        return None
    return (row, column) if 0 <= row < grid[0] and 0 <= column < grid[1] else None


def answer(
    key: str,
    *,
    subject: str,
    photos: Sequence[Mapping[str, Any]],
    clip: bool,
    words: Sequence[Mapping[str, Any]],
    after: str,
    methods: Sequence[Mapping[str, str]],
    prompt: Sequence[str],
    word: int,
    method: int,
    label: str,
    on_pick: Any = None,
) -> None:
    """Show an answer beside its photos; the map of the word under the pointer is on them.

    The arrow keys, Home and End go from word to word, Enter keeps one, 1 to 9 choose the method.

    Args:
        subject: what is shown; with another one, the ``word`` and the ``method`` are chosen, by number.
        photos: each ``{"title", "own", "src", "aspect", "maps"}``: ``own`` is True of the photo that the
            page is of, if there are several; ``maps[method][word]`` is None, or has ``src``, the address of
            the photo under the map, and its values (:func:`xattn.app.pictures.rendering.map_cells`), with
            ``most``, the greatest on all photos.
        clip: whether photos are the frames of a clip, in a strip.
        words: each ``{"number", "text", "before", "p", "lost", "shares", "sources"}``: ``before`` is the
            text between it and the word before; for each method ``shares`` has a sentence and
            ``sources`` a number for each token of ``prompt``.
        after: the text after the last word.
        on_pick: called before the script runs again; ``sent(key, "pick")`` is ``{"word", "method"}``.
    """
    _show(
        "answer",
        key,
        {"pick": on_pick},
        subject=subject,
        photos=[dict(photo) for photo in photos],
        clip=clip,
        words=[dict(found) for found in words],
        after=after,
        methods=[dict(found) for found in methods],
        prompt=list(prompt),
        word=word,
        method=method,
        label=label,
    )


LEVELS = 65_535  # of a coordinate, and of a value of a scale


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
        groups: (n,) the group of each point; the eighth and those after it share a colour.
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
    _show("scatter", key, {"choose": on_choose, "open": on_open}, **data)


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


def slide(
    before: tuple[str, str], after: tuple[str, str], *, label: str, alt: str, key: str
) -> None:
    """Show two pictures over each other; the edge moves with the pointer and with the arrow keys.

    Args:
        before: URL and name of the picture on the right of the edge.
        after: of the one on the left.
        label: what the slider is called by a screen reader.
        alt: what the pictures show.
    """
    _show(
        "slide",
        key,
        {},
        before={"src": before[0], "name": before[1]},
        after={"src": after[0], "name": after[1]},
        label=label,
        alt=alt,
    )


# ---------------------------------------------------------------------- Streamlit's own, our way


def download(place: Any, label: str, make: Callable[[], str | bytes], file: str, key: str) -> None:
    """A button for a file, which is made at the click."""
    kind = mimetypes.guess_type(file)[0]
    place.download_button(label, make, file, kind, key=key, on_click="ignore")


def command(line: str) -> None:
    """A command line to be copied."""
    st.code(line, language="sh", wrap_lines=True)


def chosen_row(table: Any, key: str, **columns: Any) -> int | None:
    """Show a table; returns the number of the row that was chosen."""
    event = st.dataframe(
        table,
        hide_index=True,
        width="stretch",
        column_config=columns,
        key=key,
        on_select="rerun",
        selection_mode="single-row",
    )
    return next(iter(event["selection"]["rows"]), None)
