"""The gallery's search, order and filters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import streamlit as st

from xattn.app.navigation import selection
from xattn.app.navigation.maps_table import SORTS
from xattn.app.navigation.selection import ALL, MAPS, RIGHT, SIZES, Choices, View
from xattn.app.pages.gallery import marking
from xattn.app.pages.gallery.widgets import KEY, from_widgets, restart
from xattn.app.state import plain

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


def toolbar(pack: Pack, view: View, choices: Choices) -> View:
    """The widgets; returns the view that they say. Their values are in the session already."""
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    bar.text_input(
        "Search",
        key=f"{KEY}q",
        placeholder="File, class or id",
        max_chars=selection.SEARCH_LENGTH,
        on_change=restart,
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
        marking.filters(pack, view.tag)
    return from_widgets(choices)


def _choice(
    widget: Callable[..., Any], label: str, names: Mapping[str, str], key: str, **rest: Any
) -> None:
    """A widget to choose from ``{value: name}``; another choice starts at the first page."""
    options, name = list(names), names.__getitem__
    widget(label, options, key=KEY + key, format_func=name, on_change=restart, **rest)


def _method_name(method: str, choices: Choices) -> str:
    if method == ALL:
        return "All methods"
    return f"{method} (sanity row)" if method in choices.controls else method


def _order_names(sort: str) -> dict[str, str]:
    if sort == "pack":
        return {"asc": "First to last", "desc": "Last to first"}
    if sort in SORTS:
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
                on_change=restart,
            )
        if measure.higher_is_better is not None:
            better = "Higher" if measure.higher_is_better else "Lower"
            st.caption(plain(f"{better} is better. {measure.formula}"))
    st.selectbox("Maps a page", list(SIZES), key=f"{KEY}size", on_change=restart)
