"""``outcomes``: learn maps whose sums over the kept parts of masks correlate with the network's outputs.

    L = 1 - corr( P <m_j, S_k>, P y_jk ),    j = 1..N masks m_j of a photo,  y_jk the outcome of class k

S_k (h, w), or (t, h, w) for a clip, is the map of class k, <m, S> is the sum of S over the cells that mask
m keeps, and P removes the mean over the masks and the part that is linear in the kept area. The loss
therefore depends neither on a constant added to a map nor on the effect of area alone, but only on which
parts matter. The map of the photo's class is compared with the class's probability and with its log-odds,
and the maps of other classes with their log-odds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xattn.kernels.softmax.reference import widen
from xattn.training.objectives.base import Objective, Terms, register_objective, resample_to_cells
from xattn.training.outcomes import OutcomeBatch

TINY = 1e-12
ROUNDING = 100  # bound on the rounding error of sums over cells and masks, in units of eps
REACTS = 1e-6
"""Outcomes count as not reacting to masks if their variance divided by their mean square is below
this."""


def area_adjusted(values: Tensor, area: Tensor) -> Tensor:
    """Return ``values`` (..., N) without their mean and without the part that is linear in ``area`` (...,
    N)."""
    centred = values - values.mean(-1, keepdim=True)
    slope = area - area.mean(-1, keepdim=True)
    square = slope.square().sum(-1, keepdim=True).clamp_min(TINY)
    return centred - (centred * slope).sum(-1, keepdim=True) / square * slope


def mask_effects(maps: Tensor, masks: Tensor) -> Tensor:
    """Compute <m_j, S_k>, the sums of maps (B, M, h, w) over the cells that masks (B, N, h, w) keep, (B,
    M, N)."""
    return maps.flatten(2) @ masks.flatten(2).transpose(1, 2)


def correlation(maps: Tensor, masks: Tensor, outcomes: Tensor) -> Tensor:
    """Compute the area-adjusted correlation (B, M) of maps (B, M, h, w) with outcomes (B, M, N) of masks
    (B, N, h, w).

    The correlation is 0 if an outcome does not vary over the masks. If a map does not vary, the correlation
    is near 0 and its gradient is bounded.
    """
    maps, masks, outcomes = widen(maps), widen(masks), widen(outcomes)
    effects = mask_effects(maps, masks)
    area = masks.flatten(2).mean(2)[:, None]
    x, y = area_adjusted(effects, area), area_adjusted(outcomes, area)
    size_x, size_y = x.norm(dim=-1), y.norm(dim=-1)
    # What rounding leaves of a constant has a random direction.
    rounding = ROUNDING * torch.finfo(effects.dtype).eps
    least = rounding * (effects.detach().norm(dim=-1) + 1)
    varies = size_y > rounding * outcomes.norm(dim=-1)
    scale = torch.maximum(size_x, least) * torch.where(varies, size_y, 1)
    return torch.where(varies, (x * y).sum(-1) / scale, 0)


def reacts_to_masks(masks: Tensor, outcomes: Tensor) -> Tensor:
    """Return (B, M): whether outcomes (B, M, N) vary over masks (B, N, h, w) beyond the effect of area."""
    outcomes = widen(outcomes)
    left = area_adjusted(outcomes, widen(masks).flatten(2).mean(2)[:, None]).square().mean(-1)
    return left > REACTS * outcomes.square().mean(-1).clamp_min(TINY)


class LossInputs(NamedTuple):
    """The inputs of a loss: ``maps`` (B, 1 + M, h, w) are compared with ``answers`` (B, 1 + M, N) under
    ``masks`` (B, N, h, w); the photo's class comes first and appears twice, for its probability and for
    its log-odds. ``counted`` (B, 1 + M) is 1 if an outcome reacts to masks, and otherwise 0."""

    maps: Tensor
    masks: Tensor
    answers: Tensor
    counted: Tensor


def loss_inputs(scores: Tensor, outcomes: OutcomeBatch, index: Tensor) -> LossInputs:
    """Combine ``scores`` (B, M, r, r') of the classes ``index`` (B, M), in which the photo's own class
    comes first, with the outcomes of these classes."""
    maps = resample_to_cells(widen(scores), tuple(outcomes.masks.shape[2:]))
    odds = outcomes.log_odds(index).to(maps.dtype)
    answers = torch.cat([outcomes.probabilities(index[:, :1]).to(maps.dtype), odds], 1)
    masks = outcomes.masks.to(maps.dtype)
    counted = reacts_to_masks(masks, answers).to(maps.dtype)
    return LossInputs(torch.cat([maps[:, :1], maps], 1), masks, answers, counted)


def mean_terms(found: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """Compute the loss from the correlations ``found`` (B, 1 + M), and the means of these correlations. For
    each photo, all correlations that are ``counted`` (B, 1 + M) have the same weight."""
    share = counted / counted.sum(1, keepdim=True).clamp_min(1)
    others = found[:, 2:].mean() if found.shape[1] > 2 else found.new_zeros(())
    return {
        "loss": 1 - (share * found).sum(1).mean(),
        "probability": found[:, 0].mean(),
        "log_odds": found[:, 1].mean(),
        "others": others,
    }


def outcome_terms(scores: Tensor, outcomes: OutcomeBatch, index: Tensor) -> dict[str, Tensor]:
    """Compute the loss of ``scores`` (B, M, r, r') of the classes ``index`` (B, M), in which the photo's
    own class comes first; also compute the mean correlation of each part of the loss.

    For each photo, all outcomes that react to masks have the same weight.
    """
    maps, masks, answers, counted = loss_inputs(scores, outcomes, index)
    return mean_terms(correlation(maps, masks, answers), counted)


@register_objective("outcomes", title="Sums over what masks keep follow the network's outputs")
class OutcomesObjective(Objective):
    """The correlation of maps with a table of outcomes, :func:`outcome_terms`."""

    def table_loss(self, scores: Tensor, outcomes: OutcomeBatch, index: Tensor) -> Terms:
        return outcome_terms(scores, outcomes, index)
