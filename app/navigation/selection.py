"""A selection of a pack's maps: filters, order and page, read from a URL and written to one.

Everything here is a pure function of the pack and the parameters; bad parameters become defaults
and a message.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

import pandas as pd
import streamlit as st

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

ALL = "all"  # every method
SIZES = (24, 36, 60)
SHOWS = {"overlay": "Map", "photo": "Photo"}
MAPS = {"first": "Most probable class", "every": "Every explained class"}
RIGHT = {"any": "Right and wrong", "right": "Right", "wrong": "Wrong"}
ORDERS = ("asc", "desc")
SORTS = {
    "pack": "Order of the pack",
    "name": "File name",
    "label": "True class",
    "predicted": "Predicted class",
}
MEASURES = {
    "confidence": "Confidence",
    "probability": "Probability of the explained class",
    "disagreement": "Disagreement of methods",
}
SEARCH_LENGTH = 200  # characters
LONGEST_TEXT = 8000  # of a view in another page's URL, in characters


@dataclass(frozen=True)
class Measure:
    """A number that maps are sorted and filtered by; ``low`` and ``high`` are its range here."""

    key: str
    name: str
    low: float
    high: float
    higher_is_better: bool | None = None
    formula: str = ""


@dataclass(frozen=True)
class Choices:
    """What a pack has to choose from; classes are ``{key: name}``."""

    methods: tuple[str, ...]
    measures: Mapping[str, Measure]
    labels: Mapping[str, str]
    predicted: Mapping[str, str]
    judged: bool  # of some photo it is known whether the prediction is right
    several: bool  # some photo has maps of several classes by one method
    controls: frozenset[str] = frozenset()  # methods that are sanity controls, not explanations

    @property
    def under_test(self) -> tuple[str, ...]:
        """The methods that are no controls; all of them where there is nothing else."""
        return tuple(m for m in self.methods if m not in self.controls) or self.methods

    @property
    def sorts(self) -> dict[str, str]:
        """Orders by key, with their names."""
        found = dict(SORTS)
        if not self.labels:
            del found["label"]
        if not self.predicted:
            del found["predicted"]
        return found | {m.key: m.name for m in self.measures.values()}


@dataclass(frozen=True)
class View:
    """What the gallery shows; names and values are those of the URL."""

    method: str = ALL
    maps: str = "first"
    sort: str = "pack"
    order: str = "asc"
    show: str = "overlay"
    size: int = SIZES[0]
    page: int = 1
    q: str = ""
    label: tuple[str, ...] = ()
    predicted: tuple[str, ...] = ()
    right: str = "any"
    measure: str = ""
    low: float | None = None
    high: float | None = None

    def params(self, choices: Choices) -> dict[str, list[str]]:
        """The URL's parameters: what differs from the pack's defaults."""
        usual = defaults(choices)
        found = {}
        for name in NAMES:
            value = getattr(self, name)
            if value != getattr(usual, name) and value is not None:
                found[name] = list(value) if isinstance(value, tuple) else [str(value)]
        if self.low is None and self.high is None:
            found.pop("measure", None)
        return found

    @property
    def filters(self) -> int:
        """How many filters are set."""
        ranged = self.low is not None or self.high is not None
        return sum(map(bool, (self.q, self.label, self.predicted, self.right != "any", ranged)))

    def unfiltered(self) -> View:
        """The same view of everything."""
        return replace(self, q="", label=(), predicted=(), right="any", low=None, high=None, page=1)


NAMES = tuple(View.__dataclass_fields__)


@dataclass(frozen=True)
class Table:
    """A pack's maps, one a row in the pack's order, with what they are sorted and filtered by.

    Index ``entry_id``; columns ``image_id, file_name, title, method, target_name, label, label_name,
    predicted, predicted_name, right, first, text, name_key, label_key, predicted_key`` and
    ``measure:<key>``. ``label`` and ``predicted`` are keys of the choices or None.
    """

    rows: pd.DataFrame
    choices: Choices


def defaults(choices: Choices) -> View:
    """What a URL without parameters shows: the first method that is no control."""
    return View(
        method=next(iter(choices.under_test), ALL),
        measure=next(iter(choices.measures), ""),
    )


# ---------------------------------------------------------------------- the pack as a table


def table(pack: Pack) -> Table:
    """The pack's maps as a table; kept for the packs that were used last."""
    return _table(pack, f"{pack.id} {pack.version}")


