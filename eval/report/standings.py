"""Compares every mean of a leaderboard with the best of its column, and adds verdicts, ranks and curves.

The report page and the viewer's Compare page show a :class:`Board`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xattn.eval import bootstrap
from xattn.eval.evaluation.results import MIN_IMAGES, TOO_FEW, Results, is_baseline
from xattn.eval.metrics.base import Column, MetricInfo
from xattn.eval.metrics.objectives import MARK, OBJECTIVES
from xattn.eval.report.aggregate_ranks import Ranking, aggregate_ranks
from xattn.explainers.base import method_title

CURVES = {
    "deletion": ("Deletion", "share of pixels removed, most relevant first"),
    "insertion": ("Insertion", "share of pixels inserted, most relevant first"),
    "morf": ("ROAD-MoRF", "share of pixels imputed, most relevant first"),
    "lerf": ("ROAD-LeRF", "share of pixels imputed, least relevant first"),
}
CASE_METRICS = ("AD", "deletion", "insertion", "ROAD")


class Standing(NamedTuple):
    """One cell of the leaderboard, compared with the best method of its column.

    Attributes:
        mean, lo, hi: the mean of the method with its 95 % interval.
        n, n_invalid: the numbers of valid and invalid images.
        best: whether the method has the best mean in the column, from enough images for a verdict.
        diff, diff_lo, diff_hi: mean(method - first) over the images valid for both, with its paired 95 %
            interval, where first is the method with the best mean; NaN for this method itself.
        level_with_best: whether this interval contains zero; True for the best method.
        judged: whether there are enough images for a verdict. Otherwise, ``best`` and ``level_with_best``
            are False.
        trained_on: whether the metric is close to the training objective of the method's head; the method
            is compared in any case.
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

    def sign(self, results: Results) -> str:
        """The mark next to the mean: "best", "level with best", "better than the best method" or "".

        Only a sanity row can be better than the best method.
        """
        up = results.info(self.column.metric).higher_is_better
        if not self.n or not self.judged:
            return ""
        if self.best:
            return "best"
        if self.level_with_best:
            return "level with best"
        ranked = not is_baseline(self.method) or results.methods[self.method].is_mask
        better = self.diff_lo > 0 if up else self.diff_hi < 0
        return "better than the best method" if better and not ranked else ""

    def verdict(self, results: Results) -> str:
        """The verdict on the method in this column, in words."""
        trained = ", close to its training" if self.trained_on else ""
        if not self.n:
            return "not measured"
        if not self.judged:
            return TOO_FEW
        if self.best:
            return f"best{trained}"
        if results.methods[self.method].is_mask:
            return "a mask, not ranked"
        sign = self.sign(results)
        if sign == "level with best":
            return f"no clear difference from the best{trained}"
        return sign or ("worse than the best" if math.isfinite(self.diff) else "not compared")


