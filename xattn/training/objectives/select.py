"""``select``: cells that are worth their price, by the policy gradient (L2X, INVASE, REAL-X, FEX).

    pi = sigmoid(S),   s ~ Bernoulli(pi),   L = - r(s) log pi(s) + price mean pi

r(s) is log p_k(s) minus its mean over the photo's other masks. From a table, whose masks were drawn with
the probability mu(s), a mask counts pi(s) / mu(s) times, at most 10; ``on_policy`` draws masks of the
policy itself, each of which is a pass. Here p is the network's own answer, where INVASE and REAL-X train a
second network. Sources: arXiv 1802.07814, openreview BJg_roAcK7 and arXiv 2103.01890.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.softmax.reference import widen
from xattn.runtime.option_checks import Count, NotNegative
from xattn.training.objectives.base import Objective, Step, Terms, on_cells, register_objective
from xattn.training.objectives.mask import masked_logits, targets
from xattn.training.outcome_rows import size_weights
from xattn.training.outcomes import OutcomeBatch, log_odds

MOST = 10.0


def log_policy(scores: Tensor, masks: Tensor) -> Tensor:
    """log pi(s) (B, M, N) of masks (B, N, d) under policies with the logits ``scores`` (B, M, d)."""
    return F.logsigmoid(scores) @ masks.transpose(1, 2) + F.logsigmoid(-scores) @ (
        1 - masks
    ).transpose(1, 2)


def log_sampler(masks: Tensor, sizes: str) -> Tensor:
    """log mu(s) (B, N) of masks (B, N, d) with sizes drawn as ``sizes`` says, uniform within a size."""
    players = masks.shape[2]
    kept = masks.sum(2)
    drawn = size_weights(sizes, players).to(masks)
    log_weight = F.pad(drawn, (1, 1)).log()[kept.round().long()]
    ways = math.lgamma(players + 1) - torch.lgamma(kept + 1) - torch.lgamma(players - kept + 1)
    return log_weight - ways


def others_mean(values: Tensor) -> Tensor:
    """The mean over the last axis of all values but each one itself."""
    count = values.shape[-1]
    return (values.sum(-1, keepdim=True) - values) / max(count - 1, 1)


def policy_loss(log_pi: Tensor, rewards: Tensor, weights: Tensor) -> Tensor:
    """- mean w (r - mean of the others' r) log pi; gradients reach ``log_pi`` alone."""
    advantage = (rewards - others_mean(rewards)) * weights
    return -(advantage.detach() * log_pi).mean()


@register_objective("select", title="Cells that are worth their price", paper="arXiv 1802.07814")
class Select(Objective):
    """The policy gradient of a mask of cells.

    Args:
        price: of keeping a cell, times the mean of pi.
        on_policy: draw masks of the policy itself in each step, ``draws`` passes a photo; else a table's.
        draws: masks a photo and step, on policy.
        cells: a side of the grid, on policy; a table has its own.
    """

    players, sizes = True, "shapley"

    def __init__(
        self,
        price: NotNegative = 0.1,
        on_policy: bool = False,
        draws: Count = 4,
        cells: Count = 14,
    ) -> None:
        self.price, self.draws, self.cells = price, draws, cells
        self.reads = "photos" if on_policy else "table"

    def on_table(self, scores: Tensor, outcomes: OutcomeBatch, index: Tensor) -> Terms:
        masks = widen(outcomes.masks)
        maps = on_cells(widen(scores), tuple(masks.shape[2:])).flatten(2)
        masks = masks.flatten(2).to(maps.dtype)
        log_pi = log_policy(maps, masks)
        mu = log_sampler(masks, outcomes.sizes)[:, None]
        weights = (log_pi.detach() - mu).clamp(max=math.log(MOST)).exp()
        rewards = F.logsigmoid(outcomes.log_odds(index)).to(maps.dtype)
        policy = policy_loss(log_pi, rewards, weights)
        return self._terms(policy, maps)

    def on_photos(self, step: Step) -> Terms:
        images, backbone = step.images, step.backbone
        with torch.no_grad():
            taps = backbone(images)
        target = targets(taps.logits, backbone.task, step.part.places)[:, None]
        maps = on_cells(widen(step.head(taps, target)), (self.cells, self.cells)).flatten(2)
        generator = torch.Generator().manual_seed(hash_of(step.seed))
        draws = torch.rand(
            len(images), self.draws, maps.shape[2], generator=generator, device="cpu"
        )
        masks = (draws.to(maps) < maps.detach().sigmoid()).to(maps.dtype)
        with torch.no_grad():
            rewards = self._rewards(step, masks, target)
        policy = policy_loss(log_policy(maps, masks), rewards, torch.ones_like(rewards))
        return self._terms(policy, maps)

    def _rewards(self, step: Step, masks: Tensor, target: Tensor) -> Tensor:
        """log p (B, 1, N) of the classes ``target`` (B, 1) for photos under ``masks`` (B, N, d)."""
        shape = (-1, 1, self.cells, self.cells)
        repeated = step.images.repeat_interleave(self.draws, 0)
        # Cells with sharp edges, as those of a table.
        size = step.images.shape[2:]
        sharp = F.interpolate(masks.reshape(shape).to(repeated.dtype), size, mode="nearest-exact")
        logits = masked_logits(step.backbone, repeated, sharp, "raw_normalize")
        index = target.repeat_interleave(self.draws, 0)
        found = F.logsigmoid(log_odds(widen(logits), index, step.backbone.task))
        return found.view(len(masks), 1, self.draws).to(masks.dtype)

    def _terms(self, policy: Tensor, maps: Tensor) -> Terms:
        kept = maps.sigmoid().mean()
        return {"loss": policy + self.price * kept, "policy": policy, "kept": kept}


def hash_of(seed: str) -> int:
    """A number of 63 bits for a text, the same in every process."""
    import random

    return random.Random(seed).getrandbits(63)
