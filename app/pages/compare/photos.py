"""Plots single photos by two metrics, with a dot for each photo and method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import pandas as pd
import streamlit as st

from xattn.app import components, state
from xattn.app.components import chosen_row
from xattn.app.pages.compare.leaderboard import (
    SHAPES,
    method_colour,
    method_legend,
    methods_box,
    metric_box,
)
from xattn.app.state import plain
from xattn.eval.report.html_data import MAX_VALUES, case_columns, spaced_images
from xattn.eval.report.standings import Board
from xattn.explainers.base import method_title

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


PER_PHOTO = MAX_VALUES // 2000  # at most 2,000 dots per method


def photos_tab(board: Board, pack: Pack | None) -> None:
    """Show photos by two metrics; if there is a pack, a click opens a photo."""
    good = [column.key for column in case_columns(board.results)]
    good = list(dict.fromkeys([*good, *board.columns]))[:2]
    left, right = st.columns(2)
    with left:
        x = metric_box(board, "sx", "Across", good[0])
    with right:
        y = metric_box(board, "sy", "Up", good[-1])
    names = methods_box(board, "dots", board.ranked, 3)
    if not names:
        st.info("No method is chosen. Choose one or more above.")
        return
    table, note = _dots(board, pack, names, x, y)
    table["method"] = table["method"].map(method_title)
    titles = list(map(method_title, names))
    dots = len(table)
    table = table.dropna(subset=["x", "y"])
    if table.empty:
        st.info("No photo has a value of both metrics.")
        return
    chart = (
        alt.Chart(table)
        .mark_point(size=50, filled=True)
        .encode(
            x=alt.X("x:Q", title=board.title_with_arrow(x), scale=alt.Scale(zero=False)),
            y=alt.Y("y:Q", title=board.title_with_arrow(y), scale=alt.Scale(zero=False)),
            color=method_colour(titles, method_legend()),
            shape=alt.Shape(
                "method:N", scale=alt.Scale(domain=titles, range=SHAPES), legend=method_legend()
            ),
            tooltip=[
                "photo",
                "class",
                alt.Tooltip("p:Q", format=".1%"),
                "method",
                alt.Tooltip("x:Q", title=x.replace(".", ""), format=".4g"),
                alt.Tooltip("y:Q", title=y.replace(".", ""), format=".4g"),
            ],
        )
        .properties(height=420, description=f"{y} against {x}, a dot a photo and method")
    )
    if "entry" in table:
        picked = alt.selection_point(name="dot", fields=["entry"], on="click", clear=False)
        chart = chart.add_params(picked).encode(
            opacity=alt.condition(picked, alt.value(0.8), alt.value(0.5), empty=True)
        )
        event = st.altair_chart(chart, width="stretch", key="dots_chart", on_select="rerun")
        entry = (event["selection"].get("dot") or [{}])[0].get("entry")  # {} before the first click
        if pack is not None and entry in pack.entries.index:
            open_photo(pack, entry, names)
    else:
        st.altair_chart(chart, width="stretch")
    if dots > len(table):
        note += f" {dots - len(table)} have no value of one of the two."
    st.caption(note)
    if trained := board.training(names, [x, y]):
        st.caption(plain(trained))
    with st.expander("The dots as a table"):
        _dots_table(table, pack, names, board.title_with_arrow(x), board.title_with_arrow(y))


def _dots_table(table: pd.DataFrame, pack: Pack | None, names: list[str], x: str, y: str) -> None:
    """The chart as a table, for use without a pointer; like a dot, a row opens its photo."""
    shown = table[["photo", "method", "x", "y", "class"]]
    config = {
        name: st.column_config.NumberColumn(title, format="%.4g")
        for name, title in (("x", x), ("y", y))
    }
    if pack is None or "entry" not in table:
        components.table(shown, config)
        return
    st.caption("Choose a row to open its photo.")
    if (row := chosen_row(shown, "dots_table", **config)) is not None:
        open_photo(pack, table["entry"].iloc[row], names)


def open_photo(pack: Pack, entry_id: Any, names: list[str]) -> None:
    """Open the page of a map's photo with the methods of the chart."""
    image_id = pack.entries.at[entry_id, "image_id"]
    state.go("image", pack=pack.id, image=image_id, methods=names, entry=entry_id)


def _dots(
    board: Board, pack: Pack | None, names: list[str], x: str, y: str
) -> tuple[pd.DataFrame, str]:
    """One row per photo and method, with the entry's id if a click opens it, and a note on the rows."""
    results = board.results
    points = spaced_images(len(results.images), PER_PHOTO)
    keys = [metric.key for metric in pack.metrics] if pack is not None else []
    if pack is not None and len(pack.images) == len(results.images) and {x, y} <= set(keys):
        rows = pack.entries[pack.entries["method"].isin(names)]
        rows = rows[rows["image_id"].isin(pack.images.index[points])]
        table = pd.DataFrame(
            {
                "entry": rows.index,
                "method": rows["method"].to_numpy(),
                "x": rows[x].to_numpy(),
                "y": rows[y].to_numpy(),
                "photo": pack.images["title"].loc[rows["image_id"]].to_numpy(),
                "class": rows["target_name"].to_numpy(),
                "p": rows["probability"].to_numpy(),
            }
        )
        note = "Each dot is a photo; click one to open it."
    else:
        table = pd.concat(
            pd.DataFrame(
                {
                    "method": name,
                    "x": results.methods[name].values[board.columns[x]][points],
                    "y": results.methods[name].values[board.columns[y]][points],
                    "photo": [results.images[i].id.rpartition("/")[2] for i in points],
                    "class": [results.images[i].target_name for i in points],
                    "p": [results.images[i].p for i in points],
                }
            )
            for name in names
        )
        note = "Each dot is a photo."
    if len(points) < len(results.images):
        note += f" {len(points):,} of {len(results.images):,} photos, evenly spread."
    return table, note
