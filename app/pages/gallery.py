"""The gallery: a pack's maps as pages of pictures, sorted, filtered and searched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from xattn.app import state
from xattn.app.components import grid, sent
from xattn.app.navigation import address, last_view, selection
from xattn.app.navigation.selection import ALL, MAPS, NAMES, RIGHT, SHOWS, SIZES, Choices, View
from xattn.app.pictures import export
from xattn.app.pictures.rendering import Look, blank_maps, legends, overlay_url, photo_url
from xattn.app.state import Context, plain, short
from xattn.pictures.contact_sheet import legends_html
from xattn.pictures.explained import probability_text

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

SIDE = 240  # pixels of a picture's longer side
# Before every key of this page in the session: the names of a view are keys of other pages' widgets, and
# a value whose widget this page does not show would stay in their place.
KEY = "gallery."
CELLS = f"{KEY}cells"


def page(context: Context) -> None:
    """Show one page of the open pack."""
    pack = context.pack
    assert pack is not None, "main.py calls this page with a pack"
    table = selection.table(pack)
    view, messages, seeded = _from_url(pack, table.choices)
    st.title(plain(pack.name), anchor=False)
    if messages:
        st.warning("  \n".join(map(plain, messages)))
    view = _toolbar(view, table.choices)
    found = selection.selected(pack, view)
    count = selection.pages(len(found), view.size)
    beyond = view.page > count
    if beyond:
        view = replace(view, page=count)
        _to_widgets(view, ["page"])
    start = (view.page - 1) * view.size
    shown = found[start : start + view.size]
    view = _line(pack, view, len(found), start, len(shown))
    text = selection.to_text(view, table.choices)
    if shown.empty:
        _nothing(table.choices)
    else:
        if view.show == "overlay":
            st.html(legends_html(legends(pack, list(shown.index), Look(side=SIDE))))
        last = _last(pack)
        cells = [
            _cell(pack, view, table.choices, text, last, entry_id, row)
            for entry_id, row in zip(shown.index, shown.to_dict("records"), strict=True)
        ]
        label = f"Maps, page {view.page} of {count}"
        grid(
            cells,
            CELLS,
            label=label,
            scroll=view.page,
            on_open=partial(_opened, pack, table.choices),
            on_turn=_turned,
        )
        if note := blank_maps(pack, shown.index) if view.show == "overlay" else "":
            st.caption(plain(note))
        _below(pack, view, found, count)
    if messages or beyond or not seeded:
        _to_url(pack, view, table.choices)
    last_view.remember(pack, text)


# ---------------------------------------------------------------------- the URL


def _from_url(pack: Pack, choices: Choices) -> tuple[View, list[str], bool]:
    """The view, what was wrong with the URL, and whether it is the URL's and not the widgets'.

    It is where the URL is a new one. The address of an image that was opened here, on this page, is
    what Back may lead to; its ``view`` is this page's own. The menu's address has no parameters: it
    leads to the view that was left.
    """
    url = _url()
    subject = (pack.id, pack.version)
    known = f"{KEY}sort" in st.session_state and st.session_state.get("_gallery") == subject
    st.session_state["_gallery"] = subject
    if not address.is_new("gallery", url, known):
        return _from_widgets(choices), [], False
    messages: list[str] = []
    left = "" if url or address.back() else last_view.remembered(pack)
    if left or "view" in url:
        view = selection.from_text(left or url["view"][-1], choices)
    else:
        view, messages = selection.parse(url, choices)
    _to_widgets(view, NAMES)
    address.wrote("gallery", url)
    return view, messages, not left


def _url() -> dict[str, list[str]]:
    """The URL's parameters but the pack."""
    return {name: st.query_params.get_all(name) for name in st.query_params if name != "pack"}


def _to_widgets(view: View, names: Iterable[str]) -> None:
    """Put these of the view's values where the next widgets read them."""
    for name in names:
        value = getattr(view, name)
        st.session_state[KEY + name] = list(value) if isinstance(value, tuple) else value


def _from_widgets(choices: Choices) -> View:
    kept = {name: KEY + name for name in NAMES}
    values = {n: st.session_state[key] for n, key in kept.items() if key in st.session_state}
    for name in ("label", "predicted"):
        values[name] = tuple(values.get(name) or ())
    values["q"] = " ".join(str(values.get("q") or "").split())[: selection.SEARCH_LENGTH]
    return replace(selection.defaults(choices), **values)


def _to_url(pack: Pack, view: View, choices: Choices) -> None:
    """Write the view into the URL, unless it is there."""
    wanted = view.params(choices)
    address.wrote("gallery", wanted)
    if _url() != wanted:
        st.query_params.from_dict({"pack": pack.id, **wanted})


