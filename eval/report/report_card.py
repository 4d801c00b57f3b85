"""The report card of a run, which tests whether each column can be trusted to recognise degraded maps.

    ladder cells, photo   Spearman(-t, mean of rung t) >= .9, and the mean over photos has its lower end
                          above 0, for 2 of 3 methods whose maps are degraded
                          (:mod:`xattn.eval.sanity.ladders`)
    null                  rows that explain nothing are not above chance, and are below the first method
    invariance            a factor, an offset or a monotonic function does not change a value, if the column
                          claims this
    halves                two random halves of the photos order the methods alike: mean Spearman >= .8
    agreement             Kendall's W of the columns that are used for ranks

A column may be used for ranks only if it passes on both ladders. The other tests are shown but not
required.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from xattn.correlation import ranks, spearman
from xattn.eval import bootstrap
from xattn.eval.evaluation.results import MIN_IMAGES, Results
from xattn.eval.metrics.base import Column
from xattn.eval.sanity.ladders import LADDERS, NULLS, RUNGS, SAME, rung_name

ORDERED, SAME_ORDER = 0.9, 0.8
SPLITS = 200
TOLERANCE = 1e-3
_RANKS = ("scale", "shift", "order")
INVARIANCE: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("squares", "subsets", "single-deletion"), ("scale", "shift")),
    **dict.fromkeys(("class-contrast", "class-contrast-mosaic", "network-contrast"), ("scale",)),
    **dict.fromkeys(("photo-gain", "monotonicity", "gridpg", "Gini", "entropy"), ("scale",)),
    **dict.fromkeys(("ROAD", "ROAD-MoRF", "ROAD-LeRF", "insertion", "deletion"), _RANKS),
    **dict.fromkeys(("thinned", "comprehensiveness", "sufficiency"), _RANKS),
    "saco": ("scale", "shift"),
    "AOPC": ("scale", "shift"),
    "IROF": ("scale", "shift"),
}
"""For each metric, the changes of a map that should not change the metric's value."""


class CardTest(NamedTuple):
    """One test of a column, with its ``value``. The interval is NaN if there is none, and ``passed`` is
    None if the test is not judged."""

    metric: str
    test: str
    value: float
    lo: float = math.nan
    hi: float = math.nan
    passed: bool | None = None


@dataclass(frozen=True)
class ReportCard:
    """The tests of all columns.

    Attributes:
        tests: all tests.
        photos: the number of photos on which the tests were made.
        anchors: the methods whose maps were degraded.
    """

    tests: tuple[CardTest, ...]
    photos: int
    anchors: tuple[str, ...]

    @property
    def admitted(self) -> tuple[str, ...]:
        """The keys of the columns that may be used for ranks."""
        keys = dict.fromkeys(t.metric for t in self.tests if t.test in _LADDER_TESTS)
        passed = {(t.metric, t.test) for t in self.tests if t.passed}
        return tuple(k for k in keys if all((k, test) in passed for test in _LADDER_TESTS))

    @property
    def notes(self) -> list[str]:
        """Notes for the reader of the card."""
        shown = ", ".join(self.admitted) or "none"
        notes = [
            f"report card: columns that order the ladders of {', '.join(self.anchors)} correctly on "
            f"{self.photos} photos: {shown}; other columns are not used for ranks"
        ]
        if self.photos < MIN_IMAGES:
            notes = [
                f"report card: {self.photos} photos are too few; at least {MIN_IMAGES} are needed"
            ]
        return notes

    def lines(self) -> list[list[str]]:
        """A table with one line per column, after a line of titles.

        A line shows the results on both ladders, the numbers of passed tests, and whether the column may be
        used for ranks.
        """
        titles = ["column", *(f"ladder {x}" for x in LADDERS), "nulls", "invariance", "halves"]
        found: dict[str, dict[str, CardTest]] = {}
        for test in self.tests:
            found.setdefault(test.metric, {})[test.test] = test
        rows = [[*titles, "ranks"]]
        for key, tests in found.items():
            if not set(_LADDER_TESTS) & set(tests):
                continue
            row = [key, *(self._ladder(tests, ladder) for ladder in LADDERS)]
            for kind in ("null ", "invariance "):
                judged = [
                    t for n, t in tests.items() if n.startswith(kind) and t.passed is not None
                ]
                row.append(
                    f"{sum(bool(t.passed) for t in judged)}/{len(judged)}" if judged else "-"
                )
            halves = tests.get("halves")
            row.append("-" if halves is None else f"{halves.value:.2f}")
            rows.append([*row, "yes" if key in self.admitted else "no"])
        return rows

    def _ladder(self, tests: Mapping[str, CardTest], ladder: str) -> str:
        of = (tests.get(f"ladder {ladder}: {name}") for name in self.anchors)
        return " ".join("-" if t is None or math.isnan(t.value) else f"{t.value:.2f}" for t in of)

    def csv_lines(self) -> list[list[object]]:
        """All tests as lines of a CSV table, after a line of titles."""
        lines: list[list[object]] = [list(CardTest._fields)]
        for test in self.tests:
            lines.append([*test[:5], "" if test.passed is None else int(test.passed)])
        return lines


