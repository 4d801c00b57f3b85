"""The Mistakes page: a pack's confusion matrix, one row per class, and the maps of the photos in a
cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import streamlit as st
from PIL import Image

from xattn.app import state
from xattn.app.components import chosen_row, explain_command, grid, matrix, sent_value
from xattn.app.navigation import address, chosen, last_view
from xattn.app.pages import data_issues
from xattn.app.pictures.rendering import Look, data_uri, jpeg, map_url
from xattn.app.state import Context, cache_by_version, plain, short
from xattn.app.triage import selection, tag_files
from xattn.app.triage.selection import View
from xattn.app.triage.store import MOST_AT_ONCE, TagsError
from xattn.eval.evaluation.results import MIN_IMAGES
from xattn.eval.metric_words import with_direction
from xattn.eval.report.mistakes import (
    Confusion,
    SliceRow,
    class_rows,
    confusion,
    mean_map,
    slice_row,
)
from xattn.pictures.overlay import colorize
from xattn.runtime.names import count_phrase, visible

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


MOST_TAGS = 50  # most tags compared, those with the most photos first


def slice_table(pack: Pack, method: str) -> None:
    """Show one row per slice; a row leads to its photos in the gallery."""
    try:
        revision = f"{tag_files.store_of(pack).revision()} {chosen.digest(pack)}"
        views = _views(pack, method)
    except TagsError as error:
        st.warning(plain(error))
        return
    if not views:
        st.info(
            "There is no slice yet. Choose or tag some photos, or filter the gallery and save its view "
            "under Slices."
        )
        return
    rows = _rows(pack, revision, method, views)
    keys = [m.key for m in pack.metrics if any(m.key in row.metrics for row in rows.values())]
    table = pd.DataFrame([_slice_line(name, rows.get(name), keys) for name in views])
    columns = {
        "slice": st.column_config.TextColumn(pinned=True),
        "right": st.column_config.NumberColumn(format="%.1f %%"),
        "ECE": st.column_config.NumberColumn(
            format="%.3f", help="Expected calibration error, of 15 bins"
        ),
    }
    if (number := chosen_row(table, "mistakes.slices", **columns)) is not None:
        last_view.to_gallery(pack, list(views.values())[number])
    few = any(0 < row.known < MIN_IMAGES for row in rows.values())
    measured = f" Metrics are those of the maps by {pack.title_of(method)}." if keys else ""
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
    """The gallery views of the saved slices and of the tags, by name."""
    store, choices = tag_files.store_of(pack), selection.table(pack).choices
    found = {name: selection.from_text(text, choices) for name, text in store.slices().items()}
    tags = sorted(store.counts().items(), key=lambda item: -item[1])[:MOST_TAGS]
    usual = replace(selection.defaults(choices), method=method)
    if only := chosen.digest(pack):
        found["chosen photos"] = replace(usual, only=only)
    return found | {f"tag: {tag}": replace(usual, tag=(tag,)) for tag, _ in tags}


@cache_by_version(4)
def _rows(pack: Pack, revision: str, method: str, _views: dict[str, View]) -> dict[str, SliceRow]:
    """The row of each slice that has photos, computed from at most the first 100,000."""
    rows = {}
    for name, view in _views.items():
        if photos := selection.select(pack, view).photos(MOST_AT_ONCE):
            rows[name] = slice_row(pack, name, photos, method)
    return rows


def _slice_line(name: str, row: SliceRow | None, keys: list[str]) -> dict[str, Any]:
    """The table line of a slice; without photos it has no figures."""
    line: dict[str, Any] = {"slice": visible(name), "photos": 0}
    if row is None:
        return line | dict.fromkeys(("right, 95 %", *keys), "")
    figures = {key: row.metrics[key].text(3) if key in row.metrics else "" for key in keys}
    return line | {
        "photos": row.photos,
        "right": 100 * row.accuracy.mean,
        "right, 95 %": f"{row.accuracy.lo:.0%} to {row.accuracy.hi:.0%}" if row.known else "",
        "ECE": row.ece,
        **figures,
    }


SIDE = 240  # pixels of a picture's longer side
FEW = 11  # photos of a cell shown beside their mean map
CELL = "cell"  # the URL parameter TRUE.PREDICTED, by number, with "other" for other classes
MATRIX, CELLS = "mistakes.matrix", "mistakes.cells"


def page(context: Context) -> None:
    """Show the open pack's mistakes."""
    pack = context.pack
    assert pack is not None, "main.py calls this page with a pack"
    st.title("Mistakes", anchor=False)
    found = _confusion(pack)
    if not found.classes:
        _nothing()
    method = address.method_box(pack, selection.table(pack).choices.under_test, 220)
    lists: dict[str, Callable[[Pack, str], None]] = {}
    if found.classes:
        _headline(pack, found)
        st.button(
            "Most confident errors",
            key="mistakes.surest",
            on_click=lambda: last_view.to_gallery(
                pack, View(method=method, right="wrong", sort="confidence", order="desc")
            ),
        )
        cell = _chosen(found)
        left, right = st.columns([4, 3], gap="medium")
        with left:
            _matrix(pack, found, cell)
        with right:
            _cell(pack, found, cell, method)
        lists = {
            "Classes": _classes,
            "Slices": slice_table,
            "Label errors": data_issues.label_errors_tab,
        }
    lists |= {
        "Duplicates": data_issues.duplicates_tab,
        "Shortcuts": data_issues.shortcuts_tab,
    }
    tabs = st.tabs(list(lists), key="table", bind="query-params")
    for tab, show in zip(tabs, lists.values(), strict=True):
        if tab.open:
            with tab:
                show(pack, method)