def _last(pack: Pack) -> str | None:
    """The image that was opened last, to be marked when the person comes back."""
    of, image_id = st.session_state.get("_opened", (None, None))
    return st.query_params.get("image", image_id if of == pack.id else None)


# ---------------------------------------------------------------------- what a person does


def _opened(pack: Pack, choices: Choices) -> None:
    """Go to the image, before this page runs again."""
    opened = sent(CELLS, "open")
    if opened in pack.entries.index:
        text = selection.to_text(_from_widgets(choices), choices)
        image_id = pack.entries.at[opened, "image_id"]
        st.session_state["_opened"] = (pack.id, image_id)
        last_view.remember(pack, text)
        state.go("image", image=image_id, view=text or None)


def _turned() -> None:
    by = sent(CELLS, "turn")
    if by is not None:
        _turn(by)


def _turn(by: Any) -> None:
    _go(max(1, st.session_state.get(f"{KEY}page", 1) + (1 if by == 1 else -1)))


def _jump() -> None:
    _go(int(st.session_state[f"{KEY}jump"]))


def _restart() -> None:
    _go(1)


def _go(number: int) -> None:
    st.session_state[f"{KEY}page"] = number


def _clear() -> None:
    """No filter; the next run reads the widgets from these values."""
    _to_widgets(View(), ("q", "label", "predicted", "right", "low", "high", "page"))


# ---------------------------------------------------------------------- the page's parts


def _toolbar(view: View, choices: Choices) -> View:
    """The widgets; returns the view that they say. Their values are in the session already."""
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    bar.text_input(
        "Search",
        key=f"{KEY}q",
        placeholder="File, class or id",
        max_chars=selection.SEARCH_LENGTH,
        on_change=_restart,
        width="stretch",
    )
    if len(choices.methods) > 1:
        methods = {m: _method_name(m, choices) for m in (*choices.methods, ALL)}
        _choice(bar.selectbox, "Method", methods, "method", width=160)
    _choice(bar.selectbox, "Sort by", choices.sorts, "sort", width=180)
    orders = _order_names(st.session_state[f"{KEY}sort"])
    _choice(bar.selectbox, "Order", orders, "order", width=150)
    with bar.popover(f"Filters ({view.filters})" if view.filters else "Filters"):
        _filters(choices)
    return _from_widgets(choices)


def _choice(
    widget: Callable[..., Any], label: str, names: Mapping[str, str], key: str, **rest: Any
) -> None:
    """A widget to choose from ``{value: name}``; another choice starts at the first page."""
    options, name = list(names), names.__getitem__
    widget(label, options, key=KEY + key, format_func=name, on_change=_restart, **rest)


def _method_name(method: str, choices: Choices) -> str:
    if method == ALL:
        return "All methods"
    return f"{method} (sanity row)" if method in choices.controls else method


def _order_names(sort: str) -> dict[str, str]:
    if sort == "pack":
        return {"asc": "First to last", "desc": "Last to first"}
    if sort in selection.SORTS:
        return {"asc": "A to Z", "desc": "Z to A"}
    return {"asc": "Lowest first", "desc": "Highest first"}


def _filters(choices: Choices) -> None:
    for name, title, classes in (
        ("label", "True class", choices.labels),
        ("predicted", "Predicted class", choices.predicted),
    ):
        if classes:
            _choice(st.multiselect, title, classes, name, placeholder="Any class")
    if choices.judged:
        _choice(st.radio, "Prediction", RIGHT, "right")
    if choices.several:
        _choice(st.radio, "Maps of a photo", MAPS, "maps")
    if choices.measures:
        names = {key: measure.name for key, measure in choices.measures.items()}
        _choice(st.selectbox, "Range of", names, "measure")
        measure = choices.measures[st.session_state[f"{KEY}measure"]]
        low, high = st.columns(2)
        for column, name, title, end in (
            (low, "low", "From", measure.low),
            (high, "high", "To", measure.high),
        ):
            column.number_input(
                title,
                key=KEY + name,
                value=None,
                placeholder=f"{end:.4g}",
                format="%g",
                on_change=_restart,
            )
        if measure.higher_is_better is not None:
            better = "Higher" if measure.higher_is_better else "Lower"
            st.caption(plain(f"{better} is better. {measure.formula}"))
    st.selectbox("Maps a page", list(SIZES), key=f"{KEY}size", on_change=_restart)


