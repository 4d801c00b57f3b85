"""The state of an evaluation: an SQLite file that a killed run goes on from, and that a user can open.

    meta(key, value)                              what the run is: protocol, backbone, metrics, methods
    images(position, id, target, target_name, score, skipped, note, digest)
    results(position, method, reason, tied, requests, seconds, measured, scores, map,
            failed)
    maps(position, method, height, width, data)
    tops(position, top)

``measured`` is JSON {column: value or null}: null is a value that is undefined, a missing column was
not measured. ``scores`` is JSON {key: [scores]}; ``map`` is a small grey PNG of the map; ``failed``
says which metrics raised, and why. A row is
committed once its image is finished for the method. ``data`` is the map as explained, float32, little
endian; ``top`` is JSON [[class, name, probability], ...]; both are there for as many of the first images
as a run was asked to keep, for packs. Of many processes each writes a file of its own,
``name.rankN.sqlite``; they are put together at the end.
"""

from __future__ import annotations

import glob
import json
import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta(key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS images(
    position INTEGER PRIMARY KEY, id TEXT, target INTEGER, target_name TEXT, score REAL,
    skipped TEXT, note TEXT, digest TEXT);
CREATE TABLE IF NOT EXISTS results(
    position INTEGER, method TEXT, reason TEXT, tied INTEGER, requests INTEGER, seconds REAL,
    measured TEXT, scores TEXT, map BLOB, failed TEXT, PRIMARY KEY(position, method));
CREATE TABLE IF NOT EXISTS maps(
    position INTEGER, method TEXT, height INTEGER, width INTEGER, data BLOB,
    PRIMARY KEY(position, method));
CREATE TABLE IF NOT EXISTS tops(position INTEGER PRIMARY KEY, top TEXT);
"""
_METHODS = "SELECT position, method FROM results WHERE position BETWEEN ? AND ?"
_INSERT_MAP = "INSERT OR REPLACE INTO maps VALUES (?, ?, ?, ?, ?)"
_INSERT_TOP = "INSERT OR REPLACE INTO tops VALUES (?, ?)"
_INSERT = "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


class ImageRow(NamedTuple):
    """``skipped`` says why it could not be read, ``note`` why its annotation cannot be used.

    ``digest`` is a hash of the pixels.
    """

    position: int
    id: str
    target: int | None
    target_name: str | None
    score: float | None
    skipped: str | None = None
    note: str | None = None
    digest: str | None = None


class ResultRow(NamedTuple):
    """``reason`` says why a map is invalid, or None; ``seconds`` is what explaining took."""

    position: int
    method: str
    reason: str | None
    tied: int
    requests: int
    seconds: float
    measured: dict[str, float]
    scores: dict[str, list[float]]
    map: bytes | None = None
    failed: str | None = None


class Store:
    """Reads and writes one state; ``path`` None keeps it in memory.

    Raises:
        ValueError: the file belongs to another run, or is no SQLite file.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path | None, facts: Mapping[str, Any], rank: int = 0) -> None:
        self.path = path
        own = ":memory:" if path is None else str(_ranked(path, rank))
        others = [] if path is None else [p for p in _files(path) if str(p) != own]
        try:
            self._own = sqlite3.connect(own, timeout=60)
            if path is not None:
                self._own.execute("PRAGMA journal_mode=WAL")
                self._own.execute("PRAGMA synchronous=NORMAL")
            self._own.executescript(_SCHEMA)
            self._others = [sqlite3.connect(str(p), timeout=60) for p in others]
            for database in self._all:
                self._check(database, facts)
            self._others = [database for database in self._others if _begun(database)]
        except sqlite3.DatabaseError as error:
            if "not a database" in str(error) or "malformed" in str(error):
                raise ValueError(
                    f"state: {path} is no SQLite file ({error}); give another file, or delete it"
                ) from None
            raise OSError(f"state: {path} cannot be opened ({error}); give another file") from error
        with self._own:
            rows = [(key, json.dumps(value, sort_keys=True)) for key, value in facts.items()]
            self._own.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)

    @property
    def _all(self) -> tuple[sqlite3.Connection, ...]:
        return (self._own, *self._others)

    def _check(self, database: sqlite3.Connection, facts: Mapping[str, Any]) -> None:
        if not _begun(database):  # another process is just making it
            return
        stored = {key: json.loads(value) for key, value in database.execute("SELECT * FROM meta")}
        fresh = json.loads(json.dumps(dict(facts), sort_keys=True))
        other = [key for key in fresh if key in stored and stored[key] != fresh[key]]
        if other:
            raise ValueError(
                f"state: {self.path} belongs to another run, it differs in {', '.join(other)}; give "
                f"another file, or delete it"
            )

    def finished(self, first: int, last: int) -> dict[int, set[str]]:
        """Methods by position that are done, of the positions from ``first`` to ``last``."""
        return _methods(self._all, _METHODS, first, last)

    def image(self, position: int) -> ImageRow | None:
        """What is known of an image."""
        query = "SELECT * FROM images WHERE position = ?"
        for database in self._all:
            row = database.execute(query, (position,)).fetchone()
            if row is not None:
                return ImageRow(*row)
        return None

    def worked(self, method: str) -> bool:
        """Whether a method has given a valid map of some image."""
        query = "SELECT 1 FROM results WHERE method = ? AND reason IS NULL LIMIT 1"
        return any(d.execute(query, (method,)).fetchone() is not None for d in self._all)

    def without_map(self, first: int, last: int) -> dict[int, set[str]]:
        """Methods by position that have a valid map which was not kept, as in a state of before."""
        valid = _methods(self._all, f"{_METHODS} AND reason IS NULL", first, last)
        query = "SELECT position, method FROM maps WHERE position BETWEEN ? AND ?"
        kept = _methods(filter(_keeps, self._all), query, first, last)
        missing = {position: names - kept.get(position, set()) for position, names in valid.items()}
        return {position: names for position, names in missing.items() if names}

    def without_top(self, first: int, last: int) -> set[int]:
        """Positions of scored images whose first classes were not kept."""
        query = "SELECT position FROM images WHERE skipped IS NULL AND position BETWEEN ? AND ?"
        scored = {p for d in self._all for (p,) in d.execute(query, (first, last))}
        query = "SELECT position FROM tops WHERE position BETWEEN ? AND ?"
        kept = {p for d in filter(_keeps, self._all) for (p,) in d.execute(query, (first, last))}
        return scored - kept

    def add_map(self, position: int, method: str, values: NDArray[np.float32]) -> None:
        """Keep a map (h, w) as it was explained."""
        data = np.ascontiguousarray(values, dtype="<f4")
        with self._writing():
            self._own.execute(_INSERT_MAP, (position, method, *data.shape, data.tobytes()))

    def add_tops(self, rows: Sequence[tuple[int, Sequence[Any]]]) -> None:
        """Keep the first classes of images by position."""
        with self._writing():
            self._own.executemany(_INSERT_TOP, [(p, json.dumps(top)) for p, top in rows])

    def add_images(self, rows: Sequence[ImageRow]) -> None:
        with self._writing():
            self._own.executemany(
                "INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)", list(rows)
            )

    def add(self, row: ResultRow) -> None:
        """Commit what one method measured on one image."""
        with self._writing():
            self._own.execute(_INSERT, _packed(row))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction; a full disk is an OSError, and what was committed stays."""
        try:
            with self._own:
                yield
        except sqlite3.OperationalError as error:
            raise OSError(f"state: {self.path} cannot be written ({error}); free space") from error

    def rows(self) -> tuple[list[ImageRow], list[tuple[Any, ...]]]:
        """Everything in this process's own file, for other processes to take in."""
        images = [ImageRow(*row) for row in self._own.execute("SELECT * FROM images")]
        return images, list(self._own.execute("SELECT * FROM results"))

    def take_in(self, images: Sequence[ImageRow], results: Sequence[tuple[Any, ...]]) -> None:
        """Rows of another process."""
        self.add_images(images)
        with self._own:
            self._own.executemany(_INSERT, list(results))

    def merge(self) -> None:
        """Take in the files of the other processes and delete them."""
        assert self.path is not None
        for database in self._others:
            database.close()
        self._others = []
        for path in _files(self.path):
            if path == _ranked(self.path, 0):
                continue
            other = sqlite3.connect(str(path), timeout=60)
            if _begun(other):
                images = [ImageRow(*row) for row in other.execute("SELECT * FROM images")]
                self.take_in(images, list(other.execute("SELECT * FROM results")))
            if _keeps(other):
                with self._own:
                    self._own.executemany(_INSERT_MAP, other.execute("SELECT * FROM maps"))
                    self._own.executemany(_INSERT_TOP, other.execute("SELECT * FROM tops"))
            other.close()
            path.unlink()

    def reopen(self) -> None:
        """Read from the one file that :meth:`merge` of another process has made."""
        self.close()
        self._others = []
        self._own = sqlite3.connect(str(self.path), timeout=60)

    def images(self) -> list[ImageRow]:
        """By position."""
        return [ImageRow(*r) for r in self._own.execute("SELECT * FROM images ORDER BY position")]

    def results(self, method: str) -> Iterator[ResultRow]:
        """What a method measured, by position."""
        query = "SELECT * FROM results WHERE method = ? ORDER BY position"
        for row in self._own.execute(query, (method,)):
            measured, scores = json.loads(row[6]), json.loads(row[7])
            values = {k: math.nan if v is None else v for k, v in measured.items()}
            curves = {k: [math.nan if v is None else v for v in r] for k, r in scores.items()}
            yield ResultRow._make((*row[:6], values, curves, *row[8:]))

    def close(self) -> None:
        for database in self._all:
            database.close()