_confusion = cache_by_version(8)(confusion)
_class_rows = cache_by_version(8)(class_rows)


@cache_by_version(8)
def _whole(pack: Pack) -> SliceRow:
    return slice_row(pack, "all", list(pack.images.index))


@cache_by_version(32)
def _mean_map(pack: Pack, entry_ids: tuple[str, ...]) -> str:
    """The mean of these maps as a picture's URL."""
    values = mean_map(pack, entry_ids)
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    picture = Image.fromarray(colorize(scaled)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return data_uri(jpeg(picture))


def _nothing() -> None:
    with st.container(border=True):
        st.markdown("**No photo of this pack has a true class.**")
        st.markdown(
            "Explain the photos with their classes, and this page shows which ones are confused:"
        )
        explain_command("labelled")
        st.caption(
            "--labels also takes a .csv or .json file. The classes have to be classes of the network."
        )


def _headline(pack: Pack, found: Confusion) -> None:
    """Show how often the network is right, and how confident it is."""
    whole = _whole(pack)
    mean, lo, hi, n = whole.accuracy
    interval = f"95 % interval {lo:.1%} to {hi:.1%}"
    parts = [f"**{mean:.1%}** of {n:,} photos are classified correctly ({interval})"]
    parts.append(f"expected calibration error {whole.ece:.3f}")
    if found.unknown:
        parts.append(f"{found.unknown:,} photos without a true class or a prediction are left out")
    st.markdown("; ".join(parts) + ".")
    if n < MIN_IMAGES:
        st.caption(f"{n} photos: too few images for a verdict.")


# ---------------------------------------------------------------------- the matrix


def _matrix(pack: Pack, found: Confusion, chosen: tuple[int, int]) -> None:
    most = found.counts.max()
    rows = []
    for i, (_, true) in enumerate(found.classes):
        cells: list[dict[str, Any] | None] = []
        for j, (_, predicted) in enumerate(found.classes):
            count = int(found.counts[i, j])
            if not count:
                cells.append(None)
                continue
            mixed = i == j and found.classes[i][0] is None
            what = (
                f"{count_phrase(count, 'photo')} of {short(true)} predicted as {short(predicted)}"
            )
            cells.append(
                {
                    "id": _name(found, (i, j)),
                    "text": f"{count:,}",
                    "hint": what,
                    "share": count / most,
                    "kind": "plain" if mixed else "right" if i == j else "wrong",
                    "selected": (i, j) == chosen,
                    "href": state.link("mistakes", pack=pack.id, cell=_name(found, (i, j))),
                }
            )
        rows.append({"title": short(true), "cells": cells})
    matrix(
        [short(name) for _, name in found.classes],
        rows,
        MATRIX,
        label="Photos by true class (down) and predicted class (across)",
        corner="true, down\npredicted, across",
        on_open=_opened,
    )
    st.caption(
        "Click a cell to see its photos. The arrow keys move between cells; Enter opens one."
    )


def _name(found: Confusion, cell: tuple[int, int]) -> str:
    """A cell's name in the URL."""
    numbers = (found.classes[i][0] for i in cell)
    return ".".join("other" if number is None else str(number) for number in numbers)


def _chosen(found: Confusion) -> tuple[int, int]:
    """The cell in the URL; without one, the most common mistake, or else the most common cell."""
    by_name = {_name(found, cell): cell for cell in found.photos}
    wanted = st.query_params.get(CELL, "")
    if wanted in by_name:
        return by_name[wanted]
    if wanted:
        st.warning("This pack has no such cell; the most common mistake is shown.")
    wrong = [cell for cell in found.photos if cell[0] != cell[1]]
    return max(wrong or found.photos, key=lambda cell: (found.counts[cell], -cell[0], -cell[1]))


def _opened() -> None:
    opened = sent_value(MATRIX, "open")
    if isinstance(opened, str):
        st.query_params[CELL] = opened


# ---------------------------------------------------------------------- a cell


def _cell(pack: Pack, found: Confusion, cell: tuple[int, int], method: str) -> None:
    """Show the mean map of a cell's photos, and its first photos."""
    photos = found.photos[cell]
    true, predicted = (short(found.classes[i][1]) for i in cell)
    right = cell[0] == cell[1] and found.classes[cell[0]][0] is not None
    st.subheader(
        plain(f"{true}, predicted correctly" if right else f"{true} predicted as {predicted}"),
        anchor=False,
    )
    entries = selection.table(pack).first_maps(method, photos)
    title = pack.title_of(method)
    cells = []
    if entries:
        ids = tuple(entries.values())
        cells.append(
            {
                "id": "mean",
                "src": _mean_map(pack, ids),
                "alt": f"Mean of the maps by {title} of these photos",
                "title": "Mean map",
                "lines": [f"of {count_phrase(len(ids), 'photo')}, by {title}"],
            }
        )
    choices = selection.table(pack).choices
    view = _gallery_view(found, cell, method)
    text = None if view is None else selection.to_text(view, choices)
    chosen.button(pack, photos, "mistakes.choose")
    images = pack.images
    for image_id in photos[:FEW]:
        row = images.loc[image_id]
        entry_id = entries.get(image_id)
        cells.append(
            {
                "id": image_id,
                "src": map_url(pack, image_id, entry_id, Look(side=SIDE)),
                "alt": f"Map by {title} on {row['title']}" if entry_id else f"{row['title']}",
                "title": f"{short(row['predicted_name'])}  {row['confidence']:.1%}",
                "lines": [f"true: {short(row['label_name'])}", row["title"]],
                "href": state.link("image", pack=pack.id, image=image_id, view=text),
            }
        )
    grid(
        cells,
        CELLS,
        label="The cell's photos",
        columns=3,
        width=130,
        on_open=lambda: _open_photo(text),
    )


def _gallery_view(found: Confusion, cell: tuple[int, int], method: str) -> selection.View | None:
    """The gallery view of the cell's photos; None for a cell of many classes, which has no filter."""
    true, predicted = (found.classes[i][0] for i in cell)
    if true is None or predicted is None:
        return None
    return selection.View(method=method, label=(str(true),), predicted=(str(predicted),))


def _open_photo(view: str | None) -> None:
    opened = sent_value(CELLS, "open")
    if isinstance(opened, str) and opened != "mean":
        state.go("image", image=opened, view=view)


# ---------------------------------------------------------------------- classes


def _classes(pack: Pack, method: str) -> None:
    """Show one row per class; a row leads to its photos in the gallery."""
    rows = _class_rows(pack, method)
    keys = [key for key in (m.key for m in pack.metrics) if any(key in r.metrics for r in rows)]
    table = pd.DataFrame(
        {
            "class": short(row.name),
            "photos": len(row.photos),
            "right": 100 * row.accuracy.mean,
            "right, 95 %": f"{row.accuracy.lo:.0%} to {row.accuracy.hi:.0%}",
            "confidence": 100 * row.confidence.mean,
            "overconfidence": 100 * row.overconfidence.mean,
            **{key: row.metrics[key].text(3) if key in row.metrics else "" for key in keys},
        }
        for row in rows
    )
    config: dict[str, Any] = {
        "class": st.column_config.TextColumn(pinned=True),
        **{
            name: st.column_config.NumberColumn(format="%.1f %%")
            for name in ("right", "confidence", "overconfidence")
        },
        **{
            m.key: st.column_config.TextColumn(
                help=plain(f"{m.title or m.key}. {with_direction(m.about, m.higher_is_better)}")
            )
            for m in pack.metrics
            if m.key in keys
        },
    }
    if (chosen := chosen_row(table, "mistakes.classes", **config)) is not None:
        label = (str(rows[chosen].number),)
        last_view.to_gallery(pack, View(method=method, label=label))
    measured = (
        f" Metrics are of the maps by {pack.title_of(method)}, with 95 % intervals." if keys else ""
    )
    st.caption(
        plain(
            f"Choose a row to see its photos. Overconfidence is the mean confidence minus the accuracy, in "
            f"percentage points.{measured}"
        )
    )
