"""Reads the ``leaderboard.json`` of ``xattn compare`` with care and turns it back into results.

The file may come from anywhere. Its size is checked before it is read, its JSON must be strict, and any
inconsistency raises a :class:`~xattn.packs.contained_files.PackError`, which the page shows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from xattn.app.library import LEADERBOARD
from xattn.eval.evaluation.results import Results
from xattn.eval.metrics.base import Column
from xattn.eval.report.results_files import from_dict
from xattn.eval.report.standings import Board, Standing
from xattn.packs.contained_files import PackError
from xattn.runtime import strict_json
from xattn.runtime.lru_cache import LRUCache
from xattn.runtime.names import short_reason

if TYPE_CHECKING:
    from xattn.app.library import Library

MAX_BYTES = 200 << 20
MAX_RESAMPLES = 100_000  # the charts repeat the resampling
MAX_CELLS = 100_000  # methods times columns
KEPT = 4  # cached comparisons
_NUMBERS = ("mean", "lo", "hi", "diff", "diff_lo", "diff_hi")
_BOARDS = LRUCache(KEPT)  # each of size 1


def read(library: Library, comparison_id: str) -> Board:
    """The comparison with this id, cached until the stat signature of its file changes.

    Raises:
        PackError: there is no such comparison, or its file is too large, damaged or of another version.
    """
    key = (comparison_id, library.signature(comparison_id, LEADERBOARD))
    return _BOARDS.kept(key, lambda: parse(library.read(comparison_id, LEADERBOARD, MAX_BYTES)))


def parse(data: bytes) -> Board:
    """Parse the bytes of a ``leaderboard.json``.

    Raises:
        PackError: the file is damaged or of another version.
    """
    try:
        record = strict_json.parse(data)
        if record.get("standings") is None:
            raise ValueError("it holds no standings")
        results = from_dict(record)
        _check(results)
        columns = {column.key: column for column in results.columns}
        standings = [_standing(item, columns) for item in record["standings"]]
        table = {(s.method, s.column.key): s for s in standings}
        missing = [(m, c.key) for m in results.methods for c in results.columns]
        if not set(missing) <= set(table):
            raise ValueError("a method has no standing")
        warnings = tuple(str(line)[:1000] for line in record.get("warnings", ()))[:1000]
    except PackError:
        raise
    except Exception as error:  # any kind, since nothing in the file can be relied on
        raise PackError(
            f"{LEADERBOARD} cannot be shown ({type(error).__name__}: {short_reason(error)}); "
            f"run xattn compare again with the same arguments"
        ) from None
    return Board(results, table, warnings)


def _check(results: Results) -> None:
    """Check the shapes and names that the charts rely on."""
    n = len(results.images)
    if not n or not results.methods:
        raise ValueError("it compares nothing")
    whole = type(results.n_resamples) is int and type(results.protocol.seed) is int
    if not whole or not 0 < results.n_resamples <= MAX_RESAMPLES:
        raise ValueError("its resampling cannot be repeated")
    columns = results.columns
    if not columns or len(results.methods) * len(columns) > MAX_CELLS:
        raise ValueError("it has no columns, or too many")
    for column in columns:
        results.info(column.metric).higher_is_better  # noqa: B018 - KeyError for an unknown metric
        if column.level is not None and not math.isfinite(column.level):
            raise ValueError("a level is not a number")
    for image in results.images:
        if not all(isinstance(text, str) for text in (image.id, image.target_name)):
            raise TypeError("an image has no name")
        if type(image.p) not in (int, float):
            raise TypeError("an image has no probability")
    for name, method in results.methods.items():
        if list(method.values) != columns or method.valid.shape != (n,):
            raise ValueError(f"{name} has other columns or images")
        arrays = [*method.values.values(), *method.scores.values()]
        if any(len(values) != n or values.ndim > 2 for values in arrays):
            raise ValueError(f"{name} has other images")
        if any(values.ndim != 1 for values in method.values.values()):
            raise ValueError(f"{name} has more than one value an image")


def _standing(item: dict[str, Any], columns: dict[str, Column]) -> Standing:
    """A line of the file; None in the file becomes NaN."""
    values: dict[str, Any] = {name: item[name] for name in Standing._fields}
    for name in _NUMBERS:
        values[name] = math.nan if values[name] is None else float(values[name])
    values |= {name: int(values[name]) for name in ("n", "n_invalid")}
    signs = ("judged", "trained_on", "best", "level_with_best")
    values |= {name: bool(values[name]) for name in signs}
    return Standing(
        **{**values, "method": str(values["method"]), "column": columns[item["column"]]}
    )