def standings(results: Results) -> list[Standing]:
    """Compare every method with the best of its column.

    Sanity rows and masks cannot be best. The same holds for a method that was measured on fewer than
    ``MIN_IMAGES`` images, or on less than half as many images as another method.
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
    """The columns in which a method is best.

    Attributes:
        trained_on: those whose metric is close to the training objective of the method.
        others: the other ones.
        is_trained: whether the method is a head whose training objective is known.
    """

    method: str
    trained_on: tuple[Column, ...]
    others: tuple[Column, ...]
    is_trained: bool

    @property
    def verdict(self) -> str:
        """The verdict in words, to be written after the method's name.

        >>> own = Column("AD", 0.5), Column("IC", 0.5), Column("AD", 0.15)
        >>> Wins("mine", own, (Column("ROAD"),), True).verdict
        'best in AD@50/15, IC@50, close to its training, and in ROAD, not close to it'
        """
        own, others = _named(self.trained_on), _named(self.others)
        if own and others:
            return f"best in {own}, close to its training, and in {others}, not close to it"
        if own:
            return f"best only close to its training: {own}"
        return f"best in {others}" + (", apart from its training" if self.is_trained else "")


def _named(columns: Sequence[Column]) -> str:
    """The keys of columns as text; the levels of a metric are joined, as in "AD@50/15"."""
    levels: dict[str, list[str]] = {}
    for metric, level in columns:
        levels.setdefault(metric, []).extend([] if level is None else [f"{100 * level:g}"])
    return ", ".join(f"{m}@{'/'.join(found)}" if found else m for m, found in levels.items())


def wins(results: Results, table: Sequence[Standing]) -> list[Wins]:
    """The columns in which each method is best; columns with too few images are left out."""
    found = []
    for name, method in results.methods.items():
        best = [s for s in table if s.method == name and s.best]
        own = tuple(s.column for s in best if s.trained_on)
        others = tuple(s.column for s in best if not s.trained_on)
        if best:
            found.append(Wins(name, own, others, method.objective in OBJECTIVES))
    return found


def too_few(table: Sequence[Standing]) -> str:
    """A phrase that lists the columns in which no method has enough images for a verdict; "" if there are
    none."""
    judged = {s.column for s in table if s.judged}
    lacking = list(dict.fromkeys(s.column for s in table if s.n and s.column not in judged))
    if not lacking:
        return ""
    return f"{TOO_FEW} in {_named(lacking)}; at least {MIN_IMAGES} are needed"


class FormattedStanding(NamedTuple):
    """A :class:`Standing` with its numbers as text, which is "-" if nothing was measured."""

    standing: Standing
    mean: str
    interval: tuple[str, str]
    difference: tuple[str, str, str] | None  # the difference from the best method and its interval
    sign: str


@dataclass(frozen=True, eq=False)
class Board:
    """The leaderboard that the report page and the viewer show.

    ``standings`` maps (method, column key) to the cell of the table.
    """

    results: Results
    standings: Mapping[tuple[str, str], Standing]
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, results: Results, table: Sequence[Standing]) -> Board:
        """Make a board from ``results`` and the result of :func:`standings`."""
        return cls(results, {(s.method, s.column.key): s for s in table})

    @cached_property
    def columns(self) -> dict[str, Column]:
        """The columns by key."""
        return {column.key: column for column in self.results.columns}

    @cached_property
    def ranked(self) -> list[str]:
        """The names of all rows: the methods under test, best first, followed by masks and sanity rows."""
        best = ranking(self.results)
        return best + [name for name in self.results.methods if name not in best]

    @cached_property
    def first_key(self) -> str:
        """The key of the column to show first: the first column whose best mean belongs to neither a sanity
        row nor a mask. (In AD, for example, ``ones`` is often best.) The :func:`case_columns` are tried
        before the others."""
        keys = dict.fromkeys(c.key for c in [*case_columns(self.results), *self.results.columns])
        for key in keys:
            sign = 1 if self.info(key).higher_is_better else -1
            own = [s for (_, at), s in self.standings.items() if at == key and s.n]
            best = max(own, key=lambda s: sign * s.mean, default=None)
            if best is not None and self.kind(best.method) == "method":
                return key
        return next(iter(keys))

    @cached_property
    def curves(self) -> list[dict[str, Any]]:
        """The result of :func:`curves`, which takes seconds to compute if there are many methods."""
        return curves(self.results)

    @cached_property
    def wins(self) -> list[Wins]:
        """The columns in which each method is best."""
        return wins(self.results, list(self.standings.values()))

    @cached_property
    def ranks(self) -> Ranking | None:
        """The aggregate rank of each method over all metrics; None if there is nothing to rank."""
        return aggregate_ranks(self.results)

    @property
    def too_few(self) -> str:
        """A phrase that lists the columns without a verdict; "" if there are none."""
        return too_few(list(self.standings.values()))

    @cached_property
    def trained(self) -> set[str]:
        """The keys of the columns that measure something close to the training objective of one of the
        measured methods."""
        return {key for (_, key), s in self.standings.items() if s.trained_on and s.n}

    @cached_property
    def forms(self) -> dict[str, str]:
        """The number format of each column."""
        names = self.results.methods
        return {
            key: number_form(self.info(key), [self.standings[name, key].mean for name in names])
            for key in self.columns
        }

    def formatted(self, method: str, key: str) -> FormattedStanding:
        """The cell of a method and a column key as text."""
        s, form = self.standings[method, key], self.forms[key]
        mean, lo, hi = (format_number(v, form) if s.n else "-" for v in (s.mean, s.lo, s.hi))
        diff = (s.diff, s.diff_lo, s.diff_hi)
        minus = tuple(format_number(v, form) for v in diff) if math.isfinite(s.diff) else None
        return FormattedStanding(s, mean, (lo, hi), minus, s.sign(self.results))  # type: ignore[arg-type]

    def marked_name(self, method: str, key: str) -> str:
        """A method's title, with a dagger if the column is close to the method's training objective."""
        title = method_title(method)
        return f"{title} {MARK}" if self.standings[method, key].trained_on else title

    def training(self, methods: Sequence[str], keys: Sequence[str]) -> str:
        """Sentences that name the columns in ``keys`` that are close to the training objective of one of
        the methods; "" if there are none."""
        said = []
        for name in dict.fromkeys(methods):
            own = [key for key in dict.fromkeys(keys) if self.standings[name, key].trained_on]
            if own:
                said.append(
                    f"The training of {method_title(name)} is close to {' and '.join(own)}."
                )
        return " ".join(said)

    def info(self, key: str) -> MetricInfo:
        """The description of a column's metric."""
        return self.results.info(self.columns[key].metric)

    def title_with_arrow(self, key: str) -> str:
        """A column's key with an arrow for the better direction, ↑ or ↓."""
        return f"{key} {'↑' if self.info(key).higher_is_better else '↓'}"

    def kind(self, method: str) -> str:
        """The kind of a row: "sanity row", "mask" or "method"."""
        if is_baseline(method):
            return "sanity row"
        return "mask" if self.results.methods[method].is_mask else "method"

    def verdict(self, method: str, key: str) -> str:
        """The verdict on a method in a column, in words."""
        return self.standings[method, key].verdict(self.results)


