"""A selection of a pack's maps: filters, order and page, read from a URL and written to one.

Everything here depends only on the pack and the parameters; bad parameters are replaced by defaults, with a
message. Queries go to the pack's database, see :mod:`xattn.app.triage.maps_table`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

import numpy as np
import pandas as pd

from xattn.app.pictures import rendering
from xattn.app.state import cache_by_version
from xattn.app.triage import tag_files
from xattn.app.triage.maps_table import IMAGE, KEYS, TEXT, Choices, MapsTable, fold, table
from xattn.app.triage.store import BEST, DIGEST, TAG_LENGTH
from xattn.runtime.names import encodable

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

ALL = "all"  # every method
SIZES = (24, 36, 60)
SHOWS = ("overlay", "outline", "spotlight", "photo")
PARTS = ("crop", "whole")  # the part of a photo that the model saw, or all of it
MAPS = {"first": "Most probable class", "every": "Every explained class"}
RIGHT = {"any": "Right and wrong", "right": "Right", "wrong": "Wrong"}
NOTES = {"any": "With or without a note", "with": "With a note"}
RATINGS = (
    {0: "Any rating"} | {n: f"{n} stars or more" for n in range(1, BEST)} | {BEST: f"{BEST} stars"}
)
MOST_TAGS = 50  # most tags in a view's filter
ORDERS = ("asc", "desc")
BINS = 32  # bins of a histogram
LARGEST = 1e15  # largest number in an address, so that it can be shown and computed with
SEARCH_LENGTH = 200  # characters
LONGEST_TEXT = 8000  # most characters of a view in another page's URL


@dataclass(frozen=True)
class View:
    """The gallery's settings; field names and values are the same as in the URL."""

    method: str = ALL
    maps: str = "first"
    sort: str = "pack"
    order: str = "asc"
    show: str = "overlay"
    part: str = "crop"
    scale: str = "map"
    colours: str = "auto"
    size: int = SIZES[0]
    page: int = 1
    q: str = ""
    label: tuple[str, ...] = ()
    predicted: tuple[str, ...] = ()
    right: str = "any"
    measure: str = ""
    low: float | None = None
    high: float | None = None
    tag: tuple[str, ...] = ()  # a photo has to have one of them
    rating: int = 0  # stars that it has to have, at least
    note: str = "any"
    only: str = ""  # the digest of a selection of photos, see :mod:`xattn.app.navigation.chosen`

    def params(self, choices: Choices) -> dict[str, list[str]]:
        """The URL parameters that differ from the pack's defaults."""
        usual = defaults(choices)
        found = {}
        for name in NAMES:
            value = getattr(self, name)
            if name == "order":
                usual = replace(usual, order=first_order(self.sort))
            if value != getattr(usual, name) and value is not None:
                found[name] = list(value) if isinstance(value, tuple) else [str(value)]
        if self.low is None and self.high is None:
            found.pop("measure", None)
        return found

    @property
    def filters(self) -> int:
        """How many filters are set."""
        ranged = self.low is not None or self.high is not None
        own = self.q, self.label, self.predicted, self.right != "any", ranged
        return sum(map(bool, (*own, self.tag, self.rating, self.note != "any", self.only)))

    def unfiltered(self) -> View:
        """The same view without filters."""
        return replace(self, **UNFILTERED)


# The values of a view without filters.
UNFILTERED: dict[str, Any] = {
    name: getattr(View(), name)
    for name in (
        *("q", "label", "predicted", "right", "low", "high", "tag", "rating", "note", "only"),
        "page",
    )
}
NAMES = tuple(View.__dataclass_fields__)
# The fields that do not affect which maps are selected.
LOOK: dict[str, Any] = dict.fromkeys(("show", "part", "scale", "colours"), "")


def defaults(choices: Choices) -> View:
    """The view of a URL without parameters, which shows the first method that is not a control."""
    return View(
        method=next(iter(choices.under_test), ALL),
        measure=next(iter(choices.measures), ""),
    )


def first_order(sort: str) -> str:
    """The order in which maps are sorted until the person turns it: disagreement from the highest down."""
    return "desc" if sort == "disagreement" else "asc"


# ---------------------------------------------------------------------- selecting


