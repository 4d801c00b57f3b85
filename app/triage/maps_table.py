"""A pack's maps as DuckDB tables, and the choices for filters.

The pack's rows are checked and copied shard by shard into a separate database. The database can access
only its own file, which is in a private folder. Values reach SQL only as parameters, and this module
names all columns.
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
ENTRY: dict[str, str] = {  # columns of an entry besides its metrics, with their types
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
FILLING, MEMORY = (
    "256MB",
    "128MB",
)  # memory while filling and afterwards; beyond that it sorts on disk
THREADS = 4
RECENT = 64  # cached answers about single photos, since a page asks for the same many times
_ROW = (  # columns of `maps` that the gallery shows
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
# Columns of `maps` to sort by besides its numbers, and the text that is searched.
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
    """A number that maps are sorted and filtered by; ``low`` and ``high`` are its range in this pack.

    ``title`` is the name with its meaning in plain words, for lists; ``about`` says what it measures and
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
    """The choices that a pack offers; classes are ``{key: name}``."""

    methods: tuple[str, ...]
    measures: Mapping[str, Measure]
    labels: Mapping[str, str]
    predicted: Mapping[str, str]
    judged: bool  # for some photo it is known whether the prediction is right
    several: bool  # some photo has maps of several classes by one method
    controls: frozenset[str] = frozenset()  # methods that are sanity controls, not explanations
    # For "label" and "predicted", the number of photos of each class.
    photos: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def under_test(self) -> tuple[str, ...]:
        """The methods that are not controls; all methods if there are only controls."""
        return tuple(m for m in self.methods if m not in self.controls) or self.methods

    @property
    def sorts(self) -> dict[str, str]:
        """The sort orders: keys with their names."""
        found = dict(SORTS)
        if not self.labels:
            del found["label"]
        if not self.predicted:
            del found["predicted"]
        return found | {m.key: m.title for m in self.measures.values()}


