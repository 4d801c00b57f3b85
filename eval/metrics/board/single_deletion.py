"""Single deletion: does a map rank cells by how much the score falls when each of them is removed?

    mean_c rho_j(sum_{u in cell j} phi(u), s_k(x) - s_k(x without cell j)),    c x c cells

Hesse et al. 2024, arXiv 2407.11910, use ``cells=4`` and ``score="logit"``. They fine-tune the network on
photos of which half lack a cell, and they exclude a map from the mean if its sums are equal in all cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from xattn.eval.metrics.base import MetricGroup, MetricInfo, MetricInputs
from xattn.eval.metrics.board.correlation import CorrelationMetric, correlation_values
from xattn.eval.metrics.board.masks import EachCell, MaskList
from xattn.eval.metrics.curves import check_count
from xattn.eval.metrics.mean_metric import MeanMetric


@dataclass(frozen=True)
class SingleDeletionMetric(CorrelationMetric):
    """Rank correlation over the cells of grids.

    Args:
        cells: the number of cells per side of the grid, or of each of several grids.
        published: whether cells have floor(H / c) rows, as in the authors' code. If c does not divide the
            side of a photo, the remaining pixels are then never removed.
    """

    ranks = True
    cells: int | tuple[int, ...] = (4, 7)
    published: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for side in self._sides:
            check_count("cells", side)

    @property
    def _sides(self) -> tuple[int, ...]:
        return (self.cells,) if isinstance(self.cells, int) else tuple(self.cells)

    def lists(self) -> tuple[MaskList, ...]:
        return tuple(EachCell(side, self.published) for side in self._sides)


class SingleDeletion(MeanMetric):
    """Mean single deletion on one grid. ``update(sums, drops, valid=None)`` takes (B, c^2) each."""

    metric = "single-deletion"
    higher_is_better = True
    values = partial(correlation_values, ranks=True)


GROUP = MetricGroup.single(
    SingleDeletionMetric,
    "single-deletion",
    MetricInfo(
        "Spearman correlation of the sum of phi over a cell and the log-odds lost without it",
        True,
        -1,
        reads=MetricInputs("class", "squares", "mean"),
        chance=0,
    ),
    "Single deletion",
    "How well the map ranks its cells by what the class loses without each of them",
    classes=(SingleDeletion,),
    cases=({"cells": (2, 3), "fill": "black"}, {"cells": 3, "fill": "black", "score": "logit"}),
    by_name=True,
)
