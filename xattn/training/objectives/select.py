"""``select``: learn by policy gradient which cells are worth the price of keeping them (L2X, INVASE,
REAL-X, FEX).

    pi = sigmoid(S),   s ~ Bernoulli(pi),   L = - r(s) log pi(s) + price mean pi

r(s) is log p_k(s) minus its mean over the photo's other draws; cells that are not kept are black. Each
step draws masks from the current policy, and each mask takes one pass without gradients. Masks from a
table would need the importance weights pi(s) / mu(s), nearly all of which are near 0. Here p is the
output of the explained network, while INVASE and REAL-X train a second network. Sources: arXiv
1802.07814, openreview BJg_roAcK7 and arXiv 2103.01890.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.softmax.reference import widen
from xattn.runtime.option_checks import Count, NotNegative
from xattn.training.objectives.base import (
    Objective,
    Step,
    Terms,
    register_objective,
    resample_to_cells,
)
from xattn.training.objectives.mask import masked_logits, predicted_targets
from xattn.training.outcome_rows import log_odds


def log_policy(scores: Tensor, masks: Tensor) -> Tensor:
    """Compute log pi(s) (B, N) of masks (B, N, d) under policies with the logits ``scores`` (B, d)."""
    kept, hidden = F.logsigmoid(scores), F.logsigmoid(-scores)
    return (kept[:, None] * masks + hidden[:, None] * (1 - masks)).sum(2)


def policy_loss(log_pi: Tensor, rewards: Tensor) -> Tensor:
    """Compute the mean over draws (B, N) of - (r - mean r of the other draws) log pi; gradients reach only
    ``log_pi``."""
    count = rewards.shape[1]
    others = (rewards.sum(1, keepdim=True) - rewards) / max(count - 1, 1)
    return -((rewards - others).detach() * log_pi).mean()


@register_objective("select", title="Cells that are worth their price", paper="arXiv 1802.07814")
class Select(Objective):
    """The objective that trains a mask of cells by policy gradient.

    Args:
        price: price of keeping a cell, multiplied by the mean of pi.
        draws: number of masks per photo and step, at least two, each of which takes a pass.
        side: number of cells per side of the grid.
    """

    reads = "photos"

    def __init__(self, price: NotNegative = 0.1, draws: Count = 4, side: Count = 14) -> None:
        if draws < 2:
            raise ValueError("draws: got 1; draws are compared with each other, so give 2 or more")
        self.price, self.draws, self.side = price, draws, side

    def on_photos(self, step: Step) -> Terms:
        images, backbone = step.images, step.backbone
        with torch.no_grad():
            taps = backbone(images)
        target = predicted_targets(taps.logits, backbone.task, step.part.places)[:, None]
        maps = resample_to_cells(widen(step.head(taps, target)), (self.side, self.side)).flatten(1)
        draws = torch.stack(
            [torch.rand(self.draws, maps.shape[1], generator=g) for g in step.draws()]
        )
        masks = (draws.to(maps) < maps.detach().sigmoid()[:, None]).to(maps.dtype)
        with torch.no_grad():
            rewards = self._rewards(step, masks, target)
        policy = policy_loss(log_policy(maps, masks), rewards)
        kept = maps.sigmoid().mean()
        return {"loss": policy + self.price * kept, "policy": policy, "kept": kept}

    def _rewards(self, step: Step, masks: Tensor, target: Tensor) -> Tensor:
        """log p (B, N) of the classes ``target`` (B, 1) for photos under ``masks`` (B, N, d)."""
        shape, size = (-1, 1, self.side, self.side), step.images.shape[2:]
        repeated = step.images.repeat_interleave(self.draws, 0)
        # Cells with sharp edges, like the cells of a table.
        sharp = F.interpolate(masks.reshape(shape).to(repeated.dtype), size, mode="nearest-exact")
        logits = masked_logits(step.backbone, repeated, sharp, "raw_normalize")
        index = target.repeat_interleave(self.draws, 0)
        found = F.logsigmoid(log_odds(widen(logits), index, step.backbone.task))
        return found.view(len(masks), self.draws).to(masks.dtype)
