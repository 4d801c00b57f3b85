"""The ``leaderboard.json`` of ``xattn compare``, read with caution and turned into results again.

The file may come from anywhere: its size is capped before it is read, its JSON is strict, and anything
inconsistent is a :class:`~xattn.packs.contained_files.PackError` for the person at the page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from xattn.app.library import LEADERBOARD
from xattn.eval.metrics.base import Column, MetricInfo
from xattn.eval.metrics.objectives import MARK
from xattn.eval.report import html_data
from xattn.eval.report.aggregate_ranks import Ranking, aggregate_ranks
from xattn.eval.report.results_files import from_dict
from xattn.eval.report.standings import Standing, Wins, too_few, wins
from xattn.eval.results import MIN_IMAGES, Results, is_baseline
from xattn.packs.contained_files import PackError
from xattn.runtime import strict_json
from xattn.runtime.lru_cache import LRUCache

if TYPE_CHECKING:
    from xattn.app.library import Library

MAX_BYTES = 200 << 20
MAX_RESAMPLES = 100_000  # the charts draw them again
MAX_CELLS = 100_000  # methods times columns
KEPT = 4  # comparisons
_NUMBERS = ("mean", "lo", "hi", "diff", "diff_lo", "diff_hi")
_BOARDS = LRUCache(KEPT)  # each of size 1


@dataclass(frozen=True, eq=False)
class Board:
    """A comparison as the page shows it; ``standings`` by (method, column's key)."""

    results: Results
    standings: dict[tuple[str, str], Standing]
    warnings: tuple[str, ...]

    @cached_property
    def columns(self) -> dict[str, Column]:
        """Columns by their keys."""
        return {column.key: column for column in self.results.columns}

    @cached_property
    def ranked(self) -> list[str]:
        """Methods under test, the best first, then masks and sanity rows."""
        best = html_data.ranking(self.results)
        return best + [name for name in self.results.methods if name not in best]

    @cached_property
    def curves(self) -> list[dict[str, Any]]:
        """See :func:`xattn.eval.report.html_data.curves`; takes seconds for many methods."""
        return html_data.curves(self.results)

    @cached_property
    def wins(self) -> list[Wins]:
        """Who is best where."""
        return wins(self.results, list(self.standings.values()))

    @cached_property
    def ranking(self) -> Ranking | None:
        """One place for each method over all metrics; None where there is nothing to rank."""
        return aggregate_ranks(self.results)

    @property
    def too_few(self) -> str:
        """In which columns there is no verdict, in words; "" if in none."""
        return too_few(list(self.standings.values()))

    def marked(self, method: str, key: str) -> str:
        """A method's name, with a dagger if that column is close to its training."""
        return f"{method} {MARK}" if self.standings[method, key].trained_on else method

    def training(self, methods: list[str], keys: list[str]) -> str:
        """Which of these columns are close to the training of a method, in words; "" if none is."""
        said = []
        for name in dict.fromkeys(methods):
            own = [key for key in dict.fromkeys(keys) if self.standings[name, key].trained_on]
            if own:
                said.append(f"The training of {name} is close to {' and '.join(own)}.")
        return " ".join(said)

    def info(self, key: str) -> MetricInfo:
        """What the metric of a column is."""
        return self.results.info(self.columns[key].metric)

    def kind(self, method: str) -> str:
        """What a row is: "sanity row", "mask" or "method"."""
        if is_baseline(method):
            return "sanity row"
        return "mask" if self.results.methods[method].is_mask else "method"

    def verdict(self, method: str, key: str) -> str:
        """Where a method stands in a column, in words."""
        return self.standings[method, key].verdict(self.results)


def arrow(key: str, board: Board) -> str:
    """A column's key with the direction that is better, ↑ or ↓."""
    return f"{key} {'↑' if board.info(key).higher_is_better else '↓'}"


def read(library: Library, comparison_id: str) -> Board:
    """The comparison of that id, kept until the stat signature of its file changes.

    Raises:
        PackError: no such comparison, or a file that is too large, damaged or of another version.
    """
    key = (comparison_id, library.signature(comparison_id, LEADERBOARD))
    board: Board | None = _BOARDS.get(key)
    if board is None:
        board = parse(library.read(comparison_id, LEADERBOARD, MAX_BYTES))
        _BOARDS.put(key, board, 1)
    return board


def parse(data: bytes) -> Board:
    """The bytes of a ``leaderboard.json``.

    Raises:
        PackError: damaged, or of another version.
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
    except Exception as error:  # of any kind: nothing in the file can be relied on
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise PackError(
            f"{LEADERBOARD} cannot be shown ({type(error).__name__}: {why}); "
            f"run xattn compare again with the same arguments"
        ) from None
    return Board(results, table, warnings)


def _check(results: Results) -> None:
    """Shapes and names that the charts rely on."""
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
            raise ValueError("a level is no number")
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
    """A line of the file; None there is NaN here.

    Earlier versions do not say ``trained_on`` or ``judged``, and found a best method on any number of
    images.
    """
    item = {"trained_on": False, "judged": int(item["n"]) >= MIN_IMAGES, **item}
    values: dict[str, Any] = {name: item[name] for name in Standing._fields}
    for name in _NUMBERS:
        values[name] = math.nan if values[name] is None else float(values[name])
    values |= {name: int(values[name]) for name in ("n", "n_invalid")}
    values |= {name: bool(values[name]) for name in ("judged", "trained_on")}
    values |= {
        name: values["judged"] and bool(values[name]) for name in ("best", "level_with_best")
    }
    return Standing(
        **{**values, "method": str(values["method"]), "column": columns[item["column"]]}
    )
