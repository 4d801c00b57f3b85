"""``greedy``: learn maps that order cells as a greedy search does.

    L = sum over cells i before j of softplus(S_j - S_i) / rank i,   divided by sum 1 / rank i

The search starts with the empty photo and in each step adds the cell that gives the highest log-odds for
the photo's class. The masks of the table (``sizes="greedy"``) keep the first 1, 2, ..., d - 1 cells of this
order; the search takes about d^2 / 2 passes per photo. There is no order for other classes, so only the map
of the photo's class is trained.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.softmax.reference import widen
from xattn.training.objectives.base import Objective, Terms, register_objective, resample_to_cells
from xattn.training.objectives.labels import place_in_order
from xattn.training.outcomes import OutcomeBatch


def order_loss(scores: Tensor, places: Tensor) -> Tensor:
    """Compute the loss of ``scores`` (B, d) for an order of the cells; ``places`` (B, d) gives each cell's
    place in this order, from 0 to d - 1."""
    ordered = scores.gather(1, places.argsort(1))  # by place
    behind = F.softplus(ordered[:, None, :] - ordered[:, :, None]).triu(1)  # (i, j): i before j
    weights = 1 / torch.arange(1, scores.shape[1] + 1, dtype=scores.dtype, device=scores.device)
    counts = torch.arange(scores.shape[1] - 1, -1, -1, dtype=scores.dtype, device=scores.device)
    return (behind.sum(2) @ weights).mean() / (weights * counts).sum()


@register_objective("greedy", title="The order that a greedy search finds")
class Greedy(Objective):
    """Train pairs of cells to follow the order of a greedy search; early places count most."""

    players, sizes = True, "greedy"

    def table_loss(self, scores: Tensor, outcomes: OutcomeBatch, index: Tensor) -> Terms:
        masks = outcomes.masks
        maps = resample_to_cells(widen(scores[:, :1]), tuple(masks.shape[2:])).flatten(1)
        return {"loss": order_loss(maps, place_in_order(masks.flatten(2)))}
