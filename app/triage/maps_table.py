"""Copies the maps of a pack to DuckDB tables for sorting and filtering, and lists the choices for filters.

The rows of the pack are checked and copied shard by shard to a separate database, which can only access its
own file in a private folder. Values are passed to SQL only as parameters, and all column names come from
this module.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa

from xattn.app.scratch import Scratch
from xattn.app.state import cache_by_version
from xattn.eval.metric_words import name_and_title, with_direction
from xattn.packs.columns import METRIC
from xattn.packs.contained_files import AGAIN, PackError
from xattn.runtime.lru_cache import LRUCache
from xattn.runtime.names import short_reason, visible

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

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
ENTRY: dict[str, str] = {  # the columns of an entry, except its metrics, with their types
    "entry_id": "VARCHAR",
    "image_id": "VARCHAR",
    "method": "VARCHAR",
    "target": "BIGINT",
    "target_name": "VARCHAR",
    "probability": "DOUBLE",
    "is_value": "BOOLEAN",
    "is_mask": "BOOLEAN",
    "sanity": "BOOLEAN",
    "min": "DOUBLE",
    "max": "DOUBLE",
}
IMAGE: dict[str, str] = {
    "image_id": "VARCHAR",
    "file_name": "VARCHAR",
    "title": "VARCHAR",
    "label": "BIGINT",
    "label_name": "VARCHAR",
    "predicted": "BIGINT",
    "predicted_name": "VARCHAR",
    "confidence": "DOUBLE",
    "right": "BOOLEAN",
    "disagreement": "DOUBLE",
    "methods": "BIGINT",
}
# Memory limit while filling and afterwards; larger sorts use the disk.
FILLING, MEMORY = "256MB", "128MB"
THREADS = 4
RECENT = 64  # cached results for single photos, which a page requests many times
_ROW = (  # the columns of `maps` that the gallery shows
    *("image_id", "file_name", "title", "method", "target_name", "probability", "is_value"),
    *("label_id", "label_name", "predicted_id", "predicted_name", "right", "confidence"),
    "disagreement",
)
_NAMES = {"file_name", "title", "target_name", "label_name", "predicted_name"}
_IMAGES = """CREATE TABLE images AS SELECT * REPLACE (
        CASE WHEN isfinite(confidence) THEN confidence END AS confidence,
        CASE WHEN isfinite(disagreement) THEN disagreement END AS disagreement),
    coalesce(CAST(label AS VARCHAR), nullif(label_name, '')) AS label_id,
    coalesce(CAST(predicted AS VARCHAR), nullif(predicted_name, '')) AS predicted_id
    FROM source_images"""
_PLACES = """CREATE TABLE places AS SELECT n, m, turn = 1 AS is_first FROM (
    SELECT CAST(entries.rowid AS INTEGER) AS n, CAST(images.rowid AS INTEGER) AS m, row_number() OVER (
        PARTITION BY images.rowid, method ORDER BY probability DESC, entries.rowid) AS turn
    FROM entries JOIN images USING (image_id)) ORDER BY n"""
_MAPS = """CREATE VIEW maps AS SELECT places.*, entries.* EXCLUDE (image_id), images.*
    FROM places JOIN entries ON entries.rowid = n JOIN images ON images.rowid = m"""
# The columns of `maps` by which it can be sorted, apart from measures, and the text that is searched.
KEYS = {
    "pack": "n",
    "name": "fold(coalesce(nullif(file_name, ''), image_id))",
    "label": "fold(label_name)",
    "predicted": "fold(predicted_name)",
}
TEXT = """concat_ws(chr(10), fold(title), fold(image_id), fold(label_name), fold(predicted_name),
    fold(target_name))"""


@dataclass(frozen=True)
class Measure:
    """A number by which maps can be sorted and filtered; ``low`` and ``high`` are its range in this pack.

    ``title`` is the name with a short explanation, for lists. ``about`` describes what is measured and
    which direction is better.
    """

    key: str
    name: str
    low: float
    high: float
    formula: str = ""
    title: str = ""
    about: str = ""


@dataclass(frozen=True)
class Choices:
    """The choices for filters and orders that a pack offers; ``labels`` and ``predicted`` map keys of
    classes to names."""

    methods: tuple[str, ...]
    measures: Mapping[str, Measure]
    labels: Mapping[str, str]
    predicted: Mapping[str, str]
    judged: bool  # whether it is known for any photo if its prediction is correct
    several: bool  # whether any photo has maps of several classes by the same method
    controls: frozenset[str] = frozenset()  # methods that are sanity rows
    # For "label" and "predicted", the number of photos of each class.
    photos: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def under_test(self) -> tuple[str, ...]:
        """The methods that are not sanity rows; if there are only sanity rows, all methods."""
        return tuple(m for m in self.methods if m not in self.controls) or self.methods

    @property
    def sorts(self) -> dict[str, str]:
        """The names of the available sort orders, by key."""
        found = dict(SORTS)
        if not self.labels:
            del found["label"]
        if not self.predicted:
            del found["predicted"]
        return found | {m.key: m.title for m in self.measures.values()}


class MapsTable:
    """The maps of a pack in a separate database, which threads can share.

    The table ``maps`` has one row per map and these columns:

    * ``n``, the index of the map in the pack, and ``m``, the index of its image;
    * ``is_first``, whether this is the map of the most probable class among the method's maps of the image;
    * the columns of ``ENTRY`` and ``IMAGE``;
    * ``label_id`` and ``predicted_id``, which are keys of the choices or NULL;
    * the measures, each in the column that :meth:`column` returns; NULL if missing or infinite.

    Attributes:
        image_of: (maps,) int32, the index of the image of each map.
        remember_rows: called with the indices of rows that were read, see :meth:`Pack.remember_rows`.

    Raises:
        PackError: the tables of the pack cannot be read or do not match, or the disk is too full for a
            copy.
    """

    def __init__(self, pack: Pack) -> None:
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(
            prefix="maps-", dir=scratch().path, ignore_cleanup_errors=True
        )
        self._metrics = {m.key: f"v{i}" for i, m in enumerate(pack.metrics)}
        self.remember_rows = pack.remember_rows
        self._recent = LRUCache(RECENT)
        with pack_errors():
            self._database = connect(Path(self._folder.name))
            self._fill(pack)
            self.choices = self._choices(pack)
            self.image_of = self.numbers("SELECT m FROM places ORDER BY n")
        if len(self.image_of) != pack.counts[0]:
            raise PackError(f"The pack's tables of maps and photos do not match; {AGAIN}")

    def column(self, measure: str) -> str:
        """The name of the SQL column that contains a measure."""
        return measure if measure in MEASURES else self._metrics[measure]

    def numbers(self, query: str, parameters: Sequence[Any] = ()) -> np.ndarray:
        """The first column of the result of a query, as int32."""
        with self._lock, pack_errors():
            columns = self._database.execute(query, parameters).fetchnumpy()
        return np.asarray(next(iter(columns.values())), dtype=np.int32)

    def answer(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of the result of a query."""
        with self._lock, pack_errors():
            return self._database.execute(query, parameters).fetchall()

    # ------------------------------------------------------------------ rows

    def rows(self, places: np.ndarray) -> pd.DataFrame:
        """A table for the gallery of the maps at these indices in the pack, in the given order.

        The index is ``entry_id``. The columns are ``image_id, file_name, title, method, target_name,
        probability, is_value, label, label_name, predicted, predicted_name, right, confidence,
        disagreement`` and ``measure:KEY`` for each measure. ``label`` and ``predicted`` are keys of the
        choices or None.
        """
        measures = {f"measure:{key}": self.column(key) for key in self.choices.measures}
        found = self._at(places, ("m", "entry_id", *_ROW, *measures.values()))
        self.remember_rows(
            {row[1]: place for row, place in zip(found, places.tolist(), strict=True)},
            {row[2]: row[0] for row in found},
        )
        table = pd.DataFrame(
            [row[1:] for row in found],
            columns=["entry_id", *(name.removesuffix("_id") for name in _ROW), *measures],
            dtype=object,
        ).rename(columns={"entry": "entry_id", "image": "image_id"})
        numbers = ("probability", "confidence", "disagreement", *measures)
        return table.astype(dict.fromkeys(numbers, float) | {"is_value": bool}).set_index(
            "entry_id"
        )

    def lines(self, places: np.ndarray) -> list[tuple[Any, ...]]:
        """All values of the maps at these indices and of their images, named by :attr:`header`."""
        return self._at(places, [column for _, column in self._line])

    @property
    def header(self) -> list[str]:
        """The names of the values in :meth:`lines`."""
        return [name for name, _ in self._line]

    @property
    def _line(self) -> list[tuple[str, str]]:
        of_image = [name for name in IMAGE if name not in ("image_id", "title", "methods")]
        own = [name for name in ENTRY if name not in ("image_id", "entry_id")]
        fixed = ("image_id", *of_image, "entry_id", *own)
        return [*((name, name) for name in fixed), *self._metrics.items()]

    def _at(self, places: np.ndarray, columns: Iterable[str]) -> list[tuple[Any, ...]]:
        """The values of some columns of ``maps`` at these indices, in the given order."""
        names = list(columns)
        query = f"SELECT n, {sql_list(names)} FROM maps WHERE n IN (SELECT unnest($1::INTEGER[]))"
        found = {row[0]: row[1:] for row in self.answer(query, [places.tolist()])}
        return [_shown(names, found[place]) for place in places.tolist()]

    def ids(self, places: np.ndarray) -> list[str]:
        """The ids of the maps at these indices, in the given order."""
        return [id for (id,) in self._at(places, ["entry_id"])]

    def image_id(self, place: int) -> str:
        """The id of the image with this index."""
        return self.image_ids(np.array([place]))[0]

    def image_ids(self, places: np.ndarray) -> list[str]:
        """The ids of the images with these indices, in the given order."""
        query = "SELECT rowid, image_id FROM images WHERE rowid IN (SELECT unnest($1::BIGINT[]))"
        found = dict(self.answer(query, [places.tolist()]))
        return [str(found[place]) for place in places.tolist()]

    def every_image_id(self) -> Iterator[str]:
        """Yield the ids of all images in sorted order."""
        for (image_id,) in self.answer("SELECT image_id FROM images ORDER BY image_id"):
            yield image_id

    def known_images(self, image_ids: Sequence[str]) -> set[str]:
        """Those of the given ids that belong to images of the pack."""
        query = "SELECT image_id FROM images WHERE image_id IN (SELECT unnest($1::VARCHAR[]))"
        return {id for (id,) in self.answer(query, [list(image_ids)])}

    def entries_of(self, image_id: str) -> pd.DataFrame:
        """The maps of one image as a table like :attr:`Pack.entries`, which is empty for an unknown image.

        The table is cached, so it must not be changed.
        """
        return self._recent.kept(("entries", image_id), lambda: self._entries_of(image_id))

    def _entries_of(self, image_id: str) -> pd.DataFrame:
        columns = (*ENTRY, *self._metrics.values())
        found = self.answer(
            f"SELECT n, m, {sql_list(columns)} FROM maps WHERE image_id = $1 ORDER BY n", [image_id]
        )
        self.remember_rows({row[2]: row[0] for row in found}, {row[3]: row[1] for row in found})
        rows = [_shown(columns, row[2:]) for row in found]
        ids, *values = zip(*rows, strict=True) if rows else ((),) * len(columns)
        names = [name for name in (*ENTRY, *self._metrics) if name != "entry_id"]
        table = pd.DataFrame(
            dict(zip(names, values, strict=True)), index=pd.Index(ids, name="entry_id")
        )
        return table.astype(dict.fromkeys(self._metrics, float))

    def first_maps(self, method: str, image_ids: Sequence[str]) -> dict[str, str]:
        """For each image id, the id of the method's map of the most probable class.

        The images are ordered by the probability of this class, highest first.
        """
        query = """SELECT image_id, entry_id, n, m FROM maps WHERE method = $1 AND is_first
            AND image_id IN (SELECT unnest($2::VARCHAR[])) ORDER BY probability DESC, n"""
        found = self.answer(query, [method, list(image_ids)])
        self.remember_rows({row[1]: row[2] for row in found}, {row[0]: row[3] for row in found})
        return {row[0]: row[1] for row in found}

    def image(self, image_id: str) -> Mapping[str, Any] | None:
        """The values of one image in the columns of :attr:`Pack.images`; None for an unknown image."""
        return self._recent.kept(("image", image_id), lambda: self._image(image_id))

    def _image(self, image_id: str) -> dict[str, Any] | None:
        for row in self.answer(
            f"SELECT {sql_list(IMAGE)} FROM images WHERE image_id = $1", [image_id]
        ):
            known = dict(zip(IMAGE, _shown(list(IMAGE), row), strict=True))
            numbers = ("confidence", "disagreement")
            return known | {name: math.nan for name in numbers if known[name] is None}
        return None

    def title(self, image_id: str) -> str:
        """The title of an image; its id if the pack has no such image."""
        return str((self.image(image_id) or {"title": image_id})["title"])

    def image_of_map(self, entry_id: str) -> str | None:
        """The id of the image of a map; None for an unknown map."""
        found = self.answer("SELECT image_id FROM entries WHERE entry_id = $1", [entry_id])
        return str(found[0][0]) if found else None

    # ------------------------------------------------------------------ filling

    def _fill(self, pack: Pack) -> None:
        """Copy the pack to the database, and then block the database's access to other files."""
        metrics = {METRIC + key: column for key, column in self._metrics.items()}
        for kind, types, own in (("entries", ENTRY, metrics), ("images", IMAGE, {})):
            renamed = {name: name for name in types} | own
            rows = batches(pack.rows(kind, list(renamed)), list(renamed.values()))
            self._database.register(f"given_{kind}", rows)
            kinds = types | dict.fromkeys(own.values(), "DOUBLE")
            cast = ", ".join(
                f'CAST("{name}" AS {kind}) AS "{name}"' for name, kind in kinds.items()
            )
            self._database.execute(
                f"CREATE TEMP VIEW source_{kind} AS SELECT {cast} FROM given_{kind}"
            )
        measured = [
            f"CASE WHEN isfinite({column}) THEN {column} END AS {column}"
            for column in self._metrics.values()
        ]
        self._database.execute(
            f"CREATE TABLE entries AS SELECT {', '.join([sql_list(ENTRY), *measured])} FROM source_entries"
        )
        for query in (
            *(_IMAGES, "DROP VIEW source_entries", "DROP VIEW source_images"),
            *("SET enable_external_access = false", _PLACES, _MAPS),
            *(f"SET memory_limit = '{MEMORY}'", "SET lock_configuration = true"),
        ):
            self._database.execute(query)

    def _choices(self, pack: Pack) -> Choices:
        methods = self.answer(
            "SELECT method, bool_or(sanity) FROM entries GROUP BY method ORDER BY min(rowid)"
        )
        described = {key: (name, "", name, "") for key, name in MEASURES.items()}
        for m in pack.metrics:
            if m.key not in MEASURES and m.key not in SORTS:
                about = with_direction(m.about, m.higher_is_better)
                described[m.key] = (m.key, m.formula, name_and_title(m.key, m.title), about)
        ends: dict[str, tuple[Any, Any]] = {}
        for source in ("images", "entries"):
            own = source == "images"  # a metric can have the same name as a column of images
            keys = [key for key in described if (key in MEASURES and key in IMAGE) == own]
            query = ", ".join(f"min({c}), max({c})" for c in map(self.column, keys))
            if keys:
                (found,) = self.answer(f"SELECT {query} FROM {source}")
                ends |= dict(zip(keys, zip(found[::2], found[1::2], strict=True), strict=True))
        measures = {
            key: Measure(key, name, ends[key][0], ends[key][1], *rest)
            for key, (name, *rest) in described.items()
            if ends[key][0] is not None
        }
        ((judged, several),) = self.answer(
            'SELECT (SELECT bool_or("right" IS NOT NULL) FROM images), '
            "(SELECT NOT bool_and(is_first) FROM places)"
        )
        classes, photos = {}, {}
        for name in ("label", "predicted"):
            classes[name], photos[name] = self._classes(name)
        return Choices(
            methods=tuple(method for method, _ in methods),
            measures=measures,
            labels=classes["label"],
            predicted=classes["predicted"],
            judged=bool(judged),
            several=bool(several),
            controls=frozenset(method for method, is_control in methods if is_control),
            photos=photos,
        )

    def _classes(self, name: str) -> tuple[dict[str, str], dict[str, int]]:
        """The names and the numbers of photos of the classes of ``label`` or ``predicted``, by key."""
        found = self.answer(
            f"SELECT {name}_id, arg_min_null({name}_name, rowid), count(*) FROM images "
            f"WHERE {name}_id IS NOT NULL GROUP BY 1"
        )
        names = class_names({key: visible(shown or f"class {key}") for key, shown, _ in found})
        counts = {key: count for key, _, count in found}
        return names, {key: counts[key] for key in names}


