"""DiFull and DiPart: how much of a positive map is in the only cell that the classifier reads?

    mean over two corners i of sum_{u in cell i} phi_i(u)^+ / sum_u phi_i(u)^+

The photo is in the first and the last cell of a mosaic, and other photos are in the other cells. phi_i is
the map of a network whose classifier reads only cell i. In DiFull, the classifier reads the pixels of the
cell; in DiPart, it reads the cell's part of the last feature map (:mod:`xattn.eval.sanity.disconnected`).
In DiFull, the score is that of the photo in both corners, and nothing outside of the cell can change it. In
DiPart, pixels beyond the border of the cell can change the score. Rao, Boehle and Schiele 2022, arXiv
2205.10435.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from xattn.eval import functional
from xattn.eval.metrics.base import Column, Finish, MetricGroup, MetricInfo, Request, Sample
from xattn.eval.metrics.board.gridpg import MosaicOptions, positive_shares
from xattn.eval.metrics.board.masks import join_cells, split_cells


def own_cell_values(maps: Tensor, n: int) -> Tensor:
    """Compute the metric, (B,) float64 in [0, 1], from maps (B, 2, 1, H, W) of the first and the last cell.

    >>> own_cell_values(torch.ones(1, 2, 1, 6, 6), 2)
    tensor([0.2500], dtype=torch.float64)

    Raises:
        ValueError: if the shape is wrong.
    """
    if maps.ndim != 5 or maps.shape[1] != 2:
        raise ValueError(f"maps: got {tuple(maps.shape)}; give (B, 2, 1, H, W)")
    own = [(s[0, 0] + s[1, -1]) / 2 for s in (positive_shares(pair, n) for pair in maps)]
    finite = maps.flatten(1).isfinite().all(1).cpu()
    return torch.where(finite, torch.stack(own), torch.nan)


@dataclass(frozen=True)
class DisconnectedMetric(MosaicOptions):
    """DiFull and DiPart, which take two explanations of a mosaic each, and which can only be used for CNNs
    that end with pooling."""

    compares: ClassVar[str] = "mosaic"
    explains_again: ClassVar[bool] = True
    explains_randomized: ClassVar[bool] = True

    def chance(self, column: Column) -> float | None:
        return 1 / self.n**2

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        yield from ()
        values = dict.fromkeys(self.columns, math.nan)
        explain = sample.explain_randomized
        if explain is not None and not self.halved:
            image = self.mosaic_of(sample).table.image[None]
            cells = split_cells(image, self.n)
            cells = torch.cat([cells[:-1], cells[:1]])
            image, size = join_cells(cells, self.n), image.shape[-2:]
            for column, kind in zip(self.columns, ("full", "part"), strict=True):
                stages = [f"{kind} {self.n} {cell}" for cell in (0, self.n**2 - 1)]
                maps = torch.cat([explain(stage, image).detach().float() for stage in stages])
                sized = functional.upsample(maps, size, sample.resize)
                values[column] = float(own_cell_values(sized[None], self.n))
        return lambda scores: values


_WHAT = "share of the positive map in the cell of a mosaic that the classifier reads, "
GROUP = MetricGroup(
    "disconnected",
    DisconnectedMetric,
    {
        "DiFull": MetricInfo(_WHAT + "every layer seeing it alone", True, kind="localisation"),
        "DiPart": MetricInfo(_WHAT + "of the last feature map", True, kind="localisation"),
    },
    words={
        "DiFull": (
            "Disconnected cells",
            "How much of the map lies in the one photo of a mosaic that the network reads",
        ),
        "DiPart": (
            "Disconnected classifier",
            "How much of the map lies in the one photo of a mosaic whose features the classifier reads",
        ),
    },
    cases=({"confidence": 0.2},),
    by_name=True,
)