def _line(pack: Pack, view: View, count: int, start: int, shown: int) -> View:
    """How many maps there are, and whether maps or photos are shown; returns the view."""
    text = _count(count, start, shown)
    if view.filters:
        text += f", filtered from {len(selection.selected(pack, view.unfiltered())):,}"
    line = st.container(horizontal=True, vertical_alignment="center", gap="small")
    line.caption(text, width="content")
    if view.filters:
        line.button("Clear filters", key=f"{KEY}clear", on_click=_clear, type="tertiary")
    line.space("stretch")
    show = line.segmented_control(
        "Picture",
        list(SHOWS),
        key=f"{KEY}show",
        format_func=lambda s: SHOWS[s],
        required=True,
        label_visibility="collapsed",
    )
    return replace(view, show=show)


def _count(count: int, start: int, shown: int) -> str:
    """How many maps there are, and which of them the page shows if not all."""
    if count == 0:
        return "No maps"
    maps = "1 map" if count == 1 else f"{count:,} maps"
    if shown == count:
        return maps
    if shown == 1:
        return f"Map {start + 1:,} of {count:,}"
    return f"{start + 1:,} to {start + shown:,} of {maps}"


def _nothing(choices: Choices) -> None:
    with st.container(border=True):
        st.markdown("**No map passes these filters.**")
        st.caption(
            "Search for less, or widen the range. A map without a value of the chosen measure is "
            "never in its range."
        )
        st.button("Show all maps", key=f"{KEY}all_maps", on_click=_clear)


def _cell(
    pack: Pack,
    view: View,
    choices: Choices,
    text: str,
    last: str | None,
    entry_id: str,
    row: dict[str, Any],
) -> dict[str, Any]:
    explained = short(row["target_name"])
    name = row["title"]
    number = probability_text(row["probability"], row["is_value"])
    lines = [number + (f" · {row['method']}" if view.method == ALL else "")]
    if row["label_name"]:
        lines.append(f"true: {short(row['label_name'])}")
    lines.append(name)
    for key in dict.fromkeys(
        (view.sort, view.measure if view.low is not None or view.high is not None else "")
    ):
        if key == "confidence" and row["measure:confidence"] == row["probability"]:
            continue  # it stands there already
        if key in choices.measures and key != "probability":
            lines.append(f"{choices.measures[key].name}: {_figure(key, row[f'measure:{key}'])}")
    if view.show == "photo":
        source, alt = photo_url(pack, row["image_id"], SIDE), f"Photo {name}"
    else:
        source = overlay_url(pack, entry_id, Look(side=SIDE))
        alt = f"Map by {row['method']} of {explained} on {name}"
    return {
        "id": entry_id,
        "src": source,
        "alt": alt,
        "title": explained,
        "lines": lines,
        "badge": _badge(row["right"]),
        "selected": row["image_id"] == last,
        "href": state.link("image", pack=pack.id, image=row["image_id"], view=text or None),
    }


def _badge(right: Any) -> dict[str, str] | None:
    if right is True:
        return {"text": "Right", "kind": "good"}
    return {"text": "Wrong", "kind": "bad"} if right is False else None


def _figure(key: str, value: float) -> str:
    if value != value:
        return "none"
    return f"{value:.1%}" if key == "confidence" else f"{value:.3g}"


def _below(pack: Pack, view: View, found: pd.DataFrame, count: int) -> None:
    """The way to other pages, and files of the selection."""
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    if count > 1:
        _pager(bar, view, count)
    bar.space("stretch")
    with bar.popover("Export"):
        _export(pack, found)
    st.caption(
        "In the pictures the arrow keys move, Enter opens, and Page Up and Page Down turn the page."
    )


def _pager(bar: Any, view: View, count: int) -> None:
    st.session_state[f"{KEY}jump"] = view.page
    for text, by, keys, end in (
        ("Previous", -1, "Shift+Left", 1),
        ("Next", 1, "Shift+Right", count),
    ):
        bar.button(
            text,
            key=KEY + text.lower(),
            on_click=_turn,
            args=(by,),
            disabled=view.page == end,
            shortcut=keys,
        )
    bar.number_input(
        f"Page of {count:,}",
        min_value=1,
        max_value=count,
        key=f"{KEY}jump",
        on_change=_jump,
        width=140,
    )


def _export(pack: Pack, found: pd.DataFrame) -> None:
    """Files are made when they are asked for."""
    st.download_button(
        "CSV of the selection",
        data=lambda: export.maps_csv(pack, found.index),
        file_name=f"{pack.id}.csv",
        mime="text/csv",
        on_click="ignore",
        key=f"{KEY}export_csv",
    )
    most = export.MOST_MAPS["html"]
    several = len(found) > most
    st.download_button(
        f"HTML of the first {most} maps" if several else "HTML of the selection",
        data=lambda: export.html(pack, list(found.index[:most])),
        file_name=f"{pack.id}.html",
        mime="text/html",
        on_click="ignore",
        key=f"{KEY}export_html",
    )
    st.caption(
        "The CSV has a line for each map on all pages, with its figures. The HTML opens without a "
        "server."
    )
