"""How a measure is spread over the maps, and a brush over it that sets the range."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from xattn.app.navigation import selection
from xattn.app.pages.gallery.widgets import KEY, brush_key, restart
from xattn.pictures.design import DARK, LIGHT

if TYPE_CHECKING:
    import altair as alt

    from xattn.app.navigation.maps_table import Measure
    from xattn.app.navigation.selection import View
    from xattn.packs.reader import Pack

HEIGHT = 96  # pixels


def histogram(pack: Pack, view: View, measure: Measure) -> None:
    """Show the bars, if there are some; those in the view's range are coloured."""
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
    import altair as alt  # takes its time, and few open the filters

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
        .properties(height=HEIGHT, description=f"How many maps have which {measure.name}")
    )


def _brushed(key: str, measure: Measure) -> None:
    """Set the range to what the brush covers; a brush over all, or none, is no range."""
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
