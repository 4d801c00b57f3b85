"""MuFidelity: do sums of a map over random sets of cells rank the sets by the score lost without them?

    rho_I(sum_{u in I} phi(u), z_k(x) - z_k(x without I)),    each of 9 x 9 cells in I with probability .2

Bhatt et al. 2020, arXiv 2005.00631, with the defaults of Xplique. The sets differ slightly in size, so if
removing a larger set lowers the score more, even a flat map gets a value above 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from xattn.eval.metrics.base import MetricGroup, MetricInfo, MetricInputs
from xattn.eval.metrics.board.correlation import CorrelationMetric
from xattn.eval.metrics.board.masks import IndependentCells, MaskList
from xattn.eval.metrics.curves import check_count


@dataclass(frozen=True)
class MuFidelityMetric(CorrelationMetric):
    """Rank correlation over sets of cells of about equal size.

    Args:
        cells: the number of cells per side of the grid.
        share: the probability that a cell is removed.
        samples: the number of sets.
    """

    ranks = True
    fill: str = "black"
    score: str = "logit"
    cells: int = 9
    share: float = 0.2
    samples: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("cells", self.cells)
        check_count("samples", self.samples)
        if not 0 < self.share < 1:
            raise ValueError(f"share: got {self.share}; give a probability in (0, 1)")

    def lists(self) -> tuple[MaskList, ...]:
        return (IndependentCells(self.cells, self.share, self.samples),)


GROUP = MetricGroup.single(
    MuFidelityMetric,
    "mufidelity",
    MetricInfo(
        "Spearman correlation of the sum of phi over random sets of cells and the score lost",
        True,
        -1,
        reads=MetricInputs("class", "squares", "black"),
    ),
    "MuFidelity",
    "How well the map's sum over some cells ranks sets of cells by what the class loses without them",
    cases=({"cells": 4, "samples": 12},),
    by_name=True,
)
