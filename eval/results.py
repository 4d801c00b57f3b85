"""The outcome of an evaluation: per-image numbers, means with intervals, comparisons, warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xattn.eval import bootstrap
from xattn.eval.probes import Column
from xattn.eval.protocol import METRICS, Protocol
from xattn.eval.stream import Skipped

# Rows that a method has to beat; a name may continue, as in "randomized_gradcam".
BASELINES = ("random", "centre", "ones", "randomized")


class ImageRecord(NamedTuple):
    """One scored image: the class that is explained and its probability p without a mask."""

    id: str
    target: int
    target_name: str
    p: float


class Row(NamedTuple):
    """One number of the table: mean over ``n`` images with its 95 % bootstrap interval."""

    method: str
    metric: str
    level: float
    mean: float
    lo: float
    hi: float
    n: int
    n_invalid: int
    forwards: int | None
    protocol_id: str


class Difference(NamedTuple):
    """``diff`` = mean(method - reference) over images valid in both, with its paired interval.

    ``better`` / ``worse``: the whole interval lies on the better / worse side of zero.
    """

    metric: str
    level: float
    diff: float
    lo: float
    hi: float
    n: int
    better: bool
    worse: bool


@dataclass(eq=False)
class MethodResult:
    """One method on n images: ``scores`` hold q and d, ``values`` percentages, NaN if invalid.

    ``forwards`` is what one explanation costs in forward passes; ``valid`` (n,) says which maps
    were neither constant nor non-finite; ``tied`` counts maps of which ties at the threshold keep
    more pixels than a level says, as a saturated map does.
    """

    forwards: int | None
    is_mask: bool
    valid: NDArray[np.bool_]
    scores: dict[str, NDArray[np.float64]]
    values: dict[Column, NDArray[np.float64]]
    tied: int = 0


@dataclass(eq=False)
class Results:
    """What :func:`xattn.eval.evaluate` returns. All rows share images, order and protocol.

    ``protocol.n`` counts images and ``protocol.n_invalid`` the invalid maps of all methods;
    ``skipped`` lists unreadable images; ``cost`` counts forward passes.
    """

    protocol: Protocol
    images: list[ImageRecord]
    methods: dict[str, MethodResult]
    skipped: list[Skipped] = field(default_factory=list)
    backbone: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, int] = field(default_factory=dict)
    n_resamples: int = bootstrap.N_RESAMPLES

    @property
    def columns(self) -> list[Column]:
        return list(next(iter(self.methods.values())).values)

    def rows(self) -> list[Row]:
        """Every mean with its interval, method by method."""
        rows = []
        for name, method in self.methods.items():
            columns = list(method.values)
            matrix = np.stack([method.values[c] for c in columns], axis=1)
            intervals = bootstrap.mean_intervals(
                matrix, n_resamples=self.n_resamples, seed=self.protocol.seed
            )
            for (metric, level), interval in zip(columns, intervals, strict=True):
                rows.append(
                    Row(
                        name,
                        metric,
                        level,
                        interval.mean,
                        interval.lo,
                        interval.hi,
                        interval.n,
                        len(self.images) - interval.n,
                        method.forwards,
                        self.protocol.metric_id(metric, level),
                    )
                )
        return rows

    def mean(self, method: str, metric: str, level: float) -> float:
        """One mean, in percent."""
        values = self._method(method).values
        if Column(metric, level) not in values:
            known = ", ".join(c.key for c in values)
            raise ValueError(f"metric, level: got {metric} at {level}; this run has {known}")
        return bootstrap.mean(values[Column(metric, level)])

    def compare(
        self, method: str, reference: str, columns: Sequence[Column] | None = None
    ) -> list[Difference]:
        """Paired differences ``method - reference``, one a column, with 95 % intervals."""
        a, b = self._method(method).values, self._method(reference).values
        columns = list(a) if columns is None else columns
        matrix = np.stack([a[c] - b[c] for c in columns], axis=1)
        intervals = bootstrap.mean_intervals(
            matrix, n_resamples=self.n_resamples, seed=self.protocol.seed
        )
        differences = []
        for (metric, level), (diff, lo, hi, n) in zip(columns, intervals, strict=True):
            above, below = lo > 0, hi < 0
            better, worse = (above, below) if METRICS[metric].higher_is_better else (below, above)
            differences.append(Difference(metric, level, diff, lo, hi, n, better, worse))
        return differences

    def warnings(self) -> list[str]:
        """One line for each method that is not significantly better in AD than a sanity row."""
        lines = []
        rivals = [n for n in self.methods if is_baseline(n) and not self.methods[n].is_mask]
        columns = [c for c in self.columns if c.metric == "AD"]
        for name, method in self.methods.items():
            if is_baseline(name) or method.is_mask:
                continue
            failures = []
            for rival in rivals:
                for d in self.compare(name, rival, columns):
                    if not d.better and d.n:
                        failures.append(
                            f"{rival} at {100 * d.level:g} % "
                            f"({d.diff:+.2f} [{d.lo:+.2f}, {d.hi:+.2f}])"
                        )
            if failures:
                lines.append(f"{name} does not beat {'; '.join(failures)} in AD")
        for name, method in self.methods.items():
            invalid = int((~method.valid).sum())
            if invalid:
                lines.append(
                    f"{name}: {invalid} constant or non-finite maps, left out of its means"
                )
            if method.tied and not method.is_mask and not is_baseline(name):
                lines.append(
                    f"{name}: ties keep more pixels than the level says on {method.tied} images"
                )
        if self.skipped:
            shown = ", ".join(s.id for s in self.skipped[:5])
            more = ", ..." if len(self.skipped) > 5 else ""
            lines.append(f"{len(self.skipped)} unreadable images skipped: {shown}{more}")
        return lines

    def _method(self, name: str) -> MethodResult:
        if name not in self.methods:
            raise ValueError(f"method: got {name!r}; this run has {', '.join(self.methods)}")
        return self.methods[name]


def is_baseline(name: str) -> bool:
    """Whether a row is a sanity row rather than a method under test."""
    return name in BASELINES or name.startswith("randomized")
