"""The state of an evaluation: an SQLite file from which a killed run resumes, and which a user can open.

    meta(key, value)                              what the run is: protocol, backbone, metrics, methods
    images(position, id, target, target_name, score, skipped, note, digest)
    results(position, method, reason, tied, requests, seconds, measured, scores, map,
            failed)
    maps(position, method, height, width, data)
    tops(position, top)
    outcomes(position, key, data)                 drops of the table, of a board
    others(position, method, kind, count, height, width, data)

``measured`` is JSON {column: value or null}: null is an undefined value, and a column that
is missing was not measured. ``scores`` is JSON {key: [scores]}; ``map`` is a small grey PNG of the map;
``failed`` says which metrics raised an error, and which. A row is committed once a method is finished
with its image. ``data`` is the raw map, float32, little endian; ``top`` is JSON [[class, name,
probability], ...]; both are kept for packs, for as many of the first images as the run was asked for.
Several processes of one run, on one machine, write into the one file. Its contents are trusted.
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
_PATIENCE = 60  # seconds to wait for another process that writes


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


class KeptImage(NamedTuple):
    """An image of a finished state: ``number`` counts the scored images, ``top`` are the first classes,
    ``maps`` (h, w) float32 by method."""

    number: int
    position: int
    id: str
    target: int
    target_name: str
    score: float
    top: list[list[Any]]
    maps: dict[str, NDArray[np.float32]]


@contextmanager
def naming(path: Path | None) -> Iterator[None]:
    """Turn an error of SQLite into one line that names the file and the remedy.

    Raises:
        ValueError: the file is damaged, or not an SQLite file.
        OSError: it cannot be read or written.
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
    """Drops (count,) float32 by key; what is set is given to ``keep`` as bytes."""

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
    """Reads and writes one state; ``path`` None keeps it in memory.

    Raises:
        ValueError: the file belongs to another run or program; and, from every method, as
            :func:`naming` says.
        OSError: likewise.
    """

    def __init__(self, path: Path | None, facts: Mapping[str, Any]) -> None:
        self.path = path
        with naming(path):
            self._file = sqlite3.connect(":memory:" if path is None else path, timeout=_PATIENCE)
        try:
            self._check_tables()
        except BaseException:
            self._file.close()  # as it is: it may be another program's
            raise
        try:
            with naming(path):
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
                f"state: {self.path} is not of an evaluation, it has a table {strange[0]!r:.60}; give "
                f"another file"
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
                    f"it was begun with {size} images a pass, as many as few images take; "
                    f"max_forward_batch={size} goes on with it, another file starts anew"
                )
            raise ValueError(
                f"state: {self.path} belongs to another run, it differs in {', '.join(other)}; {remedy}"
            )

    def _rows(self, query: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        with naming(self.path):
            yield from self._file.execute(query, values)

    def _write(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        """One transaction; if the disk is full, what was committed before stays."""
        if rows:
            places = ", ".join("?" * len(rows[0]))
            with naming(self.path), self._file:
                self._file.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({places})", rows)

    # ------------------------------------------------------------------ what is there

    def finished(self, first: int, last: int) -> dict[int, set[str]]:
        """The finished methods by position, for the positions from ``first`` to ``last``."""
        return self._methods(
            "SELECT position, method FROM results WHERE position BETWEEN ? AND ?", first, last
        )

    def without_map(self, first: int, last: int) -> dict[int, set[str]]:
        """Methods by position whose valid map was not kept."""
        query = (
            "SELECT position, method FROM results WHERE position BETWEEN ? AND ? AND reason IS NULL "
            "EXCEPT SELECT position, method FROM maps"
        )
        return self._methods(query, first, last)

    def without_top(self, first: int, last: int) -> set[int]:
        """Positions of scored images whose first classes were not kept."""
        query = (
            "SELECT position FROM images WHERE position BETWEEN ? AND ? AND skipped IS NULL "
            "EXCEPT SELECT position FROM tops"
        )
        return {position for (position,) in self._rows(query, (first, last))}

    def image(self, position: int) -> ImageRow | None:
        """The row of an image, if there is one."""
        query = "SELECT * FROM images WHERE position = ?"
        row = next(self._rows(query, (position,)), None)
        return None if row is None else ImageRow(*row)

    def worked(self, method: str) -> bool:
        """Whether a method has given a valid map of some image."""
        query = "SELECT 1 FROM results WHERE method = ? AND reason IS NULL LIMIT 1"
        return next(self._rows(query, (method,)), None) is not None

    def images(self) -> list[ImageRow]:
        """All images, by position."""
        return [ImageRow(*row) for row in self._rows("SELECT * FROM images ORDER BY position")]

    def results(self, method: str) -> Iterator[ResultRow]:
        """What a method measured, by position."""
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

    # ------------------------------------------------------------------ what is added

    def add_map(self, position: int, method: str, values: NDArray[np.float32]) -> None:
        """Keep a raw map (h, w)."""
        data = np.ascontiguousarray(values, dtype="<f4")
        self._write("maps", [(position, method, *data.shape, data.tobytes())])

    def add_other(self, position: int, method: str, kind: str, values: NDArray[np.float32]) -> None:
        """Keep raw maps (n, h, w) of another class, network or of a mosaic."""
        data = np.ascontiguousarray(values, dtype="<f4")
        self._write("others", [(position, method, kind, *data.shape, data.tobytes())])

    def outcomes(self, position: int) -> KeptDrops:
        """The drops of an image's table, of which new ones are kept."""
        query = "SELECT key, data FROM outcomes WHERE position = ?"
        rows = {key: _drops(data) for key, data in self._rows(query, (position,))}
        return KeptDrops(rows, lambda key, data: self._write("outcomes", [(position, key, data)]))

    def add_tops(self, rows: Sequence[tuple[int, Sequence[Any]]]) -> None:
        """Keep the first classes of images by position."""
        self._write("tops", [(position, json.dumps(top)) for position, top in rows])

    def add_images(self, rows: Sequence[ImageRow]) -> None:
        self._write("images", rows)

    def add(self, row: ResultRow) -> None:
        """Commit what one method measured on one image."""
        measured = {key: _null(value) for key, value in row.measured.items()}
        scores = {key: [*map(_null, curve)] for key, curve in row.scores.items()}
        packed = (*row[:6], json.dumps(measured), json.dumps(scores), *row[8:])
        self._write("results", [packed])

    def tables(self) -> dict[str, list[tuple[Any, ...]]]:
        """Images and results, for another process to take in."""
        return {name: [*self._rows(f"SELECT * FROM {name}")] for name in ("images", "results")}

    def take_in(self, tables: Mapping[str, list[tuple[Any, ...]]]) -> None:
        """Add what another process holds in memory."""
        for name, rows in tables.items():
            self._write(name, rows)

    def close(self) -> None:
        """Close the file; the last process to do so leaves no ``-wal`` or ``-shm`` beside it."""
        with suppress(sqlite3.Error):
            self._file.execute("PRAGMA busy_timeout=0")
            self._file.execute("PRAGMA journal_mode=DELETE")
        self._file.close()


# ---------------------------------------------------------------- reading a finished state


def kept_images(path: Path, count: int | None, limit: int) -> Iterator[KeptImage]:
    """Yield the images of a state with their kept maps, up to image ``limit`` of the run's ``count``.

    Raises:
        ValueError, OSError: see :func:`naming`.
    """
    most = limit if count is None else min(limit, count)
    with naming(path), closing(_reading(path)) as file:
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
    """Yield (method, i, small grey PNG) for each ``wanted`` (method, i) that a state has.

    i counts ``identities``, the ids of a run's images in their order.

    Raises:
        ValueError, OSError: see :func:`naming`.
    """
    with naming(path), closing(_reading(path)) as file:
        positions: dict[str, list[int]] = {}
        query = "SELECT id, position FROM images WHERE skipped IS NULL ORDER BY position DESC"
        for identity, position in file.execute(query):
            positions.setdefault(identity, []).append(position)
        # One photo can be listed twice: its first record has the first of its positions.
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
    """Put drops (position, key, (count,)) into a state, which need not be there yet."""
    with naming(path), closing(sqlite3.connect(path, timeout=_PATIENCE)) as file, file:
        file.executescript(_SCHEMA)
        packed = [(p, key, values.numpy().astype("<f4").tobytes()) for p, key, values in rows]
        file.executemany("INSERT OR IGNORE INTO outcomes VALUES (?, ?, ?)", packed)


def kept_outcomes(path: Path) -> Iterator[tuple[int, str, Tensor]]:
    """Yield the drops that a state keeps: position, key, (count,) float32."""
    with naming(path), closing(_reading(path)) as file:
        for position, key, data in file.execute("SELECT * FROM outcomes ORDER BY position, key"):
            yield position, key, _drops(data)


def every_map(path: Path, method: str) -> Iterator[tuple[int, str, NDArray[np.float32]]]:
    """Yield what a board's state keeps of a method: position, kind ("own" is (1, h, w)), maps (n, h, w)."""
    with naming(path), closing(_reading(path)) as file:
        query = (
            "SELECT position, 'own', 1, height, width, data FROM maps WHERE method = :m UNION ALL "
            "SELECT position, kind, count, height, width, data FROM others WHERE method = :m "
            "ORDER BY 1, 2"
        )
        for position, kind, *shape, data in file.execute(query, {"m": method}):
            yield position, kind, np.frombuffer(data, "<f4").reshape(shape)


def forget_changed(path: Path, codes: Mapping[str, Any]) -> None:
    """Forget what a state keeps of methods whose code, any JSON, is not what it was begun with."""
    with naming(path), closing(sqlite3.connect(path, timeout=_PATIENCE)) as file, file:
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
