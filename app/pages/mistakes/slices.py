"""Saved slices and tags side by side: photos, accuracy, calibration and metrics of each."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd
import streamlit as st

from xattn.app import state
from xattn.app.navigation import last_view, selection
from xattn.app.navigation.selection import View
from xattn.app.state import plain
from xattn.app.triage import tag_files
from xattn.app.triage.journal import MOST_AT_ONCE
from xattn.app.triage.store import TagsError
from xattn.eval.report.mistakes import SliceRow, slice_row
from xattn.eval.results import MIN_IMAGES
from xattn.pictures.words import method_title
from xattn.runtime.display_text import visible

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

MOST_TAGS = 50  # that are compared, those with most photos


def slices(pack: Pack, method: str) -> None:
    """A row a slice; a row leads to its photos in the gallery."""
    try:
        revision = tag_files.store_of(pack).revision()
        views = _views(pack, method)
    except TagsError as error:
        st.warning(plain(error))
        return
    if not views:
        st.info(
            "No slice is saved yet. Filter the gallery and save its view under Slices, or tag some photos."
        )
        return
    rows = _rows(pack, f"{pack.id} {pack.version} {revision} {method}", method, views)
    keys = [m.key for m in pack.metrics if any(m.key in row.metrics for row in rows.values())]
    table = pd.DataFrame(
        {
            "slice": [visible(name) for name in views],
            "photos": [rows[n].photos if n in rows else 0 for n in views],
            "right": [_percent(rows.get(n)) for n in views],
            "right, 95 %": [_range(rows.get(n)) for n in views],
            "ECE": [rows[n].ece if n in rows else float("nan") for n in views],
            **{key: [_metric(rows.get(n), key) for n in views] for key in keys},
        }
    )
    event = st.dataframe(
        table,
        hide_index=True,
        width="stretch",
        column_config={
            "slice": st.column_config.TextColumn(pinned=True),
            "right": st.column_config.NumberColumn(format="%.1f %%"),
            "ECE": st.column_config.NumberColumn(
                format="%.3f", help="Expected calibration error, of 15 bins"
            ),
        },
        key="mistakes.slices",
        on_select="rerun",
        selection_mode="single-row",
    )
    for chosen in event["selection"]["rows"][:1]:
        choices = selection.table(pack).choices
        view = list(views.values())[chosen]
        last_view.remember(pack, selection.to_text(view, choices))
        state.go("gallery", **view.params(choices))
    few = any(0 < row.known < MIN_IMAGES for row in rows.values())
    measured = f" Metrics are of the maps by {method_title(method)}." if keys else ""
    st.caption(
        plain(
            f"Choose a row to see its photos. Intervals hold for 95 % of samples.{measured}"
            + (
                f" Slices of fewer than {MIN_IMAGES} photos are too small for a verdict."
                if few
                else ""
            )
        )
    )


def _views(pack: Pack, method: str) -> dict[str, View]:
    """The gallery's views of the saved slices, and of the tags, by name."""
    store, choices = tag_files.store_of(pack), selection.table(pack).choices
    found = {name: selection.from_text(text, choices) for name, text in store.slices().items()}
    tags = sorted(store.counts().items(), key=lambda item: -item[1])[:MOST_TAGS]
    usual = replace(selection.defaults(choices), method=method)
    return found | {f"tag: {tag}": replace(usual, tag=(tag,)) for tag, _ in tags}


@st.cache_resource(max_entries=4, show_spinner=False)
def _rows(_pack: Pack, key: str, method: str, _views: dict[str, View]) -> dict[str, SliceRow]:
    """What is known of each slice that has photos, of the first 100,000 of them."""
    rows = {}
    for name, view in _views.items():
        if photos := selection.selected(_pack, view).photos(MOST_AT_ONCE):
            rows[name] = slice_row(_pack, name, photos, method)
    return rows


def _percent(row: SliceRow | None) -> float:
    return float("nan") if row is None else 100 * row.accuracy.mean


def _range(row: SliceRow | None) -> str:
    known = row is not None and row.known
    return f"{row.accuracy.lo:.0%} to {row.accuracy.hi:.0%}" if row and known else ""


def _metric(row: SliceRow | None, key: str) -> str:
    return row.metrics[key].text(3) if row is not None and key in row.metrics else ""