def number_form(info: MetricInfo, means: Iterable[float]) -> str:
    """The number format of a column.

    Numbers are shown with the metric's number of decimals. If this would show only zeros or too many
    digits, scientific notation is used.
    """
    digits = info.digits
    largest = max((abs(mean) for mean in means if math.isfinite(mean)), default=0.0)
    return ".2e" if 0 < largest < 10 ** (1 - digits) or largest >= 1e4 else f".{digits}f"


def format_number(value: float, form: str) -> str:
    shown = f"{value:{form}}"
    return shown.lstrip("-") if float(shown) == 0 else shown  # avoids "-0.00"


def number(value: float) -> float | None:
    """A number rounded to five significant digits, which is enough for a page; None if it is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def case_columns(results: Results) -> list[Column]:
    """The columns by which example cases are chosen.

    These are AD at the level nearest to 50 %, deletion, insertion and ROAD, as far as they were measured.
    If none of them was measured, it is the first column.
    """
    found = []
    for metric in CASE_METRICS:
        columns = [c for c in results.columns if c.metric == metric]
        found += sorted(columns, key=lambda c: abs((c.level or 0.5) - 0.5))[:1]
    return found or results.columns[:1]


def ranking(results: Results) -> list[str]:
    """The methods under test, ordered by their mean rank over :func:`case_columns`, best first."""
    names = [n for n, m in results.methods.items() if not is_baseline(n) and not m.is_mask]
    places = dict.fromkeys(names, 0)
    for column in case_columns(results):
        worse = {n: -s if (s := _goodness(results, n, column)) == s else math.inf for n in names}
        for place, name in enumerate(sorted(names, key=worse.__getitem__)):
            places[name] += place
    return sorted(names, key=places.__getitem__)


def _goodness(results: Results, name: str, column: Column) -> float:
    sign = 1 if results.info(column.metric).higher_is_better else -1
    return sign * bootstrap.mean(results.methods[name].values[column])


# ---------------------------------------------------------------- curves


def curves(results: Results) -> list[dict[str, Any]]:
    """The charts of a report, one for each kind of curve, with a line for each method.

    A line consists of lists of the mean, its lower end and its upper end at each x, and the number of
    images.
    """
    positions = {name: str(m) for m, name in enumerate(results.methods)}
    charts = []
    for key, (title, axis) in CURVES.items():
        chart: dict[str, Any] = {"key": key, "title": title, "axis": axis, "x": [], "lines": {}}
        for name, curve, x in each_curve(results, key):
            chart["x"] = x  # the same for all methods
            intervals = bootstrap.mean_intervals(
                curve, n_resamples=results.n_resamples, seed=results.protocol.seed
            )
            *band, counts = zip(*intervals, strict=True)
            line = [*([number(v) for v in part] for part in band), max(counts)]
            chart["lines"][positions[name]] = line
        if chart["lines"]:
            charts.append(chart)
    return charts


def each_curve(
    results: Results, key: str
) -> Iterator[tuple[str, NDArray[np.float64], list[float]]]:
    """For each method with this kind of curve, yield its name, the curves (n, T) of its images, and x (T,).

    The curves include the score of the image without a mask.
    """
    clean = np.array([image.p for image in results.images], dtype=np.float64)
    for name, method in results.methods.items():
        scores = method.scores.get(key)
        if scores is None or scores.ndim != 2 or not np.isfinite(scores).any():
            continue
        curve = _with_clean(key, scores, clean)
        x = _shares(results, key, curve.shape[1])
        if x:
            yield name, curve, x


def _with_clean(
    key: str, scores: NDArray[np.float64], clean: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Add the clean score at the start of deletion curves and at the end of insertion curves.

    (n, T) -> (n, T + 1); other curves are returned unchanged.
    """
    end = np.where(np.isnan(scores[:, :1]), np.nan, clean[:, None])
    ends = {"deletion": [end, scores], "insertion": [scores, end]}
    return np.concatenate(ends.get(key, [scores]), axis=1)


def _shares(results: Results, key: str, count: int) -> list[float]:
    """The x values of a curve. For ROAD, these are its levels; if they are not known, the list is empty."""
    if key in ("deletion", "insertion"):
        return [float(f"{t / (count - 1):.5g}") for t in range(count)]
    column = "ROAD-MoRF" if key == "morf" else "ROAD-LeRF"
    levels = [float(level) for level in results.options.get(column, {}).get("levels", ())]
    return levels if len(levels) == count else []
