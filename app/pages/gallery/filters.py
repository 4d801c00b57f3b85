"""The gallery's search, order and filters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from xattn.app import state
from xattn.app.pages.gallery import marking
from xattn.app.pages.gallery.marking import (
    KEY,
    brush_key,
    clear,
    drop,
    from_widgets,
    new_range,
    restart,
    typed_range,
)
from xattn.app.state import plain, short
from xattn.app.triage import selection
from xattn.app.triage.maps_table import SORTS
from xattn.app.triage.selection import ALL, MAPS, NOTES, RATINGS, RIGHT, SIZES, Choices, View
from xattn.pictures.design import DARK, LIGHT

if TYPE_CHECKING:
    import altair as alt

    from xattn.app.triage.maps_table import Measure
    from xattn.packs.reader import Pack


LONGEST = 40  # most characters of a chip's text


def chips(view: View, choices: Choices) -> None:
    """Show a row of chips, one for each filter that is set."""
    found = _set(view, choices)
    if not found:
        return
    row = st.container(
        horizontal=True, vertical_alignment="center", gap="xsmall", key=f"{KEY}chips"
    )
    for text, name, value in found:
        shown = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
        row.button(
            plain(shown),
            key=f"{KEY}chip {name} {value}",
            on_click=drop,
            args=(name, value),
            icon=":material/close:",
            icon_position="right",
        )
    row.button("Clear all", key=f"{KEY}clear", on_click=clear, type="tertiary")


def _set(view: View, choices: Choices) -> list[tuple[str, str, str]]:
    """(the chip's text, the filter's name in the view, its value) for each filter that is set."""
    found = [(f"“{view.q}”", "q", "")] if view.q else []
    for name, word, names in (
        ("label", "true", choices.labels),
        ("predicted", "predicted", choices.predicted),
    ):
        found += [(f"{word}: {short(names[key])}", name, key) for key in getattr(view, name)]
    if view.right != "any":
        found.append((RIGHT[view.right], "right", ""))
    if view.low is not None or view.high is not None:
        found.append((f"{choices.measures[view.measure].name}: {_range(view)}", "measure", ""))
    found += [(f"tag: {tag}", "tag", tag) for tag in view.tag]
    if view.rating:
        found.append((RATINGS[view.rating], "rating", ""))
    if view.note != "any":
        found.append((NOTES[view.note], "note", ""))
    if view.only:
        found.append(("chosen photos", "only", ""))
    return found


def _range(view: View) -> str:
    if view.low is None:
        return f"to {view.high:g}"
    return f"from {view.low:g}" if view.high is None else f"{view.low:g} to {view.high:g}"


HEIGHT = 96  # pixels


def histogram(pack: Pack, view: View, measure: Measure) -> None:
    """Show the histogram, if there is one; bars in the view's range are coloured."""
    counts = selection.histogram(pack, view)
    if not counts:
        return
    width = (measure.high - measure.low) / len(counts)
    low = -math.inf if view.low is None else view.low
    high = math.inf if view.high is None else view.high
    starts = [measure.low + i * width for i in range(len(counts))]
    table = pd.DataFrame(
        {
            "start": starts,
            "end": [start + width for start in starts],
            "maps": counts,
            "inside": [start + width > low and start < high for start in starts],
        }
    )
    key = brush_key(view.measure)
    st.container(key=f"{KEY}histogram").altair_chart(
        _bars(table, measure),
        width="stretch",
        key=key,
        on_select=lambda: _brushed(key, measure),
        selection_mode="brush",
    )


def _bars(table: pd.DataFrame, measure: Measure) -> alt.Chart:
    import altair as alt  # a slow import, and few people open the filters

    colours = DARK if st.context.theme.type == "dark" else LIGHT
    return (
        alt.Chart(table)
        .mark_bar(binSpacing=1)
        .encode(
            x=alt.X(
                "start:Q",
                title=None,
                bin="binned",
                scale=alt.Scale(domain=[measure.low, measure.high], nice=False),
                axis=alt.Axis(tickCount=5, grid=False, format=".3~g"),
            ),
            x2="end:Q",
            y=alt.Y("maps:Q", axis=None),
            color=alt.Color(
                "inside:N",
                legend=None,
                scale=alt.Scale(domain=[True, False], range=[colours.accent, colours.line]),
            ),
            tooltip=[
                alt.Tooltip("start:Q", title="from", format=".4~g"),
                alt.Tooltip("end:Q", title="to", format=".4~g"),
                alt.Tooltip("maps:Q", format=","),
            ],
        )
        .add_params(alt.selection_interval(name="brush", encodings=["x"]))
        .properties(height=HEIGHT, description=f"Number of maps by {measure.name}")
    )


