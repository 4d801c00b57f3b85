"""The gallery's selection by pandas, in memory: what the selection by duckdb is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from xattn.app.triage.maps_table import MEASURES, SORTS, fold
from xattn.app.triage.selection import ALL, View


def make_table(images: pd.DataFrame, entries: pd.DataFrame, metrics: Sequence[Any]) -> pd.DataFrame:
    """A row a map: what it is sorted, filtered and searched by."""
    rows = entries[["image_id", "method", "target_name", "probability", "is_value"]].copy()
    of_image = images.reindex(rows["image_id"])
    for name in (
        *("file_name", "title", "label_name", "predicted_name"),
        *("right", "confidence", "disagreement"),
    ):
        rows[name] = of_image[name].to_numpy()
    for name in ("label", "predicted"):
        each = zip(of_image[name], rows[f"{name}_name"], strict=True)
        keys = [_class_key(i, n) for i, n in each]
        rows[name] = pd.Series(keys, index=rows.index, dtype=object)
    numbers = {key: rows[key] for key in MEASURES}
    numbers |= {m.key: entries[m.key] for m in metrics if m.key not in {**numbers, **SORTS}}
    for key, column in numbers.items():
        values = pd.to_numeric(column, errors="coerce")
        values = values.where(values.abs() < math.inf)
        if values.notna().any():
            rows[f"measure:{key}"] = values.astype(float)
    # The first of the most probable: a stable sort keeps the pack's order among equals.
    order = (-rows["probability"]).to_numpy().argsort(kind="stable")
    ranked = rows.iloc[order]
    later = ranked.duplicated(["image_id", "method"])
    rows["first"] = ~later.reindex(rows.index)
    ids = rows["image_id"].astype(str)
    rows["name_key"] = [fold(v) for v in rows["file_name"].fillna("").where(lambda s: s != "", ids)]
    for name in ("label", "predicted"):
        folded = rows[f"{name}_name"].map(lambda v: fold(v) if isinstance(v, str) else None)
        rows[f"{name}_key"] = folded
    named = rows[["label_name", "predicted_name", "target_name"]].fillna("").astype(str)
    rows["text"] = rows["title"].map(fold) + "\n" + ids.map(fold)
    for name in named:
        rows["text"] += "\n" + named[name].map(fold)
    return rows


def _class_key(index: Any, name: Any) -> str | None:
    """A class in URLs: its index, or its name where it has no index."""
    if index is not None and index == index:
        return str(int(index))
    return name if isinstance(name, str) and name else None


def select(rows: pd.DataFrame, view: View) -> pd.DataFrame:
    """The rows that pass the filters, in the view's order; missing values come last."""
    keep = pd.Series(True, index=rows.index)
    if view.method != ALL:
        keep &= rows["method"] == view.method
    if view.maps == "first":
        keep &= rows["first"]
    if view.label:
        keep &= rows["label"].isin(view.label)
    if view.predicted:
        keep &= rows["predicted"].isin(view.predicted)
    if view.right != "any":
        keep &= rows["right"].map({True: "right", False: "wrong"}) == view.right
    if view.low is not None:
        keep &= rows[f"measure:{view.measure}"] >= view.low
    if view.high is not None:
        keep &= rows[f"measure:{view.measure}"] <= view.high
    for word in fold(view.q).split():
        keep &= rows["text"].str.contains(word, regex=False)
    found = rows[keep]
    column = f"{view.sort}_key" if view.sort in SORTS else f"measure:{view.sort}"
    if view.method == ALL:  # the maps of a photo together, placed by the first of them
        number = rows["image_id"].map({i: n for n, i in enumerate(rows["image_id"].unique())})
        found = found.assign(number=number.loc[found.index], n=range(len(found)))
        if view.sort == "pack":
            return found.sort_values(["number", "n"], ascending=[view.order == "asc", True])
        found[column] = found.groupby("number")[column].transform(
            "min" if view.order == "asc" else "max"
        )
        found = found.sort_values(["number", "n"])
    elif view.sort == "pack":
        return found if view.order == "asc" else found[::-1]
    return found.sort_values(
        column, ascending=view.order == "asc", kind="stable", na_position="last"
    )
