"""Variants of the loss on masked outcomes, for trials: each leaves out, replaces or adds one part.

    L = 1 - corr_w( P <m_j, S_k>, P y_jk ) + ...      masks m_j of a photo, outcomes y_jk of class k

The loss itself is in :mod:`xattn.training.objectives.outcomes`. Every variant is called like
:func:`xattn.training.objectives.outcomes.outcome_terms`; it returns ``"loss"`` and the values to
log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.heads.maps.evidence import standardise
from xattn.training.objectives.outcomes import (
    TINY,
    area_adjusted,
    correlation,
    loss_inputs,
    mask_effects,
    mean_terms,
    outcome_terms,
)
from xattn.training.outcomes import OutcomeBatch, log_odds

LEAST = 1e-5  # least size of a map's effects; below it, their direction is rounding error


def without_area(scores: Tensor, outcomes: OutcomeBatch, index: Tensor) -> dict[str, Tensor]:
    """The area that a mask keeps is not projected out: P removes only the mean."""
    maps, masks, answers, counted = loss_inputs(scores, outcomes, index)
    weights = masks.new_ones(masks.shape[:2])
    return mean_terms(weighted_correlation(maps, masks, answers, weights, area=False), counted)


def probability_only(scores: Tensor, outcomes: OutcomeBatch, index: Tensor) -> dict[str, Tensor]:
    """The probability of the photo's own class is the only outcome."""
    maps, masks, answers, counted = loss_inputs(scores, outcomes, index)
    counted = counted.clone()
    counted[:, 1:] = 0
    return mean_terms(correlation(maps, masks, answers), counted)


def log_odds_only(scores: Tensor, outcomes: OutcomeBatch, index: Tensor) -> dict[str, Tensor]:
    """The log-odds of the photo's own class and of others are the only outcomes."""
    maps, masks, answers, counted = loss_inputs(scores, outcomes, index)
    counted = counted.clone()
    counted[:, 0] = 0
    return mean_terms(correlation(maps, masks, answers), counted)


def squared_error(scores: Tensor, outcomes: OutcomeBatch, index: Tensor) -> dict[str, Tensor]:
    """Squared error in place of the correlation, with one scale for all photos of a batch.

        1 - explained,   explained = 1 - min_s sum (s x - y)^2 / sum y^2 = (sum x y)^2 / sum x^2 sum y^2

    x and y are effects and outcomes with mean and area removed, and the sums run over masks and
    photos, so photos that react more count more. A negative s is not allowed.
    """
    maps, masks, answers, counted = loss_inputs(scores, outcomes, index)
    x, y = (v * counted[..., None] for v in adjusted(maps, masks, answers))
    groups = [slice(0, 1), slice(1, 2)] + [slice(2, None)] * (maps.shape[1] > 2)
    found = []
    for group in groups:
        a, b = x[:, group], y[:, group]
        size = a.square().sum() * b.square().sum()
        found.append((a * b).sum().clamp_min(0).square() / size.clamp_min(TINY))
    explained = torch.stack(found)
    names = ("probability", "log_odds", "others")[: len(found)]
    return {"loss": 1 - explained.mean(), **dict(zip(names, explained, strict=True))}


def shapley(scores: Tensor, outcomes: OutcomeBatch, index: Tensor) -> dict[str, Tensor]:
    """Masks are weighted by size, as in the Shapley kernel."""
    maps, masks, answers, counted = loss_inputs(scores, outcomes, index)
    weights = shapley_weights(masks.mean((2, 3)))
    return mean_terms(weighted_correlation(maps, masks, answers, weights), counted)


def shapley_weights(area: Tensor) -> Tensor:
    """Weights of masks by the share that each keeps, (..., N), which sum to N.

    KernelSHAP (arXiv 1705.07874) weighs a set of s of M players by (M - 1) / (C(M, s) s (M - s)),
    so all sets of that size together by (M - 1) / (s (M - s)). Sizes in a table are drawn evenly,
    so a mask of size s stands for all sets of that size: its weight is proportional to 1 / (a (1 -
    a)), a = s / M.
    """
    share = area.clamp(0.01, 0.99)  # a mask that keeps all or nothing would have infinite weight
    weights = 1 / (share * (1 - share))
    return weights * (weights.shape[-1] / weights.sum(-1, keepdim=True))