_LADDER_TESTS = tuple(f"ladder {ladder}" for ladder in LADDERS)


def report_card(found: Results, anchors: Sequence[str], run: Results | None = None) -> ReportCard:
    """Make a report card.

    Args:
        found: the results for the rows that :func:`xattn.eval.sanity.ladders.card_rows` returns.
        anchors: the methods whose maps were degraded. The tests of invariance and of rows that explain
            nothing use only the first of these methods.
        run: the results that the columns are to rank, for the tests "halves" and "agreement"; with None,
            these tests are left out.
    """
    tests: list[CardTest] = []
    for column in found.columns:
        table = _Signed(found, column)
        tests += _ladder_tests(table, anchors)
        tests += [t for null in NULLS for t in _null_test(table, anchors[0], null)]
        tests += [t for kind in SAME for t in _same_test(table, anchors[0], kind)]
    card = ReportCard(tuple(tests), len(found.images), tuple(anchors))
    if run is not None:
        tests += [t for column in run.columns for t in _halves(run, column)]
        tests += _agreement(run, card.admitted)
    return ReportCard(tuple(tests), len(found.images), tuple(anchors))


class _Signed:
    """The values (n,) of each row in one column, with changed sign if smaller is better."""

    def __init__(self, results: Results, column: Column) -> None:
        self.results, self.column, self.key = results, column, column.key
        info = results.info(column.metric)
        self.sign = 1.0 if info.higher_is_better else -1.0
        known = results.options.get(column.key, {})
        chance = 1 / known.get("n", 2) ** 2 if column.metric == "gridpg" else info.chance
        self.chance = None if chance is None else self.sign * chance

    def of(self, row: str) -> NDArray[np.float64]:
        return self.sign * self.results.methods[row].values[self.column]

    def interval(self, values: NDArray[np.float64]) -> bootstrap.Interval:
        resamples, seed = self.results.n_resamples, self.results.protocol.seed
        return bootstrap.mean_interval(values, n_resamples=resamples, seed=seed)


def _ladder_tests(table: _Signed, anchors: Sequence[str]) -> list[CardTest]:
    tests, needed = [], min(2, len(anchors))
    for ladder in LADDERS:
        ordered, judged = 0, False
        for anchor in anchors:
            curve = np.stack([table.of(rung_name(anchor, ladder, t)) for t in RUNGS])
            whole = curve[:, ~np.isnan(curve).any(0)]
            if whole.shape[1] < MIN_IMAGES:
                tests.append(CardTest(table.key, f"ladder {ladder}: {anchor}", math.nan))
                continue
            of_mean = _orders(whole.mean(1, keepdims=True))[0]
            own = table.interval(_orders(whole))
            passed, judged = bool(of_mean >= ORDERED and own.lo > 0), True
            ordered += passed
            name = f"ladder {ladder}: {anchor}"
            tests.append(CardTest(table.key, name, float(of_mean), own.lo, own.hi, passed))
        passed_all = ordered >= needed if judged else None
        tests.append(CardTest(table.key, f"ladder {ladder}", ordered, passed=passed_all))
    return tests


