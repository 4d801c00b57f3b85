"""Components that Streamlit lacks, such as the grid of pictures.

A component is a ``.js`` file and a ``.css`` file in this folder. It receives its content as data and
inserts it as ``textContent``, never as HTML.
"""

from __future__ import annotations

import base64
import mimetypes
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from xattn.app import state

TAKEN = "_acts"  # the session's key of its :class:`_Taken`


@cache
def component(name: str, *parts: str) -> Any:
    """The component ``name`` of this folder, registered once; its root is ``<div class=name>``.

    ``parts`` are files in the same folder with functions and rules that the component uses; every component
    includes ``element.js``.
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
    """Show the component ``name``; ``on`` maps the names of what the browser sends to callbacks."""
    callbacks = {f"on_{what}_change": act or (lambda: None) for what, act in on.items()}
    return component(name, *parts)(data=data, key=key, **callbacks)


def sent_value(key: str, name: str) -> Any:
    """What the component ``key`` sent as ``name``, for use in its callback.

    None if Streamlit has already forgotten the component, because a click interrupted the run that would
    have shown it.
    """
    return getattr(st.session_state.get(key), name, None)


class _Taken:
    """The last action processed for each component; two runs of a session may be under way at once."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.last: dict[str, int] = {}


def _taken() -> _Taken:
    found: _Taken = st.session_state.setdefault(TAKEN, _Taken())
    return found


def key_actions(key: str) -> Iterator[dict[str, Any]]:
    """Yield the user's keyboard actions in the component with the id ``key``, each once and in order.

    Call this in the component's ``on_act``.

    An action counts as processed when it is yielded. In the loop over the actions, do not read the session
    or call functions that Streamlit caches: if the next action has already arrived, Streamlit ends the
    callback there, and the current action would be lost.
    """
    taken, found = _taken(), sent_value(key, "act") or ()
    with taken.lock:
        for act in found:
            number = act.get("n") if isinstance(act, dict) else None
            if isinstance(number, int) and number > taken.last.get(key, 0):
                taken.last[key] = number
                yield act


def keys(names: Sequence[str], key: str, on_act: Any) -> None:
    """Listen to keys on a page without a grid; :func:`key_actions` yields them as ``{"key": name}``.

    Args:
        names: some of "1" to "9", "j", "k", "x", "undo" (Z), "redo" (Shift+Z) and "escape".
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
    rows: int = 0,
    width: int | None = None,
    aspect: float = 4 / 3,
    cover: bool = False,
    scroll: int = 0,
    linked: Mapping[str, Any] | None = None,
    on_open: Any = None,
    on_turn: Any = None,
    on_act: Any = None,
) -> str | None:
    """Show pictures with captions; returns the id of the cell that was just opened.

    The arrow keys, Home and End move the focus; Enter or a click opens a cell. Pictures load when they
    become visible.

    Args:
        cells: each ``{"id", "src", "bare", "alt", "title", "value", "lines": [str], "badge": {"text",
            "kind"} | None, "selected": bool, "href": str}``; only ``id``, ``src`` and ``title`` are
            required. ``bare`` is the URL of the photo without its map, which is shown while the pointer is
            over the picture; ``value`` is shown beside the title; ``href`` is the address for opening the
            cell in another tab. The kind of a badge is ``good``, ``bad`` or ``plain``. With ``on_act``, a
            cell also has ``photo`` (cells with the same photo are chosen together), ``chosen`` (whether
            they are chosen) and ``marks`` (texts on the picture). In a table, a cell without ``src`` shows
            only its title, as the heading of a row if it has ``"wide": True``; a photo beside n rows has
            ``"span": 2 * n``.
        label: the grid's name for screen readers.
        columns: the number of columns or, with ``width``, their largest number; by default, all that fit.
        rows: for a table with exactly ``columns`` columns, the number of rows, each with a heading, that
            should fit on a screen.
        width: smallest width of a cell in pixels; by default 168, or 132 on a narrow screen.
        aspect: width over height of the area for a picture.
        cover: whether pictures fill this area and are cropped; otherwise they fit into it.
        scroll: when this changes, the grid scrolls to its top.
        linked: ``{"aspect", "subject", "outlines"}`` for pictures of one photo, which zoom and pan together
            and show the value of a cell's ``map`` (:func:`xattn.app.pictures.rendering.map_cells`) under
            the pointer. ``aspect`` is their width over their height; if ``subject`` changes, the zoom is
            reset; an outline is ``{"points": [[x, y]], "own": bool}`` in fractions of the picture.
        on_open: called before the script runs again, without arguments.
        on_turn: called like ``on_open`` if a key leads beyond the grid; ``sent_value(key, "turn")`` is -1
            or 1.
        on_act: called like ``on_open``; if given, X, the box on a cell, or a click with Ctrl, Cmd or Shift
            chooses photos, and J and K move the focus. :func:`key_actions` then yields ``{"of": all photos
            on this page, "chosen": the chosen ones}`` after a choice, and ``{"key", "photo": the photo in
            focus or None}`` after any other key of :func:`keys`.
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
        rows=rows,
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
    """The badge of a cell: whether the prediction is right; None if that is unknown."""
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
    """Show a picture that can be painted on; the whole mask is sent at the end of each stroke.

    The arrow keys move a cursor, Enter or Space uses the tool at the cursor, [ and ] change the size of the
    brush, E erases, and Ctrl+Z undoes the last stroke.

    Args:
        photo: URL of the picture below the paint, which is the original photo or a changed one.
        raster: rows and columns of the mask; ``aspect``: width over height of the picture.
        subject: identifies the photo that the mask belongs to; if it changes, earlier strokes are
            forgotten.
        mask: the mask with which ``photo`` was made; its bits are given row by row, in base64.
        stamp: a number that the page increases when it changes the mask itself, so that the picture shows
            the new mask.
        regions: the regions of the raster as runs of cells, row by row: label, count, label, count, ...
        label: the name for screen readers; ``alt``: what the picture shows.
        said: a text that screen readers read out when it changes.
        on_paint: called before the script runs again; ``sent_value(key, "paint")`` is then the mask.
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
    """Show a film frame by frame; the arrow keys, Home and End change the frame, Space plays and pauses.

    Args:
        source: the URL of a frame up to its number, which the component appends.
        titles: what each frame shows, in words, one per frame.
        rate: frames per second while playing.
        start: the frame to start with.
        label: the slider's name for screen readers.
        on_rest: called before the script runs again, when the slider stops;
            :func:`stopped_frame` of ``key`` is then the frame.
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