class Selection:
    """The maps that pass a view's filters, in its order; missing values come last.

    Attributes:
        count: number of maps.
        places: (count,) int32, their indices in the pack.

    Args:
        marked: the photos that pass the view's filters of tags, rating and note; None without such filters.
    """

    def __init__(self, table: MapsTable, view: View, marked: Collection[str] | None = None) -> None:
        self._table = table
        where, parameters = _where(table, view, marked)
        self.places = table.numbers(
            f"SELECT n FROM maps WHERE {where} ORDER BY {_order(table, view)}", parameters
        )
        self.count = len(self.places)

    def rows(self, start: int = 0, n: int | None = None) -> pd.DataFrame:
        """At most ``n`` maps from number ``start`` on; see :meth:`MapsTable.rows`."""
        return self._table.rows(self.places[start : None if n is None else start + n])

    def ids(self, limit: int | None = None) -> list[str]:
        """The ids of the first ``limit`` maps."""
        return self._table.ids(self.places[:limit])

    @property
    def header(self) -> list[str]:
        """The names of the values of :meth:`lines`."""
        return self._table.header

    def lines(self, start: int, n: int) -> list[tuple[Any, ...]]:
        """All values of ``n`` maps from number ``start`` on; see :meth:`MapsTable.lines`."""
        return self._table.lines(self.places[start : start + n])

    def photos(self, limit: int | None = None) -> list[str]:
        """The ids of the first ``limit`` images."""
        return self._table.image_ids(self.images[:limit])

    @cached_property
    def images(self) -> np.ndarray:
        """The indices of the images without repetition, in the order of their first maps."""
        return pd.unique(self._table.image_of[self.places])

    def neighbours(self, image_id: str) -> tuple[str | None, str | None, int, int]:
        """The previous and next photo, this photo's number (from 1; 0: not selected) and their count."""
        found = self._table.numbers("SELECT rowid FROM images WHERE image_id = $1", [image_id])
        at = np.flatnonzero(np.isin(self.images, found))
        if not len(at):
            return None, None, 0, len(self.images)
        here = int(at[0])
        beside = [i for i in (here - 1, here + 1) if 0 <= i < len(self.images)]
        ids = dict(zip(beside, self._table.image_ids(self.images[beside]), strict=True))
        return ids.get(here - 1), ids.get(here + 1), here + 1, len(self.images)


def select(pack: Pack, view: View) -> Selection:
    """The selection of a view, cached for the views that were used last."""
    revision, marked = tag_files.filter_photos(pack, view) or ("", None)
    return _selected(pack, revision, replace(view, page=1, size=0, **LOOK), marked)


@cache_by_version(16)
def _selected(pack: Pack, revision: str, view: View, _marked: Collection[str] | None) -> Selection:
    return Selection(table(pack), view, _marked)


def histogram(pack: Pack, view: View) -> list[int]:
    """The numbers of maps in ``BINS`` equal parts of the measure's range, ignoring the view's own range.

    [] if all values are equal, or too large to be typed as a limit."""
    no_order: dict[str, Any] = {"sort": "pack", "order": "asc", "page": 1, "size": 0}
    everywhere = replace(view, low=None, high=None, **no_order, **LOOK)
    revision, marked = tag_files.filter_photos(pack, view) or ("", None)
    return _histogram(pack, revision, everywhere, marked)


@cache_by_version(64)
def _histogram(pack: Pack, revision: str, view: View, _marked: Collection[str] | None) -> list[int]:
    own = table(pack)
    measure, column = own.choices.measures[view.measure], own.column(view.measure)
    where, parameters = _where(own, view, _marked)
    span = measure.high - measure.low
    if not 0 < span <= LARGEST:
        return []
    counts = [0] * BINS
    for i, count in own.answer(
        f"SELECT least(CAST(floor(({column} - ?) / ? * ?) AS INTEGER), ?), count(*) FROM maps "
        f"WHERE {where} AND {column} IS NOT NULL GROUP BY 1",
        [measure.low, span, BINS, BINS - 1, *parameters],
    ):
        counts[i] += count
    return counts


def _where(table: MapsTable, view: View, marked: Collection[str] | None) -> tuple[str, list[Any]]:
    """The filters as an SQL condition with its parameters."""
    conditions: list[str] = ["true"]
    parameters: list[Any] = []

    def add(condition: str, *values: Any) -> None:
        conditions.append(condition)
        parameters.extend(values)

    if view.method != ALL:
        add("method = ?", view.method)
    if view.maps == "first":
        add("is_first")
    if marked is not None:
        add("image_id IN (SELECT unnest(?::VARCHAR[]))", list(marked))
    for name in ("label", "predicted"):
        if classes := getattr(view, name):
            add(f"list_contains(?::VARCHAR[], {name}_id)", list(classes))
    if view.right != "any":
        add('"right" = ?', view.right == "right")
    for limit, comparison in ((view.low, ">="), (view.high, "<=")):
        if limit is not None:
            add(f"{table.column(view.measure)} {comparison} ?", limit)
    for word in fold(view.q).split():
        add(f"contains({TEXT}, ?)", word)
    return " AND ".join(conditions), parameters


