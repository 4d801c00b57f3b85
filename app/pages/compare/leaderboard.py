"""The leaderboard: methods by a metric, with intervals, and all metrics side by side."""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from xattn.app.pages.compare.colours import palette
from xattn.app.pages.compare.leaderboard_file import Board, arrow
from xattn.app.pages.compare.method_choice import metric_box
from xattn.app.state import plain
from xattn.eval.metrics.objectives import LEGEND, MARK
from xattn.eval.report.aggregate_ranks import Ranking
from xattn.eval.report.html_tables import format_number, number_form
from xattn.pictures.words import metric_about


def leaderboard_tab(board: Board) -> None:
    """Show the methods by one metric, who is best in which, and in folded parts ranks and all metrics."""
    key = metric_box(board, "metric")
    about = board.info(key)
    said = metric_about(key, about.higher_is_better)
    st.caption(plain(said), help=plain(f"{key}: {about.formula}"))
    table, form = _standings(board, key)
    trained = bool(table[MARK].any())
    if trained:
        st.caption(f"{MARK} {LEGEND}")
    _intervals(board, key, table)
    number = f"%{form}"
    st.dataframe(
        table.drop(columns=["lo", "hi", "said", "label", *([] if trained else [MARK])]),
        hide_index=True,
        width="stretch",
        height="content",
        column_config={
            "method": st.column_config.TextColumn(pinned=True),
            "mean": st.column_config.NumberColumn(
                f"mean {'↑' if about.higher_is_better else '↓'}", format=number
            ),
            MARK: st.column_config.TextColumn(help=LEGEND),
            "minus best": st.column_config.TextColumn(
                help="Mean difference to the best method, photo by photo, with its interval."
            ),
        },
    )
    if board.wins:
        st.markdown("\n".join(f"- **{plain(w.method)}**: {plain(w.verdict)}" for w in board.wins))
    if board.too_few:
        st.markdown(plain(board.too_few))
    if board.ranking is not None:
        with st.expander("Over all metrics: aggregate ranks"):
            _ranks(board.ranking)
    with st.expander("All metrics"):
        _everything(board)


def _ranks(ranking: Ranking) -> None:
    """One place for each method, how far it moves when photos are resampled, and what it stands for."""
    if ranking.ranks:
        rows = [
            {
                "method": r.method,
                "rank": r.rank,
                "95 % interval": f"{r.lo} to {r.hi}",
                "first in": 100 * r.first,
            }
            for r in sorted(ranking.ranks, key=lambda r: r.rank)
        ]
        st.dataframe(
            pd.DataFrame(rows),
            hide_index=True,
            width="stretch",
            height="content",
            column_config={
                "first in": st.column_config.NumberColumn(
                    format="%.0f %%",
                    help="The share of resampled sets of photos in which it is first.",
                )
            },
        )
    for note in ranking.notes:
        st.caption(plain(note))


def _standings(board: Board, key: str) -> tuple[pd.DataFrame, str]:
    """The methods in a column, the best first, and the column's number format."""
    up = board.info(key).higher_is_better
    cells = [board.standings[name, key] for name in board.results.methods]
    form = number_form(board.info(key), [s.mean for s in cells])
    measured = sorted((s for s in cells if s.n), key=lambda s: -s.mean if up else s.mean)
    rows = []
    for s in [*measured, *(s for s in cells if not s.n)]:
        interval = f"{format_number(s.lo, form)} to {format_number(s.hi, form)}" if s.n else "-"
        rows.append(
            {
                "method": s.method,
                "row": board.kind(s.method),
                "mean": s.mean if s.n else None,
                MARK: MARK if s.trained_on else "",
                "standing": board.verdict(s.method, key),
                "95 % interval": interval,
                "minus best": _difference(s, form),
                "photos": s.n,
                "forward passes": _passes(board, s.method),
                "label": board.marked(s.method, key),
                "lo": s.lo,
                "hi": s.hi,
                "said": f"{format_number(s.mean, form)} [{interval}]",
            }
        )
    return pd.DataFrame(rows), form


def _difference(s: Any, form: str) -> str:
    if not math.isfinite(s.diff):
        return "-"
    lo, hi = (format_number(v, form) for v in (s.diff_lo, s.diff_hi))
    return f"{format_number(s.diff, form)} [{lo} to {hi}]"


def _passes(board: Board, name: str) -> int | None:
    passes = board.results.methods[name].forwards
    return passes if type(passes) is int else None


def _intervals(board: Board, key: str, table: pd.DataFrame) -> None:
    """A dot and its interval for every method, in the table's order."""
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
    kinds = [kind for kind in ("method", "sanity row", "mask") if kind in set(shown["row"])]
    colours_of_theme = palette()
    legend = alt.Legend(title=None, orient="top") if len(kinds) > 1 else None
    colours = {
        "method": colours_of_theme[0],
        "sanity row": colours_of_theme[7],
        "mask": colours_of_theme[1],
    }
    colour = alt.Color(
        "row:N",
        scale=alt.Scale(domain=kinds, range=[colours[kind] for kind in kinds]),
        legend=legend,
    )
    shapes = {"method": "circle", "sanity row": "square", "mask": "diamond"}
    rules = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("lo:Q", title=arrow(key, board), scale=alt.Scale(zero=False)),
        x2="hi:Q",
        color=colour,
    )
    points = base.mark_point(size=70, filled=True, opacity=1).encode(
        x="mean:Q",
        color=colour,
        shape=alt.Shape(
            "row:N",
            scale=alt.Scale(domain=kinds, range=[shapes[kind] for kind in kinds]),
            legend=legend,
        ),
    )
    about = f"Mean and 95 % interval of {key} by method; the table below has the figures"
    # Room for the axis and the legend, and 26 pixels a method.
    chart = (rules + points).properties(height=26 * len(shown) + 110, description=about)
    st.altair_chart(chart, width="stretch")


def _everything(board: Board) -> None:
    """Every column side by side, with intervals and who is best, in words."""
    rows: list[dict[str, str]] = []
    forms = {
        key: number_form(
            board.info(key), [board.standings[m, key].mean for m in board.results.methods]
        )
        for key in board.columns
    }
    for name in board.ranked:
        row = {"method": name, "row": board.kind(name)}
        for key, form in forms.items():
            s = board.standings[name, key]
            lo, hi = format_number(s.lo, form), format_number(s.hi, form)
            mark = _mark(board, name, key)
            row[arrow(key, board)] = (
                f"{format_number(s.mean, form)} [{lo} to {hi}]{mark}" if s.n else "-"
            )
        rows.append(row)
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        width="stretch",
        height="content",
        column_config={"method": st.column_config.TextColumn(pinned=True)},
    )
    if any(s.trained_on and s.n for s in board.standings.values()):
        st.caption(f"{MARK} {LEGEND}")


def _mark(board: Board, method: str, key: str) -> str:
    """What stands behind a figure: a dagger, and whether it is the best."""
    s = board.standings[method, key]
    dagger = f" {MARK}" if s.trained_on else ""
    if s.best:
        return f"{dagger}, best"
    level = board.verdict(method, key).startswith("not told apart from the best")
    return f"{dagger}, not told apart from the best" if level else dagger