def _methods(
    databases: Iterable[sqlite3.Connection], query: str, first: int, last: int
) -> dict[int, set[str]]:
    """Methods by position, of a query between two positions."""
    found: dict[int, set[str]] = {}
    for database in databases:
        for position, method in database.execute(query, (first, last)):
            found.setdefault(position, set()).add(method)
    return found


def _packed(row: ResultRow) -> tuple[Any, ...]:
    measured = {k: None if math.isnan(v) else v for k, v in row.measured.items()}
    scores = {k: [None if math.isnan(v) else v for v in r] for k, r in row.scores.items()}
    return (*row[:6], json.dumps(measured), json.dumps(scores), row.map, row.failed)


class KeptImage(NamedTuple):
    """A scored image of a finished state: ``number`` counts scored images; ``top`` as in the table;
    ``maps`` (h, w) float32 by method."""

    number: int
    position: int
    id: str
    target: int
    target_name: str
    score: float
    top: list[list[Any]]
    maps: dict[str, NDArray[np.float32]]


def kept_images(path: Path, count: int | None, limit: int) -> Iterator[KeptImage]:
    """The images of a state whose maps were kept, one after the other, of the first ``limit`` of the
    ``count`` that the run was of."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        rows = database.execute(
            "SELECT position, id, target, target_name, score FROM images WHERE skipped IS NULL "
            "ORDER BY position"
        ).fetchall()
        for number, (position, identity, target, target_name, score) in enumerate(rows):
            if position >= limit or (count is not None and position >= count):
                break
            found = database.execute("SELECT top FROM tops WHERE position = ?", (position,))
            top = json.loads((found.fetchone() or ("[]",))[0])
            maps = {
                method: np.frombuffer(data, "<f4").reshape(height, width)
                for method, height, width, data in database.execute(
                    "SELECT method, height, width, data FROM maps WHERE position = ?", (position,)
                )
            }
            image = (number, position, identity, target, target_name, score)
            yield KeptImage(*image, top, maps)


def _keeps(database: sqlite3.Connection) -> bool:
    """Whether a state has tables for maps: those of before have not."""
    return _has(database, "maps", "tops")


def _begun(database: sqlite3.Connection) -> bool:
    return _has(database, "meta", "images", "results")


def _has(database: sqlite3.Connection, *tables: str) -> bool:
    there = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    return there.issuperset(tables)


def _ranked(path: Path, rank: int) -> Path:
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def _files(path: Path) -> list[Path]:
    """The state's files that exist: its own and those of other processes."""
    ranked = sorted(path.parent.glob(f"{glob.escape(path.stem)}.rank*{path.suffix}"))
    ranked = [p for p in ranked if p.stem.removeprefix(f"{path.stem}.rank").isdigit()]
    return ([path] if path.exists() else []) + ranked
