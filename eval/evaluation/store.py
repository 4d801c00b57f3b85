"""The state of an evaluation: an SQLite file from which a killed run resumes, and which a user can open.

    meta(key, value)                              what the run is: protocol, backbone, metrics, methods
    images(position, id, target, target_name, score, skipped, note, digest)
    results(position, method, reason, tied, requests, seconds, measured, scores, map,
            failed)
    maps(position, method, height, width, data)
    tops(position, top)

``measured`` is JSON {column: value or null}: null is an undefined value, and a column that
is missing was not measured. ``scores`` is JSON {key: [scores]}; ``map`` is a small grey PNG of the map;
``failed`` says which metrics raised an error, and which. A row is committed once a method is finished
with its image. ``data`` is the raw map, float32, little endian; ``top`` is JSON [[class, name,
probability], ...]; both are kept for packs, for as many of the first images as the run was asked for.
Each of several processes writes a file of its own, ``name.rankN.sqlite``; these are merged at the end.
"""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xattn.eval.evaluation.database import Database, ImageRow, ResultRow, damaged

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


class Store:
    """Reads and writes one state; ``path`` None keeps it in memory.

    Every method may raise:
        ValueError: the file belongs to another run or program, is damaged, or is not an SQLite file.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path | None, facts: Mapping[str, Any], rank: int = 0) -> None:
        self.path = path
        own = None if path is None else _ranked(path, rank)
        self._own, self._others = Database(own), []
        if path is not None:
            try:
                self._own.check_tables()
            except BaseException:
                self._own.close()  # settling would change another program's file
                raise
        try:
            if path is not None:
                self._own.run("PRAGMA journal_mode=WAL")
                self._own.run("PRAGMA synchronous=NORMAL")
                self._others = [Database(p) for p in _files(path) if p != own]
            self._own.script(_SCHEMA)
            for database in self._all:
                self._check(database, facts)
            for database in self._others:
                if not _begun(database):
                    database.close()
            self._others = [database for database in self._others if database.open]
            rows = [(key, json.dumps(value, sort_keys=True)) for key, value in facts.items()]
            self._own.write("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)
        except BaseException:
            self.close()
            raise

    @property
    def _all(self) -> tuple[Database, ...]:
        return (self._own, *self._others)

    def damaged(self, what: str) -> ValueError:
        """The error of a state that is damaged."""
        return damaged(self.path, what)

    def _check(self, database: Database, facts: Mapping[str, Any]) -> None:
        if not _begun(database):  # another process is just making it
            return
        database.check_pages()
        stored = {
            key: database.value(text) for key, text in database.rows("SELECT key, value FROM meta")
        }
        fresh = json.loads(json.dumps(dict(facts), sort_keys=True))
        other = [key for key in fresh if key in stored and stored[key] != fresh[key]]
        if other:
            remedy = "give another file, or delete it"
            size = stored.get("max_forward_batch")
            if other == ["max_forward_batch"] and size < fresh["max_forward_batch"]:
                remedy = (
                    f"it was begun with {size} images a pass, as many as few images take; "
                    f"max_forward_batch={size} goes on with it, another file starts anew"
                )
            raise ValueError(
                f"state: {self.path} belongs to another run, it differs in {', '.join(other)}; {remedy}"
            )

    def finished(self, first: int, last: int) -> dict[int, set[str]]:
        """The finished methods by position, for the positions from ``first`` to ``last``."""
        return _methods(self._all, _METHODS, first, last)

    def image(self, position: int) -> ImageRow | None:
        """The row of an image, if there is one."""
        query = "SELECT * FROM images WHERE position = ?"
        for database in self._all:
            for row in database.rows(query, (position,)):
                return database.image(row)
        return None

    def worked(self, method: str) -> bool:
        """Whether a method has given a valid map of some image."""
        query = "SELECT 1 FROM results WHERE method = ? AND reason IS NULL LIMIT 1"
        return any(database.rows(query, (method,)) for database in self._all)

    def without_map(self, first: int, last: int) -> dict[int, set[str]]:
        """Methods by position whose valid map was not kept (older versions kept none)."""
        valid = _methods(self._all, f"{_METHODS} AND reason IS NULL", first, last)
        query = "SELECT position, method FROM maps WHERE position BETWEEN ? AND ?"
        kept = _methods(filter(_keeps, self._all), query, first, last)
        missing = {position: names - kept.get(position, set()) for position, names in valid.items()}
        return {position: names for position, names in missing.items() if names}

    def without_top(self, first: int, last: int) -> set[int]:
        """Positions of scored images whose first classes were not kept."""
        query = "SELECT position FROM images WHERE skipped IS NULL AND position BETWEEN ? AND ?"
        scored = {p for d in self._all for (p,) in d.rows(query, (first, last))}
        query = "SELECT position FROM tops WHERE position BETWEEN ? AND ?"
        kept = {p for d in filter(_keeps, self._all) for (p,) in d.rows(query, (first, last))}
        return scored - kept

    def add_map(self, position: int, method: str, values: NDArray[np.float32]) -> None:
        """Keep a raw map (h, w)."""
        data = np.ascontiguousarray(values, dtype="<f4")
        self._own.write(_INSERT_MAP, [(position, method, *data.shape, data.tobytes())])

    def add_tops(self, rows: Sequence[tuple[int, Sequence[Any]]]) -> None:
        """Keep the first classes of images by position."""
        self._own.write(_INSERT_TOP, [(p, json.dumps(top)) for p, top in rows])

    def add_images(self, rows: Sequence[ImageRow]) -> None:
        self._own.write("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def add(self, row: ResultRow) -> None:
        """Commit what one method measured on one image."""
        self._own.write(_INSERT, [_packed(row)])

    def rows(self) -> tuple[list[ImageRow], list[tuple[Any, ...]]]:
        """Everything in this process's own file, for other processes to take in."""
        images = [self._own.image(row) for row in self._own.rows("SELECT * FROM images")]
        return images, self._own.rows("SELECT * FROM results")

    def take_in(self, images: Sequence[ImageRow], results: Sequence[tuple[Any, ...]]) -> None:
        """Add the rows of another process."""
        self.add_images(images)
        self._own.write(_INSERT, results)

    def merge(self) -> None:
        """Merge the files of the other processes into this one, and delete them."""
        assert self.path is not None
        for database in self._others:
            database.close()
        self._others = []
        for path in _files(self.path):
            if path == _ranked(self.path, 0):
                continue
            with closing(Database(path)) as other:
                if _begun(other):
                    images = [other.image(row) for row in other.rows("SELECT * FROM images")]
                    self.take_in(images, other.rows("SELECT * FROM results"))
                if _keeps(other):
                    self._own.write(_INSERT_MAP, other.each("SELECT * FROM maps"))
                    self._own.write(_INSERT_TOP, other.each("SELECT * FROM tops"))
            path.unlink()
        self._own.settle()

    def reopen(self) -> None:
        """Read from the file that another process has merged (:meth:`merge`)."""
        self.close()
        self._others = []
        self._own = Database(self.path)

    def images(self) -> list[ImageRow]:
        """All images, by position."""
        query = "SELECT * FROM images ORDER BY position"
        return [self._own.image(row) for row in self._own.rows(query)]

    def results(self, method: str) -> Iterator[ResultRow]:
        """What a method measured, by position."""
        query = "SELECT * FROM results WHERE method = ? ORDER BY position"
        for row in self._own.each(query, (method,)):
            yield self._own.result(row)

    def close(self) -> None:
        """Close the file, and leave no ``-wal`` or ``-shm`` beside it."""
        self._own.settle()
        for database in self._all:
            database.close()


