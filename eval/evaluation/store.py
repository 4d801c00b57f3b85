"""The state of an evaluation, an SQLite file from which a killed run can be resumed, and which users can
open.

    meta(key, value)                              protocol, backbone, metrics and methods of the run
    images(position, id, target, target_name, score, skipped, note, digest)
    results(position, method, reason, tied, requests, seconds, measured, scores, map,
            failed)
    maps(position, method, height, width, data)
    tops(position, top)
    outcomes(position, key, data)                 score drops from a board's table
    others(position, method, kind, count, height, width, data)

``measured`` is JSON, {column: value or null}; null is an undefined value, and a column that is missing was
not measured. ``scores`` is JSON, {key: [scores]}. ``map`` is a small grey PNG of the map. ``failed`` lists
the metrics that raised an error, with the error. A row is committed as soon as the results of a method on
an image are complete. ``data`` is a raw map in little-endian float32, and ``top`` is JSON, [[class, name,
probability], ...]. Both are needed for packs and are stored only for the first images, up to the number
that the run was asked to keep. If a run has several processes on one machine, all of them write to the same
file. The contents of a file are trusted.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
CREATE TABLE IF NOT EXISTS outcomes(
    position INTEGER, key TEXT, data BLOB, PRIMARY KEY(position, key));
CREATE TABLE IF NOT EXISTS others(
    position INTEGER, method TEXT, kind TEXT, count INTEGER, height INTEGER, width INTEGER, data BLOB,
    PRIMARY KEY(position, method, kind));
"""
_TABLES = {"meta", "images", "results", "maps", "tops", "outcomes", "others"}
_PATIENCE = 60  # seconds to wait while another process writes


