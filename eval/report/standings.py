"""Where each method stands: every mean beside the best of its column, and who is best, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from xattn.eval.metrics.base import Column
from xattn.eval.metrics.objectives import OBJECTIVES
from xattn.eval.results import MIN_IMAGES, TOO_FEW, Results, is_baseline


class Standing(NamedTuple):
    """One cell of the leaderboard beside the best method of its column.

    ``diff`` = mean(method - first) over images valid in both, with its paired 95 % interval, NaN for
    the first itself, the method with the best mean. ``judged``: these images are enough for a verdict; if
    not, nobody is ``best`` or level with the best. ``level_with_best``: the interval holds zero.
    ``trained_on``: the metric is close to the training of the method's head; nobody is left out of the
    comparison for that.
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
    judged: bool = True
    trained_on: bool = False

    def verdict(self, results: Results) -> str:
        """Where the method stands in the column, in words."""
        up = results.info(self.column.metric).higher_is_better
        trained = ", close to its training" if self.trained_on else ""
        if not self.n:
            return "not measured"
        if not self.judged:
            return TOO_FEW
        if self.best:
            return f"best{trained}"
        if results.methods[self.method].is_mask:
            return "a mask, not ranked"
        if is_baseline(self.method) and (self.diff_lo > 0 if up else self.diff_hi < 0):
            return "better than the best method"
        if self.level_with_best:
            return f"not told apart from the best{trained}"
        return "worse than the best" if math.isfinite(self.diff) else "not compared"


def standings(results: Results) -> list[Standing]:
    """Every method against the best of its column.

    Sanity rows and masks cannot be best, nor can a method that was measured on less than half of
    the images that another was measured on, or on fewer than ``MIN_IMAGES``.
    """
    rows = {(r.method, Column(r.metric, r.level)): r for r in results.rows()}
    first = {column: results.first(column) for column in results.columns}
    differences: dict[tuple[str, Column], Any] = {}
    for name in results.methods:
        for rival in dict.fromkeys(first.values()):
            columns = [c for c in results.columns if first[c] == rival]
            if rival is not None and rival != name:
                found = results.compare(name, rival, columns)
                differences.update({(name, Column(d.metric, d.level)): d for d in found})
    table = []
    for column in results.columns:
        for name in results.methods:
            row, d = rows[name, column], differences.get((name, column))
            diff = (math.nan,) * 3 if d is None else (d.diff, d.lo, d.hi)
            judged = row.n >= MIN_IMAGES if d is None else d.judged
            best = judged and name == first[column]
            level = best or (judged and d is not None and not d.better and not d.worse)
            table.append(
                Standing(
                    method=name,
                    column=column,
                    mean=row.mean,
                    lo=row.lo,
                    hi=row.hi,
                    n=row.n,
                    n_invalid=row.n_invalid,
                    best=best,
                    diff=diff[0],
                    diff_lo=diff[1],
                    diff_hi=diff[2],
                    level_with_best=level,
                    judged=judged,
                    trained_on=row.trained_on,
                )
            )
    return table


class Wins(NamedTuple):
    """The columns in which a method is best: those close to what it was ``trained_on``, and others.

    ``is_trained``: the method is a head whose objective is known.
    """

    method: str
    trained_on: tuple[Column, ...]
    others: tuple[Column, ...]
    is_trained: bool

    @property
    def verdict(self) -> str:
        """What follows the method's name.

        >>> own = Column("AD", 0.5), Column("IC", 0.5), Column("AD", 0.15)
        >>> Wins("mine", own, (Column("ROAD"),), True).verdict
        'best in AD@50/15, IC@50, close to its training; and in ROAD, apart from it'
        """
        own, others = _named(self.trained_on), _named(self.others)
        if own and others:
            return f"best in {own}, close to its training; and in {others}, apart from it"
        if own:
            return f"best only close to its training: {own}"
        return f"best in {others}" + (", apart from its training" if self.is_trained else "")


def _named(columns: Sequence[Column]) -> str:
    """Keys of columns, each metric once with all its levels."""
    levels: dict[str, list[str]] = {}
    for metric, level in columns:
        levels.setdefault(metric, []).extend([] if level is None else [f"{100 * level:g}"])
    return ", ".join(f"{m}@{'/'.join(found)}" if found else m for m, found in levels.items())


def wins(results: Results, table: Sequence[Standing]) -> list[Wins]:
    """Who is best where, in the order of the methods; columns of too few images are left out."""
    found = []
    for name, method in results.methods.items():
        best = [s for s in table if s.method == name and s.best]
        own = tuple(s.column for s in best if s.trained_on)
        others = tuple(s.column for s in best if not s.trained_on)
        if best:
            found.append(Wins(name, own, others, method.objective in OBJECTIVES))
    return found


def too_few(table: Sequence[Standing]) -> str:
    """In which columns no method has images enough for a verdict, in words; empty if there is none."""
    judged = {s.column for s in table if s.judged}
    lacking = list(dict.fromkeys(s.column for s in table if s.n and s.column not in judged))
    if not lacking:
        return ""
    return f"{TOO_FEW} in {_named(lacking)}; it takes at least {MIN_IMAGES}"