def _order(table: MapsTable, view: View) -> str:
    """The sort order in SQL; equal maps stay in the pack's order. The maps of all methods stay together by
    photo, which is placed by the one that comes first."""
    direction = "ASC" if view.order == "asc" else "DESC"
    key = KEYS.get(view.sort) or table.column(view.sort)
    if view.method != ALL:
        return f"{key} {direction} NULLS LAST, n"
    if view.sort not in IMAGE and view.sort not in KEYS:
        key = f"{'min' if view.order == 'asc' else 'max'}({key}) OVER (PARTITION BY m)"
    return f"{'m' if view.sort == 'pack' else key} {direction} NULLS LAST, m, n"


def pages(count: int, size: int) -> int:
    """How many pages ``count`` maps take, at least one."""
    return max(1, math.ceil(count / size))


# ---------------------------------------------------------------------- from a URL


def to_text(view: View, choices: Choices) -> str:
    """A view as a single value in another page's URL, so that Back leads to the same place."""
    return urlencode(view.params(choices), doseq=True)


def from_text(text: str, choices: Choices) -> View:
    """The view that :func:`to_text` wrote; unusable values are replaced by defaults."""
    return parse(parse_qs(text[:LONGEST_TEXT]), choices)[0]


def parse(params: Mapping[str, Sequence[str]], choices: Choices) -> tuple[View, list[str]]:
    """The view of a URL's parameters ``{name: values}``, and messages about what was wrong with them.

    Unknown names are ignored, and unusable values are replaced by defaults.
    """
    usual = defaults(choices)
    messages: list[str] = []
    found: dict[str, Any] = {}
    options: dict[str, Collection[str]] = {
        "method": (*choices.methods, ALL),
        "maps": MAPS,
        "sort": choices.sorts,
        "order": ORDERS,
        "show": SHOWS,
        "part": PARTS,
        "scale": rendering.SCALES,
        "colours": rendering.COLOURS,
        "size": [str(s) for s in SIZES],
        "right": RIGHT,
        "measure": choices.measures,
        "rating": list(map(str, RATINGS)),
        "note": NOTES,
    }

    def last(name: str) -> list[str]:
        return list(params.get(name) or ())[-1:]

    def known(name: str, values: Iterable[str], options: Collection[str]) -> tuple[str, ...]:
        """The values that exist in the pack; each other value adds a message."""
        each = list(dict.fromkeys(values))
        gone = [value for value in each if value not in options]
        messages.extend(f"{name}: there is no {_short(v)}; it is left out." for v in gone)
        return tuple(value for value in each if value in options)

    for name, values in options.items():
        for value in known(name, last(name), values):
            found[name] = int(value) if name in ("size", "rating") else value
    found.setdefault("order", first_order(found.get("sort", usual.sort)))
    for name, classes in (("label", choices.labels), ("predicted", choices.predicted)):
        found[name] = known(name, params.get(name) or (), classes)
    tags = [" ".join(encodable(tag).split())[:TAG_LENGTH] for tag in params.get("tag") or ()]
    found["tag"] = tuple(dict.fromkeys(filter(None, tags)))[:MOST_TAGS]
    for text in last("only"):
        if DIGEST.fullmatch(text):
            found["only"] = text
        else:
            messages.append(f"only: there is no selection {_short(text)}; it is left out.")
    for text in last("q"):
        found["q"] = " ".join(encodable(text).split())[:SEARCH_LENGTH]
    for name in ("page", "low", "high"):
        for text in last(name):
            number = _number(text)
            if number is None or (name == "page" and (number < 1 or number % 1)):
                want = "a number from 1" if name == "page" else "a number"
                messages.append(f"{name}: got {_short(text)}; give {want}. It is left out.")
            else:
                found[name] = int(number) if name == "page" else number
    wrong = ""
    if not usual.measure and (last("low") or last("high")):
        wrong = "low, high: this pack has no measure to filter by; the range is not used."
    elif found.get("low", -math.inf) > found.get("high", math.inf):
        wrong = f"low, high: {found['low']:g} is above {found['high']:g}; no range is used."
    if wrong:
        messages.append(wrong)
    of_another = bool(params.get("measure")) and "measure" not in found
    if wrong or of_another:
        found.pop("low", None)
        found.pop("high", None)
    return replace(usual, **found), messages


def _number(text: str) -> float | None:
    """A finite number of at most ``LARGEST``; None if the text is not one."""
    try:
        value = float(text) if len(text) <= 40 else math.nan
    except ValueError:
        return None
    return value if abs(value) <= LARGEST else None


def _short(text: str) -> str:
    shown = text if len(text) <= 40 else text[:39] + "…"
    return f"“{shown}”"