class ImageRow(NamedTuple):
    """A row of the table ``images``.

    ``skipped`` is the reason why the image could not be read, and ``note`` the reason why its annotation
    cannot be used; both are None if there was no problem. ``digest`` is a hash of the pixels.
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
    """A row of the table ``results``, for one method on one image.

    ``reason`` is the reason why the map is invalid, or None; ``seconds`` is the time spent explaining.
    """

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


class KeptImage(NamedTuple):
    """An image from the state of a finished run.

    ``number`` is its index among the scored images, ``top`` lists its top classes, and ``maps`` contains
    the maps (h, w) by method, in float32.
    """

    number: int
    position: int
    id: str
    target: int
    target_name: str
    score: float
    top: list[list[Any]]
    maps: dict[str, NDArray[np.float32]]


@contextmanager
def sqlite_errors(path: Path | None) -> Iterator[None]:
    """Context manager that replaces an SQLite error by a one-line error with the file's name and a remedy.

    Raises:
        ValueError: the file is damaged or is not an SQLite file.
        OSError: the file cannot be read or written.
    """
    try:
        yield
    except sqlite3.Error as error:
        if re.search(r"locked|full|read-?only|unable to open|disk I/O", str(error)):
            raise OSError(
                f"state: {path} cannot be read or written ({error}); free space, check its "
                f"permissions, or give another file"
            ) from error
        raise ValueError(
            f"state: {path} cannot be used ({error}); delete it to measure everything again, or give "
            f"another file"
        ) from error


class KeptDrops(UserDict[str, Tensor]):
    """A mapping from keys to score drops (count,) in float32; new values are also passed to ``keep`` as
    bytes."""

    def __init__(self, known: Mapping[str, Tensor], keep: Callable[[str, bytes], object]) -> None:
        super().__init__()
        self.data.update(known)
        self._keep = keep

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.data[key] = value
        self._keep(key, value.contiguous().numpy().astype("<f4").tobytes())


def _drops(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))


class Store:
    """Reads and writes one state, which is kept in memory if ``path`` is None.

    Every method can raise the errors of :func:`sqlite_errors`.

    Raises:
        ValueError: the file belongs to another run or program, or is damaged.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None, facts: Mapping[str, Any]) -> None:
        self.path = path
        with sqlite_errors(path):
            self._file = sqlite3.connect(":memory:" if path is None else path, timeout=_PATIENCE)
        try:
            self._check_tables()
        except BaseException:
            self._file.close()  # without changes, since the file may belong to another program
            raise
        try:
            with sqlite_errors(path):
                if path is not None:
                    self._file.execute("PRAGMA journal_mode=WAL")
                    self._file.execute("PRAGMA synchronous=NORMAL")
                self._file.executescript(_SCHEMA)
            self._check(facts)
            rows = [(key, json.dumps(value, sort_keys=True)) for key, value in facts.items()]
            self._write("meta", rows)
        except BaseException:
            self.close()
            raise

    def _check_tables(self) -> None:
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        strange = [name for (name,) in self._rows(query) if name not in _TABLES]
        if strange:
            raise ValueError(
                f"state: {self.path} is not the state of an evaluation: it has a table "
                f"{strange[0]!r:.60}; give another file"
            )

    def _check(self, facts: Mapping[str, Any]) -> None:
        query = "SELECT key, value FROM meta"
        stored = {key: json.loads(text) for key, text in self._rows(query)}
        fresh = json.loads(json.dumps(dict(facts), sort_keys=True))
        other = [key for key in fresh if key in stored and stored[key] != fresh[key]]
        if other:
            remedy = "give another file, or delete it"
            size = stored.get("max_forward_batch")
            if other == ["max_forward_batch"] and size < fresh["max_forward_batch"]:
                remedy = (
                    f"it was started with {size} images per pass, because there were few images; "
                    f"resume it with max_forward_batch={size}, or give another file to start again"
                )
            raise ValueError(
                f"state: {self.path} belongs to another run; it differs in {', '.join(other)}; {remedy}"
            )

    def _rows(self, query: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        with sqlite_errors(self.path):
            yield from self._file.execute(query, values)

    def _write(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        """Write rows in one transaction; if it fails, for example on a full disk, earlier rows are kept."""
        if rows:
            places = ", ".join("?" * len(rows[0]))
            with sqlite_errors(self.path), self._file:
                self._file.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({places})", rows)

    # ------------------------------------------------------------------ reading

    def finished(self, first: int, last: int) -> dict[int, set[str]]:
        """The methods whose results are complete, for each position from ``first`` to ``last``."""
        return self._methods(
            "SELECT position, method FROM results WHERE position BETWEEN ? AND ?", first, last
        )

    def without_map(self, first: int, last: int) -> dict[int, set[str]]:
        """The methods with a valid map that was not kept, for each position from ``first`` to ``last``."""
        query = (
            "SELECT position, method FROM results WHERE position BETWEEN ? AND ? AND reason IS NULL "
            "EXCEPT SELECT position, method FROM maps"
        )
        return self._methods(query, first, last)

    def without_top(self, first: int, last: int) -> set[int]:
        """The positions of scored images from ``first`` to ``last`` whose top classes were not kept."""
        query = (
            "SELECT position FROM images WHERE position BETWEEN ? AND ? AND skipped IS NULL "
            "EXCEPT SELECT position FROM tops"
        )
        return {position for (position,) in self._rows(query, (first, last))}

    def image(self, position: int) -> ImageRow | None:
        """The row of the image at a position, or None."""
        query = "SELECT * FROM images WHERE position = ?"
        row = next(self._rows(query, (position,)), None)
        return None if row is None else ImageRow(*row)

    def has_valid_map(self, method: str) -> bool:
        """Whether a method has a valid map for at least one image."""
        query = "SELECT 1 FROM results WHERE method = ? AND reason IS NULL LIMIT 1"
        return next(self._rows(query, (method,)), None) is not None

    def images(self) -> list[ImageRow]:
        """The rows of all images, ordered by position."""
        return [ImageRow(*row) for row in self._rows("SELECT * FROM images ORDER BY position")]

    def results(self, method: str) -> Iterator[ResultRow]:
        """Yield the results of a method, ordered by position."""
        query = "SELECT * FROM results WHERE method = ? ORDER BY position"
        for row in self._rows(query, (method,)):
            measured = {key: _number(value) for key, value in json.loads(row[6]).items()}
            scores = {key: [*map(_number, curve)] for key, curve in json.loads(row[7]).items()}
            yield ResultRow._make((*row[:6], measured, scores, *row[8:]))

    def _methods(self, query: str, first: int, last: int) -> dict[int, set[str]]:
        found: dict[int, set[str]] = {}
        for position, method in self._rows(query, (first, last)):
            found.setdefault(position, set()).add(method)
        return found

    # ------------------------------------------------------------------ writing

    def add_map(self, position: int, method: str, values: NDArray[np.float32]) -> None:
        """Keep a raw map (h, w)."""
        data = np.ascontiguousarray(values, dtype="<f4")
        self._write("maps", [(position, method, *data.shape, data.tobytes())])

    def add_other(self, position: int, method: str, kind: str, values: NDArray[np.float32]) -> None:
        """Keep raw maps (n, h, w) of another class, from another network or of a mosaic."""
        data = np.ascontiguousarray(values, dtype="<f4")
        self._write("others", [(position, method, kind, *data.shape, data.tobytes())])

    def outcomes(self, position: int) -> KeptDrops:
        """The score drops of an image's table; a drop that is added to it is stored at once."""
        query = "SELECT key, data FROM outcomes WHERE position = ?"
        rows = {key: _drops(data) for key, data in self._rows(query, (position,))}
        return KeptDrops(rows, lambda key, data: self._write("outcomes", [(position, key, data)]))

    def add_tops(self, rows: Sequence[tuple[int, Sequence[Any]]]) -> None:
        """Keep the top classes of images, given as pairs (position, classes)."""
        self._write("tops", [(position, json.dumps(top)) for position, top in rows])

    def add_images(self, rows: Sequence[ImageRow]) -> None:
        self._write("images", rows)

    def add(self, row: ResultRow) -> None:
        """Commit the result of one method on one image."""
        measured = {key: _null(value) for key, value in row.measured.items()}
        scores = {key: [*map(_null, curve)] for key, curve in row.scores.items()}
        packed = (*row[:6], json.dumps(measured), json.dumps(scores), *row[8:])
        self._write("results", [packed])

    def tables(self) -> dict[str, list[tuple[Any, ...]]]:
        """All rows of images and results, to be sent to another process."""
        return {name: [*self._rows(f"SELECT * FROM {name}")] for name in ("images", "results")}

    def merge(self, tables: Mapping[str, list[tuple[Any, ...]]]) -> None:
        """Add the output of :meth:`tables` from another process."""
        for name, rows in tables.items():
            self._write(name, rows)

    def close(self) -> None:
        """Close the file; the last process to do so removes the ``-wal`` and ``-shm`` files next to it."""
        with suppress(sqlite3.Error):
            self._file.execute("PRAGMA busy_timeout=0")
            self._file.execute("PRAGMA journal_mode=DELETE")
        self._file.close()


# ---------------------------------------------------------------- reading a finished state


def kept_images(path: Path, count: int | None, limit: int) -> Iterator[KeptImage]:
    """Yield the scored images among the first ``limit`` of a run's ``count`` images, with their stored
    maps.

    Raises:
        ValueError, OSError: see :func:`sqlite_errors`.
    """
    most = limit if count is None else min(limit, count)
    with sqlite_errors(path), closing(_reading(path)) as file:
        query = "SELECT * FROM images WHERE skipped IS NULL AND position < ? ORDER BY position"
        rows = file.execute(query, (most,)).fetchall()
        for number, row in enumerate(rows):
            position = row[0]
            query = "SELECT top FROM tops WHERE position = ?"
            top = file.execute(query, (position,)).fetchone()
            query = "SELECT method, height, width, data FROM maps WHERE position = ?"
            maps = {
                method: np.frombuffer(data, "<f4").reshape(height, width)
                for method, height, width, data in file.execute(query, (position,))
            }
            yield KeptImage._make((number, *row[:5], json.loads(top[0]) if top else [], maps))


def grey_maps(
    path: Path, identities: Sequence[str], wanted: Iterable[tuple[str, int]]
) -> Iterator[tuple[str, int, bytes]]:
    """Yield (method, i, small grey PNG) for each pair (method, i) in ``wanted`` that a state contains.

    i is an index into ``identities``, the ids of a run's images in their order.

    Raises:
        ValueError, OSError: see :func:`sqlite_errors`.
    """
    with sqlite_errors(path), closing(_reading(path)) as file:
        positions: dict[str, list[int]] = {}
        query = "SELECT id, position FROM images WHERE skipped IS NULL ORDER BY position DESC"
        for identity, position in file.execute(query):
            positions.setdefault(identity, []).append(position)
        # A photo can be listed more than once; the first time it occurs, it has the first of its positions.
        ordered = [positions[i].pop() if positions.get(i) else None for i in identities]
        query = "SELECT map FROM results WHERE position = ? AND method = ? AND map IS NOT NULL"
        for method, i in wanted:
            for (png,) in file.execute(query, (ordered[i], method)):
                yield method, i, png


def _reading(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", timeout=_PATIENCE, uri=True)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value


# ---------------------------------------------------------------- boards


def seed_outcomes(path: Path, rows: Iterable[tuple[int, str, Tensor]]) -> None:
    """Write score drops, given as (position, key, tensor (count,)), to a state, which may be a new file."""
    with sqlite_errors(path), closing(sqlite3.connect(path, timeout=_PATIENCE)) as file, file:
        file.executescript(_SCHEMA)
        packed = [(p, key, values.numpy().astype("<f4").tobytes()) for p, key, values in rows]
        file.executemany("INSERT OR IGNORE INTO outcomes VALUES (?, ?, ?)", packed)


def kept_outcomes(path: Path) -> Iterator[tuple[int, str, Tensor]]:
    """Yield the score drops stored in a state as (position, key, float32 tensor (count,))."""
    with sqlite_errors(path), closing(_reading(path)) as file:
        for position, key, data in file.execute("SELECT * FROM outcomes ORDER BY position, key"):
            yield position, key, _drops(data)


def iterate_maps(path: Path, method: str) -> Iterator[tuple[int, str, NDArray[np.float32]]]:
    """Yield all maps of a method in a board's state as (position, kind, maps (n, h, w)).

    The map of the image itself has the kind "own" and n = 1.
    """
    with sqlite_errors(path), closing(_reading(path)) as file:
        query = (
            "SELECT position, 'own', 1, height, width, data FROM maps WHERE method = :m UNION ALL "
            "SELECT position, kind, count, height, width, data FROM others WHERE method = :m "
            "ORDER BY 1, 2"
        )
        for position, kind, *shape, data in file.execute(query, {"m": method}):
            yield position, kind, np.frombuffer(data, "<f4").reshape(shape)


def delete_stale_results(path: Path, codes: Mapping[str, Any]) -> None:
    """Delete the results of each method whose code has changed since the state was started.

    ``codes`` maps method names to a JSON value that identifies the code, such as a hash.
    """
    with sqlite_errors(path), closing(sqlite3.connect(path, timeout=_PATIENCE)) as file, file:
        file.executescript(_SCHEMA)
        known = dict(file.execute("SELECT key, value FROM meta"))
        for method, code in codes.items():
            now, key = json.dumps(code, sort_keys=True), f"code {method}"
            if known.get(key, now) != now:
                for table in ("results", "maps", "others"):
                    file.execute(f"DELETE FROM {table} WHERE method = ?", (method,))
                old = (f"method {method}", f"randomized {method}")
                file.execute("DELETE FROM meta WHERE key IN (?, ?)", old)
            file.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, now))
