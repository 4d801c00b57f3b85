"""Subsets: does the sum of a map over a set of cells predict how the score changes without those cells?

    mean_n r_{I: n cells} (sum_{u in I} phi(u), s_k(x) - s_k(x without I))

All sets in a correlation have the same number of cells. If their areas differ, both sums and drops are
divided by the area. With sets of different sizes, as in ViT-Shapley (Covert et al., arXiv 2206.05282), a
flat map would do well, because removing larger sets lowers the score more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import Self

from xattn.eval.metrics.base import MetricGroup, MetricInfo, MetricInputs
from xattn.eval.metrics.board.correlation import (
    CorrelationMetric,
    cells_for,
    correlation_values,
)
from xattn.eval.metrics.board.masks import MaskList, Subsets
from xattn.eval.metrics.curves import check_count
from xattn.eval.metrics.mean_metric import MeanMetric


@dataclass(frozen=True)
class SubsetsMetric(CorrelationMetric):
    """Correlation over sets of one size, averaged over several sizes.

    Args:
        cells: the number of cells per side of the grid. The default is 14, or the number of patches per
            side if patches of a ViT are dropped and there are fewer than 14.
        kept: the shares of cells that stay. By default, 20, 59, 98 and 137 of 196 cells stay.
        samples: the number of sets of each size.
    """

    cells: int | None = None
    kept: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
    samples: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cells is not None:
            check_count("cells", self.cells)
        check_count("samples", self.samples)
        if not self.kept or not all(0 < share < 1 for share in self.kept):
            raise ValueError(f"kept: got {tuple(self.kept)}; give shares in (0, 1)")

    def for_network(self, network: Any) -> Self:
        made = super().for_network(network)
        return replace(made, cells=made.cells or cells_for(network, made.fill))

    def sizes(self, count: int) -> tuple[int, ...]:
        """Return how many of ``count`` cells are removed, for each size of set."""
        return tuple(count - round(share * count) for share in self.kept)

    def lists(self) -> tuple[MaskList, ...]:
        side = self.cells or 14
        return tuple(Subsets(side, size, self.samples) for size in self.sizes(side**2))


class SubsetsCorrelation(MeanMetric):
    """Mean correlation for subsets of one size. ``update(sums, drops, valid=None)`` takes (B, I) each."""

    metric = "subsets"
    higher_is_better = True
    values = correlation_values


GROUP = MetricGroup.single(
    SubsetsMetric,
    "subsets",
    MetricInfo(
        "Pearson correlation of the sum of phi over cells and the log-odds lost, mean over sizes of sets",
        True,
        -1,
        reads=MetricInputs("class", "squares", "mean"),
        chance=0,
    ),
    "Sets of cells",
    "How well the map's sum over many cells goes with what the class loses without them",
    classes=(SubsetsCorrelation,),
    cases=({"cells": 5, "samples": 6, "kept": (0.3, 0.7), "fill": "black"},),
    by_name=True,
)
