"""Squares: does the signed sum of a map over a square predict how the score changes without the square?

    r_I(sum_{u in I} phi(u), s_k(x) - s_k(x without I))

Infidelity with the optimal scale is mean(df^2) (1 - cos^2), where df is the vector of score changes, and
cos is the cosine of df and the vector of the map's sums, without centring. It cannot distinguish phi from
-phi, and a flat map benefits from mean(df) > 0. The correlation r has neither flaw.
"""

from __future__ import annotations

from dataclasses import dataclass

from xattn.eval.metrics.base import MetricGroup, MetricInfo, MetricInputs
from xattn.eval.metrics.board.correlation import CorrelationMetric, correlation_values
from xattn.eval.metrics.board.masks import MaskList, Squares
from xattn.eval.metrics.curves import check_count
from xattn.eval.metrics.mean_metric import MeanMetric


@dataclass(frozen=True)
class SquaresMetric(CorrelationMetric):
    """Correlation over ``samples`` squares of one size, which are the same squares as in infidelity.

    Args:
        samples: the number of squares per photo. Each takes one pass for all methods together.
        side: side of a square, as a fraction of the photo's shorter side.
    """

    samples: int = 50
    side: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("samples", self.samples)
        if not 0 < self.side <= 1:
            raise ValueError(
                f"side: got {self.side}; give a fraction of the photo's side, in (0, 1]"
            )

    def lists(self) -> tuple[MaskList, ...]:
        return (Squares(self.samples, self.side),)


class SquaresCorrelation(MeanMetric):
    """Mean correlation over squares. ``update(sums, drops, valid=None)`` takes (B, I) each."""

    metric = "squares"
    higher_is_better = True
    values = correlation_values


GROUP = MetricGroup.single(
    SquaresMetric,
    "squares",
    MetricInfo(
        "Pearson correlation of the sum of phi over a square and the log-odds lost without it",
        True,
        -1,
        reads=MetricInputs("class", "squares", "mean"),
        chance=0,
    ),
    "Squares",
    "How well the map's sum over a square goes with what the class loses without it",
    classes=(SquaresCorrelation,),
    cases=({"samples": 9, "fill": "black"},),
    by_name=True,
)