def _brushed(key: str, measure: Measure) -> None:
    """Set the range to what the brush covers; a brush over everything or nothing clears the range."""
    state: Any = st.session_state.get(key)
    ends = state["selection"].get("brush", {}).get("start") if state else None
    low = high = None
    if ends:
        digits = 2 - math.floor(math.log10(measure.high - measure.low))
        first, last = (round(float(end), digits) for end in sorted(ends))
        low = first if first > measure.low else None
        high = last if last < measure.high else None
    st.session_state[f"{KEY}low"], st.session_state[f"{KEY}high"] = low, high
    restart()


IN_POPOVER = (
    *("label", "predicted", "right", "maps", "measure", "low", "high", "size"),
    *("tag", "rating", "note"),
)
IN_ORDER = ("method", "sort", "order")
CLASS_ORDERS = {"photos": "Most photos first", "name": "By name"}


def toolbar(pack: Pack, view: View, choices: Choices) -> View:
    """Show the widgets and return the view that they define. Their values are already in the session."""
    bar = st.container(
        horizontal=True, vertical_alignment="bottom", gap="small", key=f"{KEY}toolbar"
    )
    bar.text_input(
        "Search",
        key=f"{KEY}q",
        placeholder="File, class or id",
        max_chars=selection.SEARCH_LENGTH,
        on_change=restart,
        width="stretch",
    )
    state.restore_widgets(*(KEY + name for name in (*IN_ORDER, "classes", *IN_POPOVER)))
    _order(bar, choices, pack)
    popover = bar.popover("Filters", key=f"{KEY}filters", on_change="rerun")
    if popover.open:
        with popover:
            _filters(pack, choices)
            marking.filters(pack, view.tag)
    return from_widgets(choices)


def _order(place: Any, choices: Choices, pack: Pack) -> None:
    """Choose the method and the order of maps."""
    if len(choices.methods) > 1:
        methods = {m: _method_name(m, choices, pack) for m in (*choices.methods, ALL)}
        _choice(place.selectbox, "Method", methods, "method", width=_width(methods))
    _choice(
        place.selectbox,
        "Sort by",
        choices.sorts,
        "sort",
        on_change=_sorted,
        width=_width(choices.sorts),
    )
    orders = _order_names(st.session_state[f"{KEY}sort"])
    _choice(place.selectbox, "Order", orders, "order", width=150)


def _width(names: Mapping[str, str]) -> int:
    """The width in pixels at which a box shows the longest name, within limits."""
    return min(max(60 + 8 * max(map(len, names.values())), 150), 330)


def _sorted() -> None:
    if (order := selection.first_order(st.session_state[f"{KEY}sort"])) != "asc":
        st.session_state[f"{KEY}order"] = order
    restart()


def _choice(
    widget: Callable[..., Any], label: str, names: Mapping[str, str], key: str, **rest: Any
) -> None:
    """A widget to choose from ``{value: name}``; a new choice leads back to the first page."""
    options, name = list(names), names.__getitem__
    rest = {"on_change": restart, **rest}
    widget(label, options, key=KEY + key, format_func=name, **rest)


def _counted(classes: Mapping[str, str], photos: Mapping[str, int]) -> dict[str, str]:
    """Classes with their numbers of photos, in the chosen order."""
    keys = list(classes)
    if st.session_state.get(f"{KEY}classes") != "name":
        keys.sort(key=lambda key: -photos[key])
    times = Counter(map(short, classes.values()))
    names = {key: short(name) if times[short(name)] == 1 else name for key, name in classes.items()}
    return {key: f"{names[key]} ({photos[key]:,})" for key in keys}


def _method_name(method: str, choices: Choices, pack: Pack) -> str:
    if method == ALL:
        return "All methods"
    title = pack.title_of(method)
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
    st.selectbox("Maps per page", list(SIZES), key=f"{KEY}size", on_change=restart)
