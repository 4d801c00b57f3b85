"""Where each method stands: every mean beside the best of its column."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from xattn.eval.metrics.base import Column
from xattn.eval.metrics.registry import METRICS
from xattn.eval.results import Results, Row, is_baseline


class Standing(NamedTuple):
    """One cell of the leaderboard beside the best method of its column.

    ``diff`` = mean(method - best) over images valid in both, with its paired 95 % interval, NaN for
    the best itself. ``level_with_best``: the interval holds zero.
    """

    method: str
    column: Column
    mean: float
    lo: float
    hi: float
    n: int
    n_invalid: int
    best: bool
    diff: float
    diff_lo: float
    diff_hi: float
    level_with_best: bool


def standings(results: Results) -> list[Standing]:
    """Every method against the best of its column.

    Sanity rows and masks cannot be best, nor can a method that was measured on less than half of
    the images that another was measured on.
    """
    rows = {(r.method, Column(r.metric, r.level)): r for r in results.rows()}
    best = {column: _best(results, rows, column) for column in results.columns}
    differences: dict[tuple[str, Column], Any] = {}
    for name in results.methods:
        for rival in dict.fromkeys(best.values()):
            columns = [c for c in results.columns if best[c] == rival]
            if rival is not None and rival != name:
                found = results.compare(name, rival, columns)
                differences.update({(name, Column(d.metric, d.level)): d for d in found})
    table = []
    for column in results.columns:
        for name in results.methods:
            row, d = rows[name, column], differences.get((name, column))
            diff = (math.nan,) * 3 if d is None else (d.diff, d.lo, d.hi)
            level = name == best[column] or (
                d is not None and d.n > 0 and not d.better and not d.worse
            )
            table.append(
                Standing(
                    method=name,
                    column=column,
                    mean=row.mean,
                    lo=row.lo,
                    hi=row.hi,
                    n=row.n,
                    n_invalid=row.n_invalid,
                    best=name == best[column],
                    diff=diff[0],
                    diff_lo=diff[1],
                    diff_hi=diff[2],
                    level_with_best=level,
                )
            )
    return table


def _best(results: Results, rows: Mapping[tuple[str, Column], Row], column: Column) -> str | None:
    sign = 1 if METRICS[column.metric].higher_is_better else -1
    rivals = [
        name
        for name, method in results.methods.items()
        if not is_baseline(name) and not method.is_mask and rows[name, column].n
    ]
    most = max((rows[name, column].n for name in rivals), default=0)
    rivals = [name for name in rivals if 2 * rows[name, column].n >= most]
    return max(rivals, key=lambda name: sign * rows[name, column].mean, default=None)
