"""The raw values of a benchmark, a line for each round, which ``xattn bench --raw FILE.csv`` writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from xattn.runtime.files import write_rows

_ROWS: ContextVar[list[dict[str, Any]] | None] = ContextVar("rows", default=None)


@contextmanager
def raw_rounds(path: Path | None) -> Iterator[None]:
    """What :func:`keep_rounds` is given in the block is written to ``path`` at its end; None keeps nothing.

    Raises:
        ValueError: nothing was kept.
    """
    rows: list[dict[str, Any]] = []
    token = _ROWS.set(rows if path is not None else None)
    try:
        yield
    finally:
        _ROWS.reset(token)
    if path is not None:
        write_rows(path, rows, "raw")


def keep_rounds(of: str, job: str, values: Sequence[float], unit: str = "s") -> None:
    """Keep what was measured of ``job``, a value a round; ``of`` names the row of the printed table."""
    rows = _ROWS.get()
    if rows is not None:
        rows += [
            {"of": of, "job": job, "round": turn, "value": value, "unit": unit}
            for turn, value in enumerate(values)
        ]


def keep_table(lines: Iterable[str]) -> None:
    """Keep the rows of a printed Markdown table whose cells are the raw values."""
    rows = _ROWS.get()
    if rows is not None:
        cells = [[cell.strip() for cell in x.strip("|").split("|")] for x in lines if x[:1] == "|"]
        rows += [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
