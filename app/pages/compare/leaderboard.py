"""The leaderboard: methods by a metric, with intervals, and all metrics side by side."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from xattn.app import components
from xattn.app.navigation import address
from xattn.app.state import plain
from xattn.eval.metric_words import metric_about, named_metric
from xattn.eval.metrics.objectives import LEGEND, MARK
from xattn.eval.report.aggregate_ranks import Ranking
from xattn.eval.report.standings import Board
from xattn.explainers.base import method_title
from xattn.pictures.design import SERIES_DARK, SERIES_LIGHT

LINES = 4  # methods in a chart by default


def metric_box(board: Board, key: str, label: str = "Metric", first: str | None = None) -> str:
    """A select box of the columns with their directions and meanings."""
    first = first or board.first_key
    titles = {k: board.title_with_arrow(k) + named_metric(k).removeprefix(k) for k in board.columns}
    return address.selectbox(label, titles, key, default=first, width=380)


def methods_box(board: Board, key: str, names: list[str], count: int = LINES) -> list[str]:
    """A box to choose a chart's methods; by default the best ones and a sanity row."""
    tested = [name for name in names if board.kind(name) == "method"]
    sane = [name for name in names if name == "random"][:1]
    first = [*tested[: count - len(sane)], *sane] or names[:count]
    return address.multiselect("Methods", names, key, default=first, format_func=method_title)


DASHES = [[1, 0], [7, 3], [2, 2], [9, 3, 2, 3]]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]


def palette() -> list[str]:
    """The colours of methods for the current theme."""
    return list(SERIES_DARK if st.context.theme.type == "dark" else SERIES_LIGHT)


def method_colour(names: list[str], legend: alt.Legend) -> alt.Color:
    """The colour of each method; ``names`` are in the order of the palette."""
    colours = [colour for colour, _ in zip(cycle(palette()), names, strict=False)]
    return alt.Color("method:N", scale=alt.Scale(domain=names, range=colours), legend=legend)


def method_legend(**symbol: Any) -> alt.Legend:
    """A legend of methods below a chart."""
    return alt.Legend(
        title=None, orient="bottom", columns=2, labelLimit=220, symbolOpacity=1, **symbol
    )


def leaderboard_tab(board: Board) -> None:
    """Show the methods by one metric and the best method of each metric; ranks and all metrics are in
    expanders."""
    key = metric_box(board, "metric")
    about = board.info(key)
    said = metric_about(key, about.higher_is_better)
    st.caption(plain(said), help=plain(f"{key}: {about.formula}"))
    table = _standings(board, key)
    trained = bool(table[MARK].any())
    if trained:
        st.caption(f"{MARK} {LEGEND}")
    _intervals(board, key, table)
    components.table(
        table.drop(columns=["lo", "hi", "said", "label", *([] if trained else [MARK])]),
        {
            "method": st.column_config.TextColumn(pinned=True),
            "mean": st.column_config.NumberColumn(
                f"mean {'↑' if about.higher_is_better else '↓'}", format=f"%{board.forms[key]}"
            ),
            MARK: st.column_config.TextColumn(help=LEGEND),
            "minus best": st.column_config.TextColumn(
                help="Mean paired difference from the best method, with its interval."
            ),
        },
    )
    if board.wins:
        wins = [f"- **{plain(method_title(w.method))}**: {plain(w.verdict)}" for w in board.wins]
        st.markdown("\n".join(wins))
    if board.too_few:
        st.markdown(plain(board.too_few))
    if board.ranks is not None:
        with st.expander("Over all metrics: aggregate ranks"):
            _ranks(board, board.ranks)
    with st.expander("All metrics"):
        _everything(board)


def _ranks(board: Board, ranking: Ranking) -> None:
    """Show one rank per method, how much it varies when photos are resampled, and what it means."""
    if ranking.ranks:
        rows = [
            {
                "method": method_title(r.method),
                "rank": r.rank,
                "rank set, 95 %": f"{r.lo} to {r.hi}",
                "first in": 100 * r.first,
            }
            for r in sorted(ranking.ranks, key=lambda r: r.rank)
        ]
        first = st.column_config.NumberColumn(
            format="%.0f %%", help="The share of resampled sets of photos in which it is first."
        )
        components.table(pd.DataFrame(rows), {"first in": first})
    for note in ranking.notes:
        st.caption(plain(note))