def _methods(
    databases: Iterable[Database], query: str, first: int, last: int
) -> dict[int, set[str]]:
    """Methods by position, from a query over a range of positions."""
    found: dict[int, set[str]] = {}
    for database in databases:
        for position, method in database.rows(query, (first, last)):
            found.setdefault(position, set()).add(method)
    return found


def _packed(row: ResultRow) -> tuple[Any, ...]:
    measured = {k: None if math.isnan(v) else v for k, v in row.measured.items()}
    scores = {k: [None if math.isnan(v) else v for v in r] for k, r in row.scores.items()}
    return (*row[:6], json.dumps(measured), json.dumps(scores), row.map, row.failed)


def _keeps(database: Database) -> bool:
    """Whether this state has map tables (older versions do not)."""
    return _has(database, "maps", "tops")


def _begun(database: Database) -> bool:
    return _has(database, "meta", "images", "results")


def _has(database: Database, *tables: str) -> bool:
    there = {name for (name,) in database.rows("SELECT name FROM sqlite_master")}
    return there.issuperset(tables)


def _ranked(path: Path, rank: int) -> Path:
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def _files(path: Path) -> list[Path]:
    """The state's files that exist: its own and those of other processes."""
    ranked = sorted(path.parent.glob(f"{glob.escape(path.stem)}.rank*{path.suffix}"))
    ranked = [p for p in ranked if p.stem.removeprefix(f"{path.stem}.rank").isdigit()]
    return ([path] if path.exists() else []) + ranked