def stopped_frame(key: str, count: int) -> int | None:
    """The frame at which the slider ``key`` stopped, for use in its ``on_rest``."""
    found = sent_value(key, "rest")
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
    """Show a matrix of counts; ``sent_value(key, "open")`` is the id of the cell that was just opened.

    The arrow keys move between cells that are not empty; Enter or a click opens one.

    Args:
        columns: the column headings.
        rows: each ``{"title", "cells"}``; a cell is None, or ``{"id", "text", "hint", "share", "kind",
            "selected": bool, "href": str}``: ``share`` in [0, 1] sets the strength of its background,
            ``kind`` is ``right``, ``wrong`` or ``plain``, and ``href`` is the address for opening the cell
            in another tab.
        label: the name for screen readers; ``corner``: the text in the corner.
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
    """Show a photo with its grid of patches, of which one can be picked.

    The arrow keys move a cursor; Home and End move it to the ends of its row or, with Ctrl, of the whole
    grid. A patch is picked when the cursor rests on it, or at once with Enter; its row and column are read
    out. A slider fades the map.

    Args:
        photo: URL of the picture, which the grid divides evenly.
        grid: rows and columns; ``aspect``: width over height of the photo, needed before it has loaded.
        map: URL of a picture with one pixel per patch, laid over the photo.
        picked: the patch that is outlined, (row, column) from 0.
        label: the name for screen readers; ``alt``: what the picture shows.
        on_pick: called before the script runs again; :func:`picked_patch` of ``key`` is then the patch.
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
    """Show a photo with boxes over it; the boxes are buttons, and a click or Enter opens one.

    Args:
        photo: URL of the picture; ``aspect``: its width over its height.
        found: each ``{"id", "at", "text", "kind", "selected": bool}``; ``at`` is (left, top, right, bottom)
            in fractions of the photo, and boxes of the kinds ``missed`` and ``candidate`` are dashed.
        label: the name for screen readers; ``alt``: what the picture shows.
        draws: whether the person can draw a box by dragging; only the last one, ``drawn``, is kept.
        on_open, on_draw: called before the script runs again; ``sent_value(key, "open")`` is then the id of
            the opened box, and ``sent_value(key, "draw")`` is the drawn box in fractions of the photo.
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
    value = sent_value(key, "pick")
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
    """Show an answer beside its photos, which show the map of the word under the pointer.

    The arrow keys, Home and End go from word to word, Enter selects one, and 1 to 9 choose the method.

    Args:
        subject: identifies what is shown; if it changes, the word with the number ``word`` and the method
            with the number ``method`` are selected.
        photos: each ``{"title", "own", "src", "aspect", "maps"}``: ``own`` is True for the page's own photo
            if there are several; ``maps[method][word]`` is None or a dictionary with ``src`` (the URL of
            the map over the photo), the values of the map (:func:`xattn.app.pictures.rendering.map_cells`)
            and ``most`` (the largest value on all photos).
        clip: whether the photos are frames of a clip, shown in a strip.
        words: each ``{"number", "text", "before", "p", "lost", "shares", "sources"}``: ``before`` is the
            text between the previous word and this one; ``shares`` has a sentence for each method, and
            ``sources`` has, for each method, a number for each token of ``prompt``.
        after: the text after the last word.
        on_pick: called before the script runs again; ``sent_value(key, "pick")`` is ``{"word", "method"}``.
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