@st.cache_resource(max_entries=4, show_spinner=False)
def _table(_pack: Pack, key: str) -> Table:
    return make_table(_pack.images, _pack.entries, _pack.metrics)


def make_table(images: pd.DataFrame, entries: pd.DataFrame, metrics: Sequence[Any]) -> Table:
    """See :func:`table`; the frames and metrics are those of a ``Pack``."""
    rows = entries[["image_id", "method", "target_name", "probability", "is_value"]].copy()
    of_image = images.reindex(rows["image_id"])
    for name in (
        "file_name",
        "title",
        "label_name",
        "predicted_name",
        "right",
        "confidence",
        "disagreement",
    ):
        rows[name] = of_image[name].to_numpy()
    choices: dict[str, dict[str, str]] = {}
    for name in ("label", "predicted"):
        each = zip(of_image[name], rows[f"{name}_name"], strict=True)
        keys = [_class_key(i, n) for i, n in each]
        rows[name] = pd.Series(keys, index=rows.index, dtype=object)
        choices[name] = _class_names(keys, rows[f"{name}_name"])
    measures = {}
    numbers = {key: (name, rows[key], None, "") for key, name in MEASURES.items()}
    for m in metrics:
        if m.key not in numbers and m.key not in SORTS:
            numbers[m.key] = (m.key, entries[m.key], m.higher_is_better, m.formula)
    for key, (name, column, better, formula) in numbers.items():
        values = pd.to_numeric(column, errors="coerce")
        values = values.where(values.abs() < math.inf)
        if values.notna().any():
            rows[f"measure:{key}"] = values.astype(float)
            measures[key] = Measure(
                key, name, float(values.min()), float(values.max()), better, formula
            )
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
    methods = tuple(dict.fromkeys(rows["method"]))
    return Table(
        rows,
        Choices(
            methods=methods,
            measures=measures,
            labels=choices["label"],
            predicted=choices["predicted"],
            judged=bool(rows["right"].notna().any()),
            several=not bool(rows["first"].all()),
            controls=frozenset(rows["method"][entries["sanity"]]),
        ),
    )


def fold(text: object) -> str:
    """Text as it is compared: composed, without case."""
    return unicodedata.normalize("NFC", str(text)).casefold()


def _class_key(index: Any, name: Any) -> str | None:
    """A class in URLs: its index, or its name where it has no index."""
    if index is not None and index == index:
        return str(int(index))
    return name if isinstance(name, str) and name else None


def _class_names(keys: Sequence[str | None], names: Sequence[Any]) -> dict[str, str]:
    """{key: name}, by name; two classes of one name are told apart by their keys."""
    found: dict[str, str] = {}
    for key, name in zip(keys, names, strict=True):
        if key is not None:
            found.setdefault(key, name if isinstance(name, str) and name else f"class {key}")
    shown = list(found.values())
    double = {n for n in shown if shown.count(n) > 1} if len(set(shown)) < len(shown) else set()
    found = {k: f"{n} ({k})" if n in double else n for k, n in found.items()}
    return dict(sorted(found.items(), key=lambda item: fold(item[1])))


# ---------------------------------------------------------------------- selecting


def select(table: Table, view: View) -> pd.DataFrame:
    """The rows that pass the filters, in the view's order; missing values come last."""
    rows = table.rows
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
    if view.sort == "pack":
        return found if view.order == "asc" else found[::-1]
    column = f"{view.sort}_key" if view.sort in SORTS else f"measure:{view.sort}"
    return found.sort_values(
        column, ascending=view.order == "asc", kind="stable", na_position="last"
    )


def selected(pack: Pack, view: View) -> pd.DataFrame:
    """:func:`select`, kept for the views that were used last."""
    return _selected(pack, f"{pack.id} {pack.version}", replace(view, page=1, show="", size=0))


@st.cache_resource(max_entries=16, show_spinner=False)
def _selected(_pack: Pack, key: str, view: View) -> pd.DataFrame:
    return select(table(_pack), view)


def pages(count: int, size: int) -> int:
    """How many pages ``count`` maps take, at least one."""
    return max(1, math.ceil(count / size))


