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
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xattn.runtime import strict_json

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
_TABLES = ("meta", "images", "results", "maps", "tops")
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

    Every method may raise:
        ValueError: the file belongs to another run or program, is damaged, or is no SQLite file.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path | None, facts: Mapping[str, Any], rank: int = 0) -> None:
        self.path = path
        own = None if path is None else _ranked(path, rank)
        self._own, self._others = _Database(own), []
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
                self._others = [_Database(p) for p in _files(path) if p != own]
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
    def _all(self) -> tuple[_Database, ...]:
        return (self._own, *self._others)

    def damaged(self, what: str) -> ValueError:
        """What to raise where the state says what cannot be."""
        return damaged(self.path, what)

    def _check(self, database: _Database, facts: Mapping[str, Any]) -> None:
        if not _begun(database):  # another process is just making it
            return
        database.check_pages()
        stored = {
            key: database.value(text) for key, text in database.rows("SELECT key, value FROM meta")
        }
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
            for row in database.rows(query, (position,)):
                return database.image(row)
        return None

    def worked(self, method: str) -> bool:
        """Whether a method has given a valid map of some image."""
        query = "SELECT 1 FROM results WHERE method = ? AND reason IS NULL LIMIT 1"
        return any(database.rows(query, (method,)) for database in self._all)

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
        scored = {p for d in self._all for (p,) in d.rows(query, (first, last))}
        query = "SELECT position FROM tops WHERE position BETWEEN ? AND ?"
        kept = {p for d in filter(_keeps, self._all) for (p,) in d.rows(query, (first, last))}
        return scored - kept

    def add_map(self, position: int, method: str, values: NDArray[np.float32]) -> None:
        """Keep a map (h, w) as it was explained."""
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
        """Rows of another process."""
        self.add_images(images)
        self._own.write(_INSERT, results)

    def merge(self) -> None:
        """Take in the files of the other processes and delete them."""
        assert self.path is not None
        for database in self._others:
            database.close()
        self._others = []
        for path in _files(self.path):
            if path == _ranked(self.path, 0):
                continue
            with closing(_Database(path)) as other:
                if _begun(other):
                    images = [other.image(row) for row in other.rows("SELECT * FROM images")]
                    self.take_in(images, other.rows("SELECT * FROM results"))
                if _keeps(other):
                    self._own.write(_INSERT_MAP, other.each("SELECT * FROM maps"))
                    self._own.write(_INSERT_TOP, other.each("SELECT * FROM tops"))
            path.unlink()
        self._own.settle()

    def reopen(self) -> None:
        """Read from the one file that :meth:`merge` of another process has made."""
        self.close()
        self._others = []
        self._own = _Database(self.path)

    def images(self) -> list[ImageRow]:
        """By position."""
        query = "SELECT * FROM images ORDER BY position"
        return [self._own.image(row) for row in self._own.rows(query)]

    def results(self, method: str) -> Iterator[ResultRow]:
        """What a method measured, by position."""
        query = "SELECT * FROM results WHERE method = ? ORDER BY position"
        for row in self._own.each(query, (method,)):
            yield self._own.result(row)

    def close(self) -> None:
        """Leave one file a state, without ``-wal`` and ``-shm`` beside it."""
        self._own.settle()
        for database in self._all:
            database.close()


_PATIENCE = 60  # seconds to wait for another process that has the file locked
_TEXT, _WHOLE, _NUMBER = (str, type(None)), (int, type(None)), (float, type(None))
_IMAGE_TYPES = (int, str, _WHOLE, _TEXT, _NUMBER, _TEXT, _TEXT, _TEXT)
_RESULT_TYPES = (int, str, _TEXT, int, int, float, str, str, (bytes, type(None)), _TEXT)


