"""The curves of methods: the mean score while pixels go or come."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from xattn.app.pages.compare.colours import DASHES, method_colour, method_legend
from xattn.app.pages.compare.leaderboard_file import Board
from xattn.app.pages.compare.method_choice import methods_box
from xattn.app.state import plain


def curves_tab(board: Board) -> None:
    """Show a chart for every kind of curve that was measured."""
    with st.spinner("Drawing intervals", show_time=True):
        charts = board.curves
    if not charts:
        st.info(
            "This comparison measured no curves. Run xattn compare with --metrics "
            "insertion-deletion, or direct, to see how the score falls as pixels go."
        )
        return
    names = list(board.results.methods)
    there = {names[int(m)] for chart in charts for m in chart["lines"]}
    chosen = methods_box(board, "lines", [name for name in board.ranked if name in there])
    if not chosen:
        st.info("No method is chosen. Choose one or more above.")
        return
    for chart in charts:
        lines = {names[int(m)]: line for m, line in chart["lines"].items()}
        shown = [name for name in chosen if name in lines]
        rows = [
            {"method": name, "x": x, "score": mean, "lo": lo, "hi": hi}
            for name in shown
            for x, mean, lo, hi in zip(chart["x"], *lines[name][:3], strict=True)
            if mean is not None
        ]
        if rows:
            st.subheader(plain(chart["title"]), anchor=False)
            lined = _lines(pd.DataFrame(rows), shown, chart["axis"], board)
            about = f"{chart['title']}: mean score by {', '.join(shown)}, with 95 % intervals"
            st.altair_chart(lined.properties(description=about), width="stretch")
            st.caption(plain(_read_as(chart, lines, shown)))


def _lines(table: pd.DataFrame, names: list[str], axis: str, board: Board) -> alt.LayerChart:
    score = board.results.protocol.score
    legend = method_legend(symbolType="stroke", symbolStrokeWidth=2, symbolSize=300)
    colour = method_colour(names, legend)
    dashes = [DASHES[i % len(DASHES)] for i in range(len(names))]
    share = axis.partition(",")[0]  # which go first stands below the chart
    x = alt.X(
        "x:Q",
        title=share,
        axis=alt.Axis(format="%", tickCount=5),
        scale=alt.Scale(domain=[0, float(table["x"].max())], nice=False),
    )
    base = alt.Chart(table).encode(x=x, color=colour)
    band = base.mark_area(opacity=0.14).encode(y="lo:Q", y2="hi:Q")
    line = base.mark_line(strokeWidth=2).encode(
        y=alt.Y("score:Q", title=score),
        strokeDash=alt.StrokeDash(
            "method:N", scale=alt.Scale(domain=names, range=dashes), legend=legend
        ),
        tooltip=[
            "method",
            alt.Tooltip("x:Q", title="share", format=".2f"),
            alt.Tooltip("score:Q", format=".3f"),
            alt.Tooltip("lo:Q", format=".3f"),
            alt.Tooltip("hi:Q", format=".3f"),
        ],
    )
    return (band + line).properties(height=360)


def _read_as(chart: dict[str, Any], lines: dict[str, Any], names: list[str]) -> str:
    falls = chart["key"] in ("deletion", "morf")
    counts = sorted({lines[name][3] for name in names})
    photos = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    order = chart["axis"].partition(", ")[2]
    return (
        f"{order.capitalize()}. {'Lower' if falls else 'Higher'} is better. Mean of {photos} photos; "
        f"bands are 95 % intervals."
    )