def neighbours(pack: Pack, view: View, image_id: str) -> tuple[str | None, str | None, int, int]:
    """The photos before and after one in a view, its number (from 1; 0: not in it) and their count."""
    ids = list(dict.fromkeys(selected(pack, view)["image_id"]))
    if image_id not in ids:
        return None, None, 0, len(ids)
    at = ids.index(image_id)
    before = ids[at - 1] if at else None
    after = ids[at + 1] if at + 1 < len(ids) else None
    return before, after, at + 1, len(ids)


# ---------------------------------------------------------------------- from a URL


def to_text(view: View, choices: Choices) -> str:
    """A view as one value of another page's URL, so that its way back leads to the same place."""
    return urlencode(view.params(choices), doseq=True)


def from_text(text: str, choices: Choices) -> View:
    """The view that :func:`to_text` wrote; what cannot be used leaves the defaults."""
    return parse(parse_qs(text[:LONGEST_TEXT]), choices)[0]


def parse(params: Mapping[str, Sequence[str]], choices: Choices) -> tuple[View, list[str]]:
    """The view of a URL's parameters ``{name: values}``, and what was wrong with them.

    Names that are not of a view are passed over; a value that cannot be used leaves the default.
    """
    usual = defaults(choices)
    messages: list[str] = []
    found: dict[str, Any] = {}

    def last(name: str) -> str | None:
        values = params.get(name) or ()
        return values[-1] if len(values) else None

    def refuse(name: str, value: str, instead: str) -> None:
        messages.append(f"{name}: there is no {_short(value)}; {instead}.")

    options: dict[str, tuple[Mapping[str, Any] | Sequence[str], str]] = {
        "method": ((*choices.methods, ALL), f"maps by {usual.method} are shown"),
        "maps": (MAPS, "the most probable class is shown"),
        "sort": (choices.sorts, "maps are in the order of the pack"),
        "order": (ORDERS, "the order is ascending"),
        "show": (SHOWS, "maps are shown"),
        "size": ([str(s) for s in SIZES], f"{usual.size} a page are shown"),
        "right": (RIGHT, "right and wrong are shown"),
        "measure": (choices.measures, "its range is not used"),
    }
    for name, (known, instead) in options.items():
        value = last(name)
        if value is None:
            continue
        if value in known:
            found[name] = int(value) if name == "size" else value
        else:
            refuse(name, value, instead)
    classes = {"label": choices.labels, "predicted": choices.predicted}
    for name, known in classes.items():
        good = []
        for value in dict.fromkeys(params.get(name) or ()):
            if value in known:
                good.append(value)
            else:
                refuse(name, value, "this class is left out of the filter")
        found[name] = tuple(good)
    if (page := last("page")) is not None:
        number = _number(page)
        if number is None or number < 1 or number != int(number):
            messages.append(f"page: got {_short(page)}; give a number from 1. Page 1 is shown.")
        else:
            found["page"] = int(number)
    if (search := last("q")) is not None:
        found["q"] = " ".join(search.split())[:SEARCH_LENGTH]
    messages += _parse_range(last("low"), last("high"), "measure" in found, found, params, usual)
    return replace(usual, **found), messages


def _parse_range(
    low: str | None,
    high: str | None,
    known: bool,
    found: dict[str, Any],
    params: Mapping[str, Sequence[str]],
    usual: View,
) -> list[str]:
    """Read the range into ``found``; returns messages."""
    if low is None and high is None:
        return []
    if not known and params.get("measure"):
        return []  # the measure was refused, and its range with it
    if not usual.measure:
        return ["low, high: this pack has no measure; the range is not used."]
    messages = []
    for name, text in (("low", low), ("high", high)):
        if text is None:
            continue
        value = _number(text)
        if value is None:
            messages.append(f"{name}: got {_short(text)}; give a number. The limit is not used.")
        else:
            found[name] = value
    if found.get("low", -math.inf) > found.get("high", math.inf):
        messages.append(
            f"low, high: {found['low']:g} is above {found['high']:g}; no range is used."
        )
        del found["low"], found["high"]
    return messages


def _number(text: str) -> float | None:
    """A finite number, at most 1e15, so that it can be shown and counted with; None if it is none."""
    try:
        value = float(text) if len(text) <= 40 else math.nan
    except ValueError:
        return None
    return value if abs(value) <= 1e15 else None


def _short(text: str) -> str:
    shown = text if len(text) <= 40 else text[:39] + "…"
    return f"“{shown}”"