class MapsTable:
    """A pack's maps in a separate database; safe to share between threads.

    The table ``maps`` has one row per map and these columns:

    * ``n``, the map's index in the pack, and ``m``, the index of its image;
    * ``is_first``, whether it is its method's map of the image's most probable class;
    * the columns of ``ENTRY`` and ``IMAGE``;
    * ``label_id`` and ``predicted_id``, keys of the choices or NULL;
    * the measures, each in the column that :meth:`column` gives; NULL if missing or infinite.

    Attributes:
        image_of: (maps,) int32, the index of each map's image.
        remember_rows: called with the indices of the rows that were read, see :meth:`Pack.remember_rows`.

    Raises:
        PackError: the pack's tables cannot be read or do not match, or there is no room for the copy.
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
        """The SQL column of a measure."""
        return measure if measure in MEASURES else self._metrics[measure]

    def numbers(self, query: str, parameters: Sequence[Any] = ()) -> np.ndarray:
        """The first column of a query's result, int32."""
        with self._lock, pack_errors():
            columns = self._database.execute(query, parameters).fetchnumpy()
        return np.asarray(next(iter(columns.values())), dtype=np.int32)

    def answer(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query's result."""
        with self._lock, pack_errors():
            return self._database.execute(query, parameters).fetchall()

    # ------------------------------------------------------------------ rows

    def rows(self, places: np.ndarray) -> pd.DataFrame:
        """The maps at these indices of the pack, in this order, for the gallery.

        Index ``entry_id``; columns ``image_id, file_name, title, method, target_name, probability,
        is_value, label, label_name, predicted, predicted_name, right, confidence, disagreement`` and
        ``measure:KEY``. ``label`` and ``predicted`` are keys of the choices or None.
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
        """All values of the maps at these indices and of their images; see :attr:`header`."""
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
        """These columns of ``maps`` at these indices, in this order."""
        names = list(columns)
        query = f"SELECT n, {sql_list(names)} FROM maps WHERE n IN (SELECT unnest($1::INTEGER[]))"
        found = {row[0]: row[1:] for row in self.answer(query, [places.tolist()])}
        return [_shown(names, found[place]) for place in places.tolist()]

    def ids(self, places: np.ndarray) -> list[str]:
        """The ids of the maps at these indices, in this order."""
        return [id for (id,) in self._at(places, ["entry_id"])]

    def image_id(self, place: int) -> str:
        """The id of the image at an index."""
        return self.image_ids(np.array([place]))[0]

    def image_ids(self, places: np.ndarray) -> list[str]:
        """The ids of the images at these indices, in this order."""
        query = "SELECT rowid, image_id FROM images WHERE rowid IN (SELECT unnest($1::BIGINT[]))"
        found = dict(self.answer(query, [places.tolist()]))
        return [str(found[place]) for place in places.tolist()]

    def every_image_id(self) -> Iterator[str]:
        """The ids of all images, sorted."""
        for (image_id,) in self.answer("SELECT image_id FROM images ORDER BY image_id"):
            yield image_id

    def known_images(self, image_ids: Sequence[str]) -> set[str]:
        """The given ids that belong to images of the pack."""
        query = "SELECT image_id FROM images WHERE image_id IN (SELECT unnest($1::VARCHAR[]))"
        return {id for (id,) in self.answer(query, [list(image_ids)])}

    def entries_of(self, image_id: str) -> pd.DataFrame:
        """The maps of one image in the form of :attr:`Pack.entries`; empty for an unknown image.

        The table is cached, so do not change it."""
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
        """For each of these images, by its id, the method's map of the image's most probable class; the
        images with the most probable classes come first."""
        query = """SELECT image_id, entry_id, n, m FROM maps WHERE method = $1 AND is_first
            AND image_id IN (SELECT unnest($2::VARCHAR[])) ORDER BY probability DESC, n"""
        found = self.answer(query, [method, list(image_ids)])
        self.remember_rows({row[1]: row[2] for row in found}, {row[0]: row[3] for row in found})
        return {row[0]: row[1] for row in found}

    def image(self, image_id: str) -> Mapping[str, Any] | None:
        """The row of one image with the columns of :attr:`Pack.images`; None for an unknown image."""
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
        """The image of a map; None for an unknown map."""
        found = self.answer("SELECT image_id FROM entries WHERE entry_id = $1", [entry_id])
        return str(found[0][0]) if found else None

    # ------------------------------------------------------------------ filling

    def _fill(self, pack: Pack) -> None:
        """Copy the pack, then block the database's access to other files."""
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
            own = source == "images"  # a metric may be named like a column of images
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
        """The classes of ``label`` or ``predicted``: their names and numbers of photos by key."""
        found = self.answer(
            f"SELECT {name}_id, arg_min_null({name}_name, rowid), count(*) FROM images "
            f"WHERE {name}_id IS NOT NULL GROUP BY 1"
        )
        names = class_names({key: visible(shown or f"class {key}") for key, shown, _ in found})
        counts = {key: count for key, _, count in found}
        return names, {key: counts[key] for key in names}


def table(pack: Pack) -> MapsTable:
    """The pack's maps as a table, cached for the packs that were used last."""
    found: MapsTable = _table(pack)
    found.remember_rows = pack.remember_rows  # it may have been opened again since
    return found


@cache_by_version(4)
def _table(pack: Pack) -> MapsTable:
    return MapsTable(pack)


def class_names(found: Mapping[str, str]) -> dict[str, str]:
    """The names of classes; if two classes share a name, their keys are added."""
    times = Counter(found.values())
    shown = {key: f"{name} ({key})" if times[name] > 1 else name for key, name in found.items()}
    return dict(sorted(shown.items(), key=lambda item: fold(item[1])))


def _shown(columns: Sequence[str], row: tuple[Any, ...]) -> tuple[Any, ...]:
    """A row with control characters made visible, since names in Parquet files are untrusted."""
    each = zip(columns, row, strict=True)
    return tuple(visible(v) if c in _NAMES and v is not None else v for c, v in each)


# ---------------------------------------------------------------------- the database


def fold(text: object) -> str:
    """Text normalised for comparison: composed and case-folded."""
    return unicodedata.normalize("NFC", str(text)).casefold()


_SCRATCH: list[Scratch] = []


def scratch() -> Scratch:
    """The folder for this process's databases, deleted when the viewer ends."""
    if not (_SCRATCH and _SCRATCH[-1].path.is_dir()):
        _SCRATCH.append(Scratch())
    return _SCRATCH[-1]


def connect(folder: Path) -> duckdb.DuckDBPyConnection:
    """An empty database in a folder, with enough memory for filling it; it loads no extensions."""
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
    database.execute("PRAGMA force_compression = 'uncompressed'")  # faster, but needs more disk
    # ASCII needs no Python.
    database.create_function("fold_any", fold, ["VARCHAR"], "VARCHAR")
    database.execute(
        "CREATE MACRO fold(s) AS CASE WHEN strlen(s) = length(s) THEN lower(s) ELSE fold_any(s) END"
    )
    return database


def batches(tables: Iterable[pa.Table], names: Sequence[str]) -> pa.RecordBatchReader:
    """Tables one after another, with their columns renamed."""
    renamed = (table.rename_columns(list(names)) for table in tables)
    first = next(renamed)
    return pa.RecordBatchReader.from_batches(
        first.schema, (batch for table in chain([first], renamed) for batch in table.to_batches())
    )


def sql_list(columns: Iterable[str]) -> str:
    """Column names as an SQL list; they are the viewer's own names, never a pack's."""
    return ", ".join(f'"{column}"' for column in columns)


@contextmanager
def pack_errors() -> Iterator[None]:
    """Turn an error of DuckDB into a :class:`PackError`."""
    try:
        yield
    except (duckdb.Error, pa.ArrowException) as error:
        raise PackError(
            f"The pack's tables cannot be read ({short_reason(error)}); {AGAIN}"
        ) from None