class _Database:
    """One SQLite file. Read and write errors are one line with the file and the remedy; contents are
    checked because a damaged file can hold anything."""

    def __init__(self, path: Path | None, read_only: bool = False) -> None:
        self.path = path
        self.open = True
        name = ":memory:" if path is None else str(path)
        if path is not None and read_only:
            name = f"{path.resolve().as_uri()}?mode=ro"
        with self._naming():
            self._connection = sqlite3.connect(name, timeout=_PATIENCE, uri=read_only)

    # ------------------------------------------------------------------ SQL

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows at once."""
        return list(self.each(query, values))

    def each(self, query: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """One row after the other."""
        with self._naming():
            cursor = self._connection.execute(query, values)
            while (row := cursor.fetchone()) is not None:
                yield row

    def run(self, statement: str) -> None:
        with self._naming():
            self._connection.execute(statement).fetchall()

    def script(self, statements: str) -> None:
        with self._naming():
            self._connection.executescript(statements)

    def write(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """One transaction; of a full disk what was committed before stays."""
        with self._naming(), self._connection:
            self._connection.executemany(statement, rows)

    def settle(self) -> None:
        """Everything into the one file, without a journal beside it that readers would make anew.

        Where another process has the file open, that one does it.
        """
        with suppress(sqlite3.Error, UnicodeDecodeError):
            self._connection.execute("PRAGMA busy_timeout=0")
            try:
                self._connection.execute("PRAGMA journal_mode=DELETE")
            finally:
                self._connection.execute(f"PRAGMA busy_timeout={1000 * _PATIENCE}")

    def close(self) -> None:
        self.open = False
        self._connection.close()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError:
            raise
        except (sqlite3.Error, UnicodeDecodeError) as error:
            text = str(error)  # SQLite quotes damaged names as they are, which may be no UTF-8
            if "not a database" in text:
                raise ValueError(
                    f"state: {self.path} is no SQLite file ({text}); give another file, or delete it"
                ) from None
            if re.search(r"locked|full|read-?only|unable to open|disk I/O", text):
                raise OSError(
                    f"state: {self.path} cannot be read or written ({text}); free space, check its "
                    f"permissions, or give another file"
                ) from error
            raise damaged(self.path, text) from error

    # ------------------------------------------------------------------ what it holds

    def check_tables(self) -> None:
        """A file with other tables than a state's is another program's."""
        found = [
            name for (name,) in self.rows("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        other = [n for n in found if n not in _TABLES and not str(n).startswith("sqlite_")]
        if other:
            raise ValueError(
                f"state: {self.path} is not of an evaluation, it has a table {other[0]!r:.60}; give "
                f"another file"
            )

    def check_pages(self) -> None:
        """Damage that SQLite can see anywhere in the file, before any work is done."""
        found = self.rows("PRAGMA quick_check(1)")
        if found != [("ok",)]:
            raise damaged(self.path, " ".join(str(found[0][0]).split()) if found else "no answer")

    def value(self, text: Any) -> Any:
        """The value of JSON."""
        try:
            return strict_json.parse(text, nan=True)
        except (ValueError, AttributeError) as error:  # AttributeError: neither text nor bytes
            raise damaged(self.path, f"{type(error).__name__} in a value") from None

    def numbers(self, given: Any) -> list[float]:
        """A list of JSON numbers, NaN for null."""
        try:
            if not isinstance(given, list):
                raise TypeError
            return [math.nan if v is None else float(v) for v in given]
        except (ValueError, TypeError, OverflowError):
            raise damaged(self.path, "a value that is not a number") from None

    def checked(
        self, row: tuple[Any, ...], kinds: Sequence[type | tuple[type, ...]]
    ) -> tuple[Any, ...]:
        """A row, if its values are of these types."""
        if len(row) != len(kinds) or not all(map(isinstance, row, kinds)):
            raise damaged(self.path, "a row of another form")
        return row

    def image(self, row: tuple[Any, ...]) -> ImageRow:
        found = ImageRow(*self.checked(row, _IMAGE_TYPES))
        if found.skipped is None and None in (found.target, found.target_name, found.score):
            raise damaged(self.path, f"no class of {found.id!r:.60}")
        return found

    def result(self, row: tuple[Any, ...]) -> ResultRow:
        self.checked(row, _RESULT_TYPES)
        measured, scores = self.value(row[6]), self.value(row[7])
        if not (isinstance(measured, dict) and isinstance(scores, dict)):
            raise damaged(self.path, "a result that is no table")
        values = dict(zip(measured, self.numbers(list(measured.values())), strict=True))
        curves = {key: self.numbers(curve) for key, curve in scores.items()}
        return ResultRow._make((*row[:6], values, curves, *row[8:]))


def damaged(path: Path | None, what: str) -> ValueError:
    """What to raise where a state says what cannot be."""
    return ValueError(
        f"state: {path} is damaged ({what}); delete it to measure everything again, or give another "
        f"file"
    )


def _methods(
    databases: Iterable[_Database], query: str, first: int, last: int
) -> dict[int, set[str]]:
    """Methods by position, of a query between two positions."""
    found: dict[int, set[str]] = {}
    for database in databases:
        for position, method in database.rows(query, (first, last)):
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
    ``count`` that the run was of.

    Raises:
        ValueError: the file is damaged, or no SQLite file. OSError: it cannot be read.
    """
    with closing(_Database(path, read_only=True)) as database:
        query = "SELECT * FROM images WHERE skipped IS NULL ORDER BY position"
        for number, row in enumerate(map(database.image, database.rows(query))):
            position = row.position
            if position >= limit or (count is not None and position >= count):
                break
            found = database.rows("SELECT top FROM tops WHERE position = ?", (position,))
            top = _top(database, found[0][0]) if found else []
            query = "SELECT method, height, width, data FROM maps WHERE position = ?"
            maps = dict(_kept_map(database, kept) for kept in database.each(query, (position,)))
            assert row.target is not None and row.target_name is not None and row.score is not None
            image = (number, position, row.id, row.target, row.target_name, row.score)
            yield KeptImage(*image, top, maps)