def table(pack: Pack) -> MapsTable:
    """The table of a pack's maps, which is cached for the most recently used packs."""
    found: MapsTable = _table(pack)
    found.remember_rows = pack.remember_rows  # the pack may have been opened again
    return found


@cache_by_version(4)
def _table(pack: Pack) -> MapsTable:
    return MapsTable(pack)


def class_names(found: Mapping[str, str]) -> dict[str, str]:
    """The sorted names of classes by key; if two classes have the same name, their keys are appended."""
    times = Counter(found.values())
    shown = {key: f"{name} ({key})" if times[name] > 1 else name for key, name in found.items()}
    return dict(sorted(shown.items(), key=lambda item: fold(item[1])))


def _shown(columns: Sequence[str], row: tuple[Any, ...]) -> tuple[Any, ...]:
    """A row in which control characters in names are made visible, since a pack's names are untrusted."""
    each = zip(columns, row, strict=True)
    return tuple(visible(v) if c in _NAMES and v is not None else v for c, v in each)


# ---------------------------------------------------------------------- the database


def fold(text: object) -> str:
    """Normalise a text for comparison, by composing its characters and folding its case."""
    return unicodedata.normalize("NFC", str(text)).casefold()


_SCRATCH: list[Scratch] = []


def scratch() -> Scratch:
    """The folder for the databases of this process, which is deleted when the viewer ends."""
    if not (_SCRATCH and _SCRATCH[-1].path.is_dir()):
        _SCRATCH.append(Scratch())
    return _SCRATCH[-1]


