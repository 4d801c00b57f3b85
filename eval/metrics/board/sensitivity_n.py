"""Sensitivity-n: is the sum of a map over n cells proportional to the score lost without those cells?

    mean_n r_{I: n cells} (sum_{u in I} phi(u), s_k(x) - s_k(x without I))

This is the metric of Ancona et al. 2018, arXiv 1711.06104, with removed cells set to black and with logits.
It equals ``subsets`` with more sizes, including small ones. (The metric of this name in Quantus is a
different
quantity: it removes cells one after the other in the map's order and correlates over photos.)
"""

from __future__ import annotations

from dataclasses import dataclass

from xattn.eval.metrics.base import MetricGroup, MetricInfo, MetricInputs
from xattn.eval.metrics.board.subsets import SubsetsMetric


@dataclass(frozen=True)
class SensitivityNMetric(SubsetsMetric):
    """Correlation over sets of one size, averaged over sizes from one cell to 80 % of all cells.

    Args:
        cells: the number of cells per side of the grid, with the same default as in ``subsets``.
        kept: the shares of cells that stay. At least one cell is always removed.
        samples: the number of sets of each size.
    """

    fill: str = "black"
    score: str = "logit"
    kept: tuple[float, ...] = (0.995, 0.98, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2)
    samples: int = 50

    def sizes(self, count: int) -> tuple[int, ...]:
        return tuple(dict.fromkeys(max(1, size) for size in super().sizes(count)))


GROUP = MetricGroup.single(
    SensitivityNMetric,
    "sensitivity-n",
    MetricInfo(
        "mean over n of the Pearson correlation of the sum of phi over n cells and the score lost",
        True,
        -1,
        reads=MetricInputs("class", "squares", "black"),
        chance=0,
    ),
    "Sensitivity-n",
    "How well the map's sum over n cells goes with what the class loses without them",
    cases=({"cells": 5, "samples": 6, "kept": (0.9, 0.6)},),
    by_name=True,
)
