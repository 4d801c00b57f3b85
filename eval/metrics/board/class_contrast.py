"""Class contrast: does the map of each of two classes fit the outcomes of its own class better than the
other map does?

    [S(phi_a, T_a) - S(phi_b, T_a) + S(phi_b, T_b) - S(phi_a, T_b)] / 2

S is ``squares`` (or ``single-deletion``), T_k are the outcomes of class k, a is the explained class, and b
is the most probable other class. A map that ignores the class scores exactly 0. Perfect maps that are
opposites of each other score 2.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from xattn.eval.metrics.base import Finish, MetricGroup, MetricInfo, MetricInputs, Request, Sample
from xattn.eval.metrics.board.correlation import CorrelationMetric, TableMetric
from xattn.eval.metrics.board.single_deletion import SingleDeletionMetric
from xattn.eval.metrics.board.squares import SquaresMetric
from xattn.eval.metrics.board.table import OutcomeTable

BASES: Mapping[str, type[CorrelationMetric]] = {
    "squares": SquaresMetric,
    "single-deletion": SingleDeletionMetric,
}


@dataclass(frozen=True)
class ContrastMetric(TableMetric):
    """Base class of contrasts, which compare values of the metric ``base``: ``"squares"`` or
    ``"single-deletion"``."""

    base: str = "squares"
    explains_again: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base not in BASES:
            raise ValueError(f"base: got {self.base!r}; choose one of {', '.join(BASES)}")

    def agreement(self, table: OutcomeTable, raw: Tensor | None, target: int) -> float:
        """Compute S; it is 0 if there is no map or S is undefined."""
        if raw is None:
            return 0.0
        base = BASES[self.base](fill=self.fill, score=self.score, mean=self.mean)
        value = base.agreement(table, raw, target)
        return value if math.isfinite(value) else 0.0

    def of_classes(
        self,
        table: OutcomeTable,
        maps: tuple[Tensor | None, Tensor | None],
        classes: tuple[int, int],
    ) -> float:
        """Compute the contrast of the ``maps`` (1, H, W) of two ``classes``."""
        (phi_a, phi_b), (a, b) = maps, classes
        for_a = self.agreement(table, phi_a, a) - self.agreement(table, phi_b, a)
        for_b = self.agreement(table, phi_b, b) - self.agreement(table, phi_a, b)
        return (for_a + for_b) / 2

    def value(self, sample: Sample) -> float:
        """Compute the contrast for one photo."""
        raise NotImplementedError

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        yield from ()
        value = self.value(sample)
        return lambda scores: {self.columns[0]: value}


@dataclass(frozen=True)
class ClassContrastMetric(ContrastMetric):
    """Contrast of the explained class and the most probable other class, which is explained as well."""

    compares: ClassVar[str] = "class"

    def value(self, sample: Sample) -> float:
        second = sample.cohort.second_class_map(sample.place)
        classes = sample.target, sample.outcomes.second(sample.target)
        return self.of_classes(sample.outcomes, (sample.raw, second), classes)


GROUP = MetricGroup.single(
    ClassContrastMetric,
    "class-contrast",
    MetricInfo(
        "how much better maps of two classes fit their own outcomes than each other's",
        True,
        -2,
        2,
        reads=MetricInputs("class", "squares", "mean"),
        chance=0,
    ),
    "Class contrast",
    "How much better the maps of two classes go with their own class than with the other",
    cases=({"fill": "black"},),
    by_name=True,
)