def _top(database: _Database, text: Any) -> list[list[Any]]:
    top = database.value(text)
    if not isinstance(top, list):
        raise damaged(database.path, "top classes that are not a list")
    for item in top:
        row = tuple(item) if isinstance(item, list) else ()
        database.checked(row, (int, str, (int, float)))
    return top


def _kept_map(database: _Database, row: tuple[Any, ...]) -> tuple[str, NDArray[np.float32]]:
    method, height, width, data = database.checked(row, (str, int, int, bytes))
    if min(height, width) < 1 or len(data) != 4 * height * width:
        raise damaged(database.path, f"a map of {method!r:.60} that is cut short")
    values = np.frombuffer(data, "<f4").reshape(height, width)
    if not np.isfinite(values).all():
        raise damaged(database.path, f"a map of {method!r:.60} that is not finite")
    return method, values


def grey_maps(
    path: Path, identities: Sequence[str], wanted: Iterable[tuple[str, int]]
) -> Iterator[tuple[str, int, bytes]]:
    """(method, i, small grey PNG) of a state, of those ``wanted`` (method, i) that it has, where i
    counts ``identities``, the images of a run in their order.

    Raises:
        ValueError: the file is damaged, or no SQLite file. OSError: it cannot be read.
    """
    with closing(_Database(path, read_only=True)) as database:
        positions: dict[str, list[int]] = {}
        query = "SELECT * FROM images WHERE skipped IS NULL ORDER BY position DESC"
        for row in map(database.image, database.rows(query)):
            positions.setdefault(row.id, []).append(row.position)
        # One photo can be listed twice: its first record has the first of its positions.
        ordered = [positions[i].pop() if positions.get(i) else None for i in identities]
        query = "SELECT map FROM results WHERE position = ? AND method = ? AND map IS NOT NULL"
        for method, i in wanted:
            for found in database.rows(query, (ordered[i], method)):
                (png,) = database.checked(found, (bytes,))
                yield method, i, png


def _keeps(database: _Database) -> bool:
    """Whether a state has tables for maps: those of before have not."""
    return _has(database, "maps", "tops")


def _begun(database: _Database) -> bool:
    return _has(database, "meta", "images", "results")


def _has(database: _Database, *tables: str) -> bool:
    there = {name for (name,) in database.rows("SELECT name FROM sqlite_master")}
    return there.issuperset(tables)


def _ranked(path: Path, rank: int) -> Path:
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def _files(path: Path) -> list[Path]:
    """The state's files that exist: its own and those of other processes."""
    ranked = sorted(path.parent.glob(f"{glob.escape(path.stem)}.rank*{path.suffix}"))
    ranked = [p for p in ranked if p.stem.removeprefix(f"{path.stem}.rank").isdigit()]
    return ([path] if path.exists() else []) + ranked
