"""One SQLite file of an evaluation, read as a file that may be damaged."""

from __future__ import annotations

import math
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from xattn.runtime import strict_json

_TABLES = ("meta", "images", "results", "maps", "tops")


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


_PATIENCE = 60  # seconds to wait for another process that has the file locked
_TEXT, _WHOLE, _NUMBER = (str, type(None)), (int, type(None)), (float, type(None))
_IMAGE_TYPES = (int, str, _WHOLE, _TEXT, _NUMBER, _TEXT, _TEXT, _TEXT)
_RESULT_TYPES = (int, str, _TEXT, int, int, float, str, str, (bytes, type(None)), _TEXT)


class Database:
    """One SQLite file. An error becomes one line that names the file and the remedy; contents are checked,
    because a damaged file can hold anything."""

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
        """One transaction; if the disk is full, what was committed before stays."""
        with self._naming(), self._connection:
            self._connection.executemany(statement, rows)

    def settle(self) -> None:
        """Move everything into the one file, so that no journal lies beside it.

        If another process has the file open, that process does so later.
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
                    f"state: {self.path} is not an SQLite file ({text}); give another file, or delete it"
                ) from None
            if re.search(r"locked|full|read-?only|unable to open|disk I/O", text):
                raise OSError(
                    f"state: {self.path} cannot be read or written ({text}); free space, check its "
                    f"permissions, or give another file"
                ) from error
            raise damaged(self.path, text) from error

    # ------------------------------------------------------------------ what it holds

    def check_tables(self) -> None:
        """Refuse a file with other tables, which belongs to another program."""
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
        """Refuse a file in which SQLite finds damage, before any work is done."""
        found = self.rows("PRAGMA quick_check(1)")
        if found != [("ok",)]:
            raise damaged(self.path, " ".join(str(found[0][0]).split()) if found else "no answer")

    def value(self, text: Any) -> Any:
        """Parsed JSON."""
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
        """The row, if its values have these types."""
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
            raise damaged(self.path, "a result that is not a table")
        values = dict(zip(measured, self.numbers(list(measured.values())), strict=True))
        curves = {key: self.numbers(curve) for key, curve in scores.items()}
        return ResultRow._make((*row[:6], values, curves, *row[8:]))


def damaged(path: Path | None, what: str) -> ValueError:
    """The error of a state that is damaged."""
    return ValueError(
        f"state: {path} is damaged ({what}); delete it to measure everything again, or give another "
        f"file"
    )
