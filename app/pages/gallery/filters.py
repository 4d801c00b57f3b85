"""The gallery's search, order and filters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import streamlit as st

from xattn.app import state
from xattn.app.navigation import screen, selection
from xattn.app.navigation.maps_table import SORTS
from xattn.app.navigation.selection import ALL, MAPS, RIGHT, SIZES, Choices, View
from xattn.app.pages.gallery import marking
from xattn.app.pages.gallery.histogram import histogram
from xattn.app.pages.gallery.widgets import KEY, from_widgets, new_range, restart, typed_range
from xattn.app.state import plain, short
from xattn.pictures.words import method_title

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

IN_POPOVER = (
    *("label", "predicted", "right", "maps", "measure", "low", "high", "size"),
    *("tag", "rating", "note"),
)
IN_ORDER = ("method", "sort", "order")
CLASS_ORDERS = {"photos": "Most photos first", "name": "By name"}


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
    state.tell_again(*(KEY + name for name in (*IN_ORDER, "classes", *IN_POPOVER)))
    narrow = screen.narrow()
    if not narrow:
        _order(bar, choices)
    popover = bar.popover("Filters", key=f"{KEY}filters", on_change="rerun")
    if popover.open:
        with popover:
            if narrow:
                _order(st, choices)
            _filters(pack, choices)
            marking.filters(pack, view.tag)
    return from_widgets(choices)


def _order(place: Any, choices: Choices) -> None:
    """Whose maps are shown, in which order; on a narrow screen in the popover of filters."""
    if len(choices.methods) > 1:
        methods = {m: _method_name(m, choices) for m in (*choices.methods, ALL)}
        _choice(place.selectbox, "Method", methods, "method", width=160)
    _choice(place.selectbox, "Sort by", choices.sorts, "sort", width=180)
    orders = _order_names(st.session_state[f"{KEY}sort"])
    _choice(place.selectbox, "Order", orders, "order", width=150)


def _choice(
    widget: Callable[..., Any], label: str, names: Mapping[str, str], key: str, **rest: Any
) -> None:
    """A widget to choose from ``{value: name}``; another choice starts at the first page."""
    options, name = list(names), names.__getitem__
    rest = {"on_change": restart, **rest}
    widget(label, options, key=KEY + key, format_func=name, **rest)


def _counted(classes: Mapping[str, str], photos: Mapping[str, int]) -> dict[str, str]:
    """Classes with their numbers of photos, in the order that was chosen."""
    keys = list(classes)
    if st.session_state.get(f"{KEY}classes") != "name":
        keys.sort(key=lambda key: -photos[key])
    times = Counter(map(short, classes.values()))
    names = {key: short(name) if times[short(name)] == 1 else name for key, name in classes.items()}
    return {key: f"{names[key]} ({photos[key]:,})" for key in keys}


def _method_name(method: str, choices: Choices) -> str:
    if method == ALL:
        return "All methods"
    title = method_title(method)
    return f"{title} (sanity row)" if method in choices.controls else title


def _order_names(sort: str) -> dict[str, str]:
    if sort == "pack":
        return {"asc": "First to last", "desc": "Last to first"}
    if sort in SORTS:
        return {"asc": "A to Z", "desc": "Z to A"}
    return {"asc": "Lowest first", "desc": "Highest first"}


def _filters(pack: Pack, choices: Choices) -> None:
    of_classes = {"label": choices.labels, "predicted": choices.predicted}
    if any(len(classes) > 1 for classes in of_classes.values()):
        st.segmented_control(
            "Order of classes",
            list(CLASS_ORDERS),
            default="photos",
            key=f"{KEY}classes",
            format_func=CLASS_ORDERS.__getitem__,
            required=True,
            label_visibility="collapsed",
        )
    for name, title in (("label", "True class"), ("predicted", "Predicted class")):
        if of_classes[name]:
            counted = _counted(of_classes[name], choices.photos[name])
            _choice(st.multiselect, title, counted, name, placeholder="Any class")
    if choices.judged:
        _choice(st.radio, "Prediction", RIGHT, "right", horizontal=True)
    if choices.several:
        _choice(st.radio, "Maps of a photo", MAPS, "maps", horizontal=True)
    if choices.measures:
        names = {key: measure.title for key, measure in choices.measures.items()}
        _choice(st.selectbox, "Range of", names, "measure", on_change=new_range)
        measure = choices.measures[st.session_state[f"{KEY}measure"]]
        histogram(pack, from_widgets(choices), measure)
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
                on_change=typed_range,
            )
        if measure.about:
            st.caption(plain(measure.about), help=plain(f"Formula: {measure.formula}"))
    st.selectbox("Maps a page", list(SIZES), key=f"{KEY}size", on_change=restart)
