"""Selects maps of a pack by filters, order and page, which are read from a URL and written to it.

The result depends only on the pack, its tag file and the parameters. Invalid parameters are replaced by
defaults, and a message is shown. Queries are run on the database of the pack, see
:mod:`xattn.app.triage.maps_table`.
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

ALL = "all"  # the maps of all methods
SIZES = (24, 36, 60)
SHOWS = ("overlay", "outline", "spotlight", "photo")
PARTS = ("crop", "whole")  # the part of a photo that the model saw, or the complete photo
MAPS = {"first": "Most probable class", "every": "Every explained class"}
RIGHT = {"any": "Right and wrong", "right": "Right", "wrong": "Wrong"}
NOTES = {"any": "With or without a note", "with": "With a note"}
RATINGS = (
    {0: "Any rating"} | {n: f"{n} stars or more" for n in range(1, BEST)} | {BEST: f"{BEST} stars"}
)
MOST_TAGS = 50  # largest number of tags in a filter
ORDERS = ("asc", "desc")
BINS = 32  # bins of a histogram
LARGEST = 1e15  # largest number that a URL may contain
SEARCH_LENGTH = 200  # largest number of characters of a search
LONGEST_TEXT = 8000  # largest number of characters of a view in the URL of another page


@dataclass(frozen=True)
class View:
    """The settings of the gallery; fields have the same names and values as the URL parameters."""

    method: str = ALL
    maps: str = "first"
    sort: str = "pack"
    order: str = "asc"
    show: str = "overlay"
    part: str = "crop"
    scale: str = "auto"
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
    tag: tuple[str, ...] = ()  # a photo must have at least one of these tags
    rating: int = 0  # a photo must have at least this many stars
    note: str = "any"
    only: str = ""  # the digest of a set of photos, see :mod:`xattn.app.navigation.chosen`

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
        """The number of filters that are set."""
        ranged = self.low is not None or self.high is not None
        own = self.q, self.label, self.predicted, self.right != "any", ranged
        return sum(map(bool, (*own, self.tag, self.rating, self.note != "any", self.only)))

    def unfiltered(self) -> View:
        """The same view without filters."""
        return replace(self, **UNFILTERED)


# The fields of a view that filters affect, with their values when there are no filters.
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
    """The view of a URL without parameters, which shows the first method that is not a sanity row."""
    return View(
        method=next(iter(choices.under_test), ALL),
        measure=next(iter(choices.measures), ""),
    )


def first_order(sort: str) -> str:
    """The default direction of a sort order; it is "desc" for disagreement and "asc" for all others."""
    return "desc" if sort == "disagreement" else "asc"


# ---------------------------------------------------------------------- selecting


class Selection:
    """The maps that pass the filters of a view, in its order; maps without a value come last.

    Attributes:
        count: the number of maps.
        places: (count,) int32, the indices of the maps in the pack.

    Args:
        marked: the ids of the photos that pass the filters for tags, rating, note and selection; None if
            the view has no such filter.
    """

    def __init__(self, table: MapsTable, view: View, marked: Collection[str] | None = None) -> None:
        self._table = table
        where, parameters = _where(table, view, marked)
        self.places = table.numbers(
            f"SELECT n FROM maps WHERE {where} ORDER BY {_order(table, view)}", parameters
        )
        self.count = len(self.places)

    def rows(self, start: int = 0, n: int | None = None) -> pd.DataFrame:
        """A table of at most ``n`` maps, beginning with number ``start``; see :meth:`MapsTable.rows`."""
        return self._table.rows(self.places[start : None if n is None else start + n])

    def ids(self, limit: int | None = None) -> list[str]:
        """The ids of the first ``limit`` maps."""
        return self._table.ids(self.places[:limit])

    @property
    def header(self) -> list[str]:
        """The names of the values in :meth:`lines`."""
        return self._table.header

    def lines(self, start: int, n: int) -> list[tuple[Any, ...]]:
        """All values of ``n`` maps, beginning with number ``start``; see :meth:`MapsTable.lines`."""
        return self._table.lines(self.places[start : start + n])

    def photos(self, limit: int | None = None) -> list[str]:
        """The ids of the first ``limit`` images."""
        return self._table.image_ids(self.images[:limit])

    @cached_property
    def images(self) -> np.ndarray:
        """The indices of the images, each once, in the order of their first maps."""
        return pd.unique(self._table.image_of[self.places])

    def neighbours(self, image_id: str) -> tuple[str | None, str | None, int, int]:
        """The ids of the previous and the next photo, the number of this photo, and the number of photos.

        Photos are numbered from 1; 0 means that this photo is not in the selection.
        """
        found = self._table.numbers("SELECT rowid FROM images WHERE image_id = $1", [image_id])
        at = np.flatnonzero(np.isin(self.images, found))
        if not len(at):
            return None, None, 0, len(self.images)
        here = int(at[0])
        beside = [i for i in (here - 1, here + 1) if 0 <= i < len(self.images)]
        ids = dict(zip(beside, self._table.image_ids(self.images[beside]), strict=True))
        return ids.get(here - 1), ids.get(here + 1), here + 1, len(self.images)


def select(pack: Pack, view: View) -> Selection:
    """The selection of a view, which is cached for the most recently used views."""
    revision, marked = tag_files.filter_photos(pack, view) or ("", None)
    return _selected(pack, revision, replace(view, page=1, size=0, **LOOK), marked)


@cache_by_version(16)
def _selected(pack: Pack, revision: str, view: View, _marked: Collection[str] | None) -> Selection:
    return Selection(table(pack), view, _marked)


def histogram(pack: Pack, view: View) -> list[int]:
    """The numbers of maps in ``BINS`` equal parts of the measure's range.

    All filters of the view except its range are applied. The result is empty if all values are equal, or if
    the range is too large.
    """
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
    """The filters of a view as an SQL condition with its parameters."""
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
    """The sort order of a view in SQL; maps with equal values are in the order of the pack.

    If all methods are shown, the maps of a photo are kept together, at the place of the one that comes
    first.
    """
    direction = "ASC" if view.order == "asc" else "DESC"
    key = KEYS.get(view.sort) or table.column(view.sort)
    if view.method != ALL:
        return f"{key} {direction} NULLS LAST, n"
    if view.sort not in IMAGE and view.sort not in KEYS:
        key = f"{'min' if view.order == 'asc' else 'max'}({key}) OVER (PARTITION BY m)"
    return f"{'m' if view.sort == 'pack' else key} {direction} NULLS LAST, m, n"


def pages(count: int, size: int) -> int:
    """The number of pages for ``count`` maps, which is at least 1."""
    return max(1, math.ceil(count / size))


# ---------------------------------------------------------------------- from a URL


def to_text(view: View, choices: Choices) -> str:
    """A view as a single value for the URL of another page, so that Back can return to this view."""
    return urlencode(view.params(choices), doseq=True)


def from_text(text: str, choices: Choices) -> View:
    """The view in a text from :func:`to_text`; invalid values are replaced by defaults."""
    return parse(parse_qs(text[:LONGEST_TEXT]), choices)[0]


def parse(params: Mapping[str, Sequence[str]], choices: Choices) -> tuple[View, list[str]]:
    """The view for URL parameters ``{name: values}``, and messages about invalid parameters.

    Unknown names are ignored, and invalid values are replaced by defaults.
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
        """Those of the values that are in ``options``; a message is added for every other value."""
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
    """The number in a text; None if the text is not a number, or its magnitude is above ``LARGEST``."""
    try:
        value = float(text) if len(text) <= 40 else math.nan
    except ValueError:
        return None
    return value if abs(value) <= LARGEST else None


def _short(text: str) -> str:
    shown = text if len(text) <= 40 else text[:39] + "…"
    return f"“{shown}”"