def _orders(curves: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rungs, n) -> (n,), Spearman's correlation of each column with -t; 0 if all its values are equal."""
    values = torch.from_numpy(np.ascontiguousarray(curves.T))
    falling = torch.linspace(0, -1, curves.shape[0], dtype=torch.float64, device="cpu")
    return spearman(falling.expand_as(values), values).nan_to_num(0.0).numpy()


def _null_test(table: _Signed, anchor: str, null: str) -> list[CardTest]:
    """Test whether a row that explains nothing is not above chance and is below the first method."""
    values, own = table.of(null), table.of(anchor)
    paired = table.interval(own - values)
    if paired.n < MIN_IMAGES:
        return []
    mean = table.interval(values)
    lowest = table.chance is None or mean.lo <= table.chance + 1e-9
    lo, hi = sorted((table.sign * mean.lo, table.sign * mean.hi))
    passed = lowest and paired.lo > 0
    return [CardTest(table.key, f"null {null}", table.sign * mean.mean, lo, hi, passed)]


def _same_test(table: _Signed, anchor: str, kind: str) -> list[CardTest]:
    """The largest difference in value after a change of the maps; it must be small if the column claims to
    be invariant."""
    own, other = table.of(anchor), table.of(f"{anchor} {kind}")
    apart = np.abs(own - other)
    if not np.isfinite(apart).any():
        return []
    most = float(np.nanmax(apart))
    declared = kind in INVARIANCE.get(table.column.metric, ())
    same = bool((np.isnan(own) == np.isnan(other)).all())  # a lost value is also a change
    limit = TOLERANCE * max(1.0, float(np.nanmax(np.abs(own))))
    passed = same and most <= limit if declared else None
    return [CardTest(table.key, f"invariance {kind}", most, passed=passed)]


def _halves(run: Results, column: Column) -> list[CardTest]:
    names = run.judged_methods
    values = np.array([run.methods[name].values[column] for name in names]).reshape(len(names), -1)
    values = values[:, ~np.isnan(values).any(0)]
    if len(names) < 3 or values.shape[1] < 2 * MIN_IMAGES:
        return []
    rng, found = np.random.default_rng(run.protocol.seed), []
    for _ in range(SPLITS):
        order = rng.permutation(values.shape[1])
        half = len(order) // 2
        means = [values[:, part].mean(1) for part in (order[:half], order[half:])]
        pair = [torch.from_numpy(m)[None] for m in means]
        found.append(float(spearman(*pair).nan_to_num(0.0)))
    value = float(np.mean(found))
    return [CardTest(column.key, "halves", value, passed=value >= SAME_ORDER)]


def _agreement(run: Results, admitted: Sequence[str]) -> list[CardTest]:
    """Kendall's W, corrected for ties, of the orders in which the columns put the methods.

    It is 1 if all orders are the same. Columns in which all methods are equal are left out.
    """
    names, orders = run.judged_methods, []
    for column in run.columns:
        table = _Signed(run, column)
        means = np.array([bootstrap.mean(table.of(name)) for name in names])
        if column.key in admitted and np.ptp(means) > 0:
            orders.append(ranks(torch.from_numpy(means)[None])[0].numpy())
    m, n = len(orders), len(names)
    if m < 2 or n < 3:
        return []
    total = np.sum(orders, axis=0)
    sizes = np.concatenate([np.unique(order, return_counts=True)[1] for order in orders])
    most = m**2 * (n**3 - n) - m * int((sizes**3 - sizes).sum())
    w = 12 * float(((total - total.mean()) ** 2).sum()) / most
    return [CardTest("all", "agreement", w)]