def connect(folder: Path) -> duckdb.DuckDBPyConnection:
    """Create an empty database in a folder; it has enough memory for filling it and loads no extensions."""
    database = duckdb.connect(
        str(folder / "maps.duckdb"),
        config={
            "memory_limit": FILLING,
            "threads": min(THREADS, os.cpu_count() or 1),
            "temp_directory": str(folder / "sorting"),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
        },
    )
    database.execute("PRAGMA force_compression = 'uncompressed'")  # faster, but needs more space
    # For ASCII texts, the slower Python function is not needed.
    database.create_function("fold_any", fold, ["VARCHAR"], "VARCHAR")
    database.execute(
        "CREATE MACRO fold(s) AS CASE WHEN strlen(s) = length(s) THEN lower(s) ELSE fold_any(s) END"
    )
    return database


def batches(tables: Iterable[pa.Table], names: Sequence[str]) -> pa.RecordBatchReader:
    """Read tables one after another as record batches, with renamed columns."""
    renamed = (table.rename_columns(list(names)) for table in tables)
    first = next(renamed)
    return pa.RecordBatchReader.from_batches(
        first.schema, (batch for table in chain([first], renamed) for batch in table.to_batches())
    )


def sql_list(columns: Iterable[str]) -> str:
    """Column names as an SQL list. The names must come from this program and never from a pack."""
    return ", ".join(f'"{column}"' for column in columns)


@contextmanager
def pack_errors() -> Iterator[None]:
    """Context manager that replaces an error of DuckDB by a :class:`PackError`."""
    try:
        yield
    except (duckdb.Error, pa.ArrowException) as error:
        raise PackError(
            f"The pack's tables cannot be read ({short_reason(error)}); {AGAIN}"
        ) from None