def _standings(board: Board, key: str) -> pd.DataFrame:
    """A table of the methods in a column, best first."""
    up = board.info(key).higher_is_better
    cells = [board.formatted(name, key) for name in board.results.methods]
    measured = sorted((c for c in cells if c.standing.n), key=lambda c: c.standing.mean, reverse=up)
    rows = []
    for s, mean, (lo, hi), minus, _ in [*measured, *(c for c in cells if not c.standing.n)]:
        interval = f"{lo} to {hi}" if s.n else "-"
        passes = board.results.methods[s.method].forwards
        rows.append(
            {
                "method": method_title(s.method),
                "row": board.kind(s.method),
                "mean": s.mean if s.n else None,
                MARK: MARK if s.trained_on else "",
                "standing": board.verdict(s.method, key),
                "95 % interval": interval,
                "minus best": "-" if minus is None else "{} [{} to {}]".format(*minus),
                "photos": s.n,
                "forward passes": passes if type(passes) is int else None,
                "label": board.marked_name(s.method, key),
                "lo": s.lo,
                "hi": s.hi,
                "said": f"{mean} [{interval}]",
            }
        )
    return pd.DataFrame(rows)


def _intervals(board: Board, key: str, table: pd.DataFrame) -> None:
    """Show a dot with its interval for every method, in the table's order."""
    shown = table[table["photos"] > 0]
    if shown.empty:
        st.info("No method has a value of this metric.")
        return
    order = list(shown["label"])
    base = alt.Chart(shown).encode(
        y=alt.Y(
            "label:N",
            sort=order,
            title=None,
            axis=alt.Axis(labelLimit=220, labelFlush=False, labelOverlap=False),
        ),
        tooltip=["method", "row", alt.Tooltip("said:N", title="mean"), "standing"],
    )
    looks = {"method": (0, "circle"), "sanity row": (7, "square"), "mask": (1, "diamond")}
    kinds = [kind for kind in looks if kind in set(shown["row"])]
    legend = alt.Legend(title=None, orient="top") if len(kinds) > 1 else None
    colours = [palette()[looks[kind][0]] for kind in kinds]
    colour = alt.Color("row:N", scale=alt.Scale(domain=kinds, range=colours), legend=legend)
    shapes = alt.Scale(domain=kinds, range=[looks[kind][1] for kind in kinds])
    rules = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("lo:Q", title=board.title_with_arrow(key), scale=alt.Scale(zero=False)),
        x2="hi:Q",
        color=colour,
    )
    points = base.mark_point(size=70, filled=True, opacity=1).encode(
        x="mean:Q", color=colour, shape=alt.Shape("row:N", scale=shapes, legend=legend)
    )
    about = f"Mean and 95 % interval of {key} by method; the table below has the figures"
    # Room for the axis and the legend, and 26 pixels per method.
    chart = (rules + points).properties(height=26 * len(shown) + 110, description=about)
    st.altair_chart(chart, width="stretch")


def _everything(board: Board) -> None:
    """Show all columns side by side, with intervals and verdicts in words."""
    rows: list[dict[str, str]] = []
    for name in board.ranked:
        row = {"method": method_title(name), "row": board.kind(name)}
        for key in board.columns:
            s, mean, (lo, hi), _, sign = board.formatted(name, key)
            dagger = f" {MARK}" if s.trained_on else ""
            sign = sign.replace("level with best", "no clear difference from the best")
            text = f"{mean} [{lo} to {hi}]{dagger}" + (f", {sign}" if sign else "")
            row[board.title_with_arrow(key)] = text if s.n else "-"
        rows.append(row)
    components.table(pd.DataFrame(rows), {"method": st.column_config.TextColumn(pinned=True)})
    if board.trained:
        st.caption(f"{MARK} {LEGEND}")


def curves_tab(board: Board) -> None:
    """Show a chart for each kind of curve that was measured."""
    with st.spinner("Drawing intervals", show_time=True):
        charts = board.curves
    if not charts:
        st.info(
            "This comparison measured no curves. Run xattn compare with --metrics "
            "insertion-deletion, or direct, to see how the score falls as pixels are removed."
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
        titles = [method_title(name) for name in shown]
        rows = [
            {"method": method_title(name), "x": x, "score": mean, "lo": lo, "hi": hi}
            for name in shown
            for x, mean, lo, hi in zip(chart["x"], *lines[name][:3], strict=True)
            if mean is not None
        ]
        if rows:
            st.subheader(plain(chart["title"]), anchor=False)
            lined = _lines(pd.DataFrame(rows), titles, chart["axis"], board)
            about = f"{chart['title']}: mean score by {', '.join(titles)}, with 95 % intervals"
            st.altair_chart(lined.properties(description=about), width="stretch")
            st.caption(plain(_read_as(chart, lines, shown)))


def _lines(table: pd.DataFrame, names: list[str], axis: str, board: Board) -> alt.LayerChart:
    score = board.results.protocol.score
    legend = method_legend(symbolType="stroke", symbolStrokeWidth=2, symbolSize=300)
    colour = method_colour(names, legend)
    dashes = [DASHES[i % len(DASHES)] for i in range(len(names))]
    share = axis.partition(",")[0]  # the order is explained below the chart
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