def weighted_correlation(
    maps: Tensor, masks: Tensor, outcomes: Tensor, weights: Tensor, area: bool = True
) -> Tensor:
    """Like :func:`~xattn.training.objectives.outcomes.correlation`, (B, M), but mask j counts
    ``weights[:, j]`` (B, N) times; without ``area`` only the means are removed."""
    weights = weights[:, None]
    total = weights.sum(-1, keepdim=True)

    def centred(values: Tensor) -> Tensor:
        return values - (weights * values).sum(-1, keepdim=True) / total

    effects = mask_effects(maps, masks)
    x, y = centred(effects), centred(outcomes)
    if area:
        slope = centred(masks.mean((2, 3))[:, None])
        square = (weights * slope.square()).sum(-1, keepdim=True).clamp_min(TINY)
        x, y = (v - (weights * v * slope).sum(-1, keepdim=True) / square * slope for v in (x, y))
    least = LEAST * (effects.detach().norm(dim=-1) + 1)
    size_x = torch.maximum((weights * x.square()).sum(-1).clamp_min(TINY).sqrt(), least)
    size_y = (weights * y.square()).sum(-1).clamp_min(TINY).sqrt()
    return (weights * x * y).sum(-1) / (size_x * size_y)


def adjusted(maps: Tensor, masks: Tensor, outcomes: Tensor) -> tuple[Tensor, Tensor]:
    """The effects <m, S> of ``maps`` (B, M, h, w) under ``masks`` (B, N, h, w), and their
    ``outcomes`` (B, M, N), both with mean and area removed, (B, M, N)."""
    area = masks.mean((2, 3))[:, None]
    return area_adjusted(mask_effects(maps, masks), area), area_adjusted(outcomes, area)


@dataclass(frozen=True, eq=False)
class Efficiency:
    """Adds ``weight`` times the mean of :func:`efficiency_gap` over classes.

    ``empty`` has the logits (F, K) of each photo's backgrounds, by the photo's name; the log-odds
    of the empty photo are their mean.
    """

    empty: Mapping[str, Tensor]
    weight: float

    def __call__(self, scores: Tensor, outcomes: OutcomeBatch, index: Tensor) -> dict[str, Tensor]:
        if outcomes.classes is not None:
            raise ValueError(
                "table: it keeps some classes alone; the efficiency term needs a backbone of at most "
                "2,000 classes"
            )
        maps, masks, answers, _ = loss_inputs(scores, outcomes, index)
        whole = log_odds(outcomes.logits[:, 0], index, outcomes.task)
        empty = torch.stack([self.empty[name] for name in outcomes.names]).to(whole)
        of_fills = index[:, None].expand(-1, empty.shape[1], -1)
        difference = whole - log_odds(empty, of_fills, outcomes.task).mean(1)
        gap = efficiency_gap(maps[:, 1:], masks, answers[:, 1:], difference).mean()
        terms = outcome_terms(scores, outcomes, index)
        return {**terms, "loss": terms["loss"] + self.weight * gap, "efficiency": gap}


def efficiency_gap(maps: Tensor, masks: Tensor, odds: Tensor, difference: Tensor) -> Tensor:
    """How far a map's sum is from what the photo adds to the log-odds, (B, M).

        (s sum_u S(u) - D)^2 / (D^2 + var y),    s = x . y / x . x

    D is the log-odds of the photo minus those of the empty one. Maps are learned up to a scale, so
    s scales the map's effects x to the outcomes y (both with mean and area removed). The gap is 0
    for a map whose effects equal the outcomes.

    Args:
        maps: (B, M, h, w). masks: (B, N, h, w). odds: (B, M, N), y. difference: (B, M), D.
    """
    x, y = adjusted(maps, masks, odds)
    least = (LEAST * maps.detach().flatten(2).norm(dim=-1)).square() + TINY
    scale = (x * y).sum(-1) / x.square().sum(-1).clamp_min(least)
    size = difference.square() + y.square().mean(-1)
    return (scale * maps.sum((2, 3)) - difference).square() / size.clamp_min(TINY)


@dataclass(frozen=True, eq=False)
class Distilled:
    """1 minus the correlation over cells between the map of the photo's own class and a teacher's
    map, ``targets`` (h, w) by the photo's name; outcomes are not used."""

    targets: Mapping[str, Tensor]

    def __call__(self, scores: Tensor, outcomes: OutcomeBatch, index: Tensor) -> dict[str, Tensor]:
        maps = loss_inputs(scores, outcomes, index).maps[:, 0]
        targets = torch.stack([self.targets[name] for name in outcomes.names]).to(maps)
        found = (standardise(maps) * standardise(targets)).mean((1, 2)).mean()
        return {"loss": 1 - found, "teacher": found}
