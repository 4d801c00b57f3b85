"""The objective of masked outcomes: a map explains how the network's output depends on what is kept.

    L = 1 - corr( P <m_j, S_k>, P y_jk ),    j = 1..N masks m_j of a photo,  y_jk the outcome of class k

S_k (h, w) is the map, <m, S> the sum of S over what mask m keeps, and P removes the mean over the masks
and what is linear in the area they keep. So neither a constant added to a map nor the network's liking for
much or little picture counts, only which parts matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.kernels.softmax.reference import widen

TINY = 1e-12
ROUNDING = 100  # sums over cells and masks are off by less than so many times the precision
REACTS = 1e-6
"""Outcomes whose variance, relative to their mean square, is less than this do not react to masks."""


def area_adjusted(values: Tensor, area: Tensor) -> Tensor:
    """``values`` (..., N) without their mean and without what is linear in ``area`` (..., N)."""
    centred = values - values.mean(-1, keepdim=True)
    slope = area - area.mean(-1, keepdim=True)
    square = slope.square().sum(-1, keepdim=True).clamp_min(TINY)
    return centred - (centred * slope).sum(-1, keepdim=True) / square * slope


def mask_effects(maps: Tensor, masks: Tensor) -> Tensor:
    """<m_j, S_k>, the sums of maps (B, M, h, w) over what masks (B, N, h, w) keep, (B, M, N)."""
    return maps.flatten(2) @ masks.flatten(2).transpose(1, 2)


def correlation(maps: Tensor, masks: Tensor, outcomes: Tensor) -> Tensor:
    """Area-adjusted correlation (B, M) of maps (B, M, h, w) with outcomes (B, M, N) of masks (B, N, h, w).

    It is 0 where an outcome does not vary over the masks, and near 0, with a bounded gradient, where a map
    does not.
    """
    maps, masks, outcomes = widen(maps), widen(masks), widen(outcomes)
    effects = mask_effects(maps, masks)
    area = masks.mean((2, 3))[:, None]
    x, y = area_adjusted(effects, area), area_adjusted(outcomes, area)
    size_x, size_y = x.norm(dim=-1), y.norm(dim=-1)
    # Of what rounding leaves of a constant the direction is noise.
    rounding = ROUNDING * torch.finfo(effects.dtype).eps
    least = rounding * (effects.detach().norm(dim=-1) + 1)
    varies = size_y > rounding * outcomes.norm(dim=-1)
    scale = torch.maximum(size_x, least) * torch.where(varies, size_y, 1)
    return torch.where(varies, (x * y).sum(-1) / scale, 0)


def reacts(masks: Tensor, outcomes: Tensor) -> Tensor:
    """Whether outcomes (B, M, N) vary over masks (B, N, h, w) beyond what their area explains, (B, M)."""
    outcomes = widen(outcomes)
    left = area_adjusted(outcomes, widen(masks).mean((2, 3))[:, None]).square().mean(-1)
    return left > REACTS * outcomes.square().mean(-1).clamp_min(TINY)


def log_odds(logits: Tensor, index: Tensor, task: str) -> Tensor:
    """log p / (1 - p) of classes ``index`` (..., M) by ``logits`` (..., K), (..., M): z_k less the
    log-sum-exp of all other logits, or z_k (multilabel)."""
    chosen = logits.gather(-1, index)
    if task == "multilabel":
        return chosen
    others = logits.unsqueeze(-2).expand(*index.shape, logits.shape[-1])
    others = others.scatter(-1, index.unsqueeze(-1), -torch.inf)
    return chosen - others.logsumexp(-1)