LEVELS = 65_535  # levels of a coordinate and of a scale's value


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
    turn: int = 0,
    on_choose: Any = None,
    on_open: Any = None,
) -> None:
    """Show photos as points, of which a person can choose some.

    ``sent_value(key, "choose")`` is ``{"points", "more"}``: ``points`` are the numbers of the chosen
    points, and ``more`` tells whether the person changed the previous choice instead of choosing anew. In
    the map, the arrow keys go from point to point or, with Shift, draw a rectangle. The space bar chooses a
    point, Enter opens it (``sent_value(key, "open")`` is its number), and Escape clears the choice.

    Args:
        points: (n, 2), in any range; both axes are drawn to the same scale.
        ids: the ids of the photos; ``picture`` and a percent-encoded id together are the URL of a picture.
        label: the name for screen readers.
        words: up to three columns of n texts each, shown beside a point's picture.
        legend: each group as ``{"name", "kind"}``; a kind is ``class``, ``rest``, ``good`` or ``bad``.
        groups: (n,) the group of each point; groups from the eighth on share one colour.
        scale: ``{"name", "low", "high"}`` of the colour scale that shows ``values`` instead of groups;
            these are (n,) in [0, 1], NaN for a point without a value.
        chosen: the points that are chosen when the map is first shown and whenever ``turn`` changes; in
            between, only the person changes the choice.
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
        "turn": turn,
    }
    if groups is not None:
        data["groups"] = _packed(groups.astype(np.uint16))
    if scale is not None and values is not None:
        known = np.nan_to_num(values, nan=0.0) * (LEVELS - 1) + 1
        data["scale"] = dict(scale)
        data["values"] = _packed(np.where(np.isfinite(values), known, 0).astype(np.uint16))
    _show("scatter", key, {"choose": on_choose, "open": on_open}, **data)


def _levels(points: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Both coordinates on one scale, with the shorter axis centred; y is flipped to point downwards."""
    low, high = points.min(0), points.max(0)
    span = float((high - low).max()) or 1.0
    placed = (points - (low + high) / 2) / span * [1, -1] + 0.5
    return np.round(np.clip(placed, 0, 1) * LEVELS).astype(np.uint16)


def _packed(values: NDArray[np.uint16]) -> str:
    """Two bytes per value, little-endian, in base64."""
    return base64.b64encode(np.ascontiguousarray(values, "<u2").tobytes()).decode("ascii")


def _coded(column: Sequence[str]) -> list[str] | dict[str, Any]:
    """A column of texts; if few texts repeat often, these texts and the index of each point's text."""
    known = list(dict.fromkeys(column))
    if len(known) > min(len(column) // 2, LEVELS):
        return list(column)
    number = {text: i for i, text in enumerate(known)}
    return {"texts": known, "at": _packed(np.array([number[t] for t in column], np.uint16))}


def slide(
    before: tuple[str, str], after: tuple[str, str], *, label: str, alt: str, key: str
) -> None:
    """Show one picture over another; the pointer and the arrow keys move the edge between them.

    Args:
        before: URL and name of the picture to the right of the edge.
        after: URL and name of the picture to the left of the edge.
        label: the slider's name for screen readers.
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


# ---------------------------------------------------------------------- Streamlit's widgets, adapted


def download(place: Any, label: str, make: Callable[[], str | bytes], file: str, key: str) -> None:
    """A download button; the file is made when it is clicked."""
    kind = mimetypes.guess_type(file)[0]
    place.download_button(label, make, file, kind, key=key, on_click="ignore")


def command(line: str) -> None:
    """Show a command line that can be copied."""
    st.code(line, language="sh", wrap_lines=True)


def explain_command(name: str) -> None:
    """Show the command line that writes a pack with the data for all pages to the folder ``name`` of the
    root."""
    command(
        "xattn explain PHOTOS --labels folders --classes predicted,label --features --output "
        + shlex.quote(str(state.settings().root / name))
    )


def table(rows: Any, columns: Mapping[str, Any] | None = None) -> None:
    """Show a table at its whole height; ``columns`` are Streamlit's column configurations."""
    st.dataframe(rows, hide_index=True, width="stretch", height="content", column_config=columns)


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
