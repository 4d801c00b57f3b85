"""``labels``: learn maps close to a noisy estimate of the photo's values (Stochastic Amortization).

    L = d mean ( phi_nk - a_nk )^2,    a_nk from only the photo's own masks

Noise of mean 0 in the labels a_nk does not change which phi has the least loss, but a bias does. The
estimates are: ``regression``, constrained least squares with the expectation of s s^T instead of its mean
over the masks, so that a is unbiased; ``permutation``, the gain from adding a cell in an order of all cells
and in the reverse order; ``banzhaf``, the mean of v with the cell minus the mean without it; and ``ridge``,
as in LIME, which is biased. Sources: arXiv 2401.15866 and 1705.07874.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from xattn.runtime.option_checks import Positive
from xattn.training.objectives.base import Link, Objective, Terms, masks_as_game, register_objective
from xattn.training.objectives.shapley import Normalization, normalize_sum
from xattn.training.outcome_rows import size_weights
from xattn.training.outcomes import OutcomeBatch

SIZES = {"regression": "shapley", "permutation": "walk", "banzhaf": "half", "ridge": "shapley"}
Estimate = Literal["regression", "permutation", "banzhaf", "ridge"]


def regression_labels(masks: Tensor, gains: Tensor, total: Tensor) -> Tensor:
    """Compute unbiased Shapley values (B, M, d) from ``gains`` v(s) - v(0) (B, M, N) for ``masks`` (B, N,
    d) that were drawn with Shapley's distribution of sizes; ``total`` (B, M) is v(1) - v(0), to which they
    sum.

        phi = A^-1 (b - 1 (1^T A^-1 b - total) / (1^T A^-1 1)),   A = E s s^T,   b = mean s (v(s) - v(0))
    """
    players = masks.shape[2]
    weights = size_weights("shapley", players).to(masks)
    sizes = torch.arange(1, players, dtype=masks.dtype, device=masks.device)
    both = (weights * sizes * (sizes - 1)).sum() / (players * (players - 1))  # of two cells
    one = (weights * sizes).sum() / players
    # A = (one - both) I + both 1 1^T, and A^-1 1 is a multiple of 1.
    b = gains @ masks / masks.shape[1]
    free = b / (one - both)
    return free + ((total - free.sum(-1)) / players)[..., None]


def permutation_labels(masks: Tensor, values: Tensor, nobody: Tensor, everyone: Tensor) -> Tensor:
    """Compute the mean gain from adding each cell (B, M, d), in an order of all d cells and in the reverse
    order. The first half of ``masks`` (B, 2 (d - 1), d) are the first 1 to d - 1 cells of the order, and
    the second half are their complements."""
    half = masks.shape[1] // 2
    there = torch.cat([nobody[..., None], values[..., :half], everyone[..., None]], -1)
    back = torch.cat([everyone[..., None], values[..., half:], nobody[..., None]], -1)
    added = (there.diff(dim=-1) - back.diff(dim=-1)) / 2  # (B, M, d), by place in the order
    return added.gather(-1, place_in_order(masks)[:, None].expand_as(added))


def place_in_order(masks: Tensor) -> Tensor:
    """Return the place 0 .. d - 1 of each cell (B, d) in the order whose prefixes are the first half of
    the nested ``masks`` (B, 2 (d - 1), d)."""
    return (1 - masks[:, : masks.shape[1] // 2]).sum(1).round().long()


def banzhaf_labels(masks: Tensor, values: Tensor) -> Tensor:
    """Compute the mean of ``values`` (B, M, N) over the masks (B, N, d) with a cell minus the mean over
    the masks without it."""
    count = masks.sum(1)[:, None].clamp_min(1)
    without = (1 - masks).sum(1)[:, None].clamp_min(1)
    return values @ masks / count - values @ (1 - masks) / without


def ridge_labels(masks: Tensor, gains: Tensor, penalty: float) -> Tensor:
    """Compute a ridge regression (B, M, d) of ``gains`` (B, M, N) on ``masks`` (B, N, d)."""
    gram = masks.transpose(1, 2) @ masks
    gram = gram + penalty * torch.eye(masks.shape[2], dtype=masks.dtype, device=masks.device)
    return torch.linalg.solve(gram, (gains @ masks).transpose(1, 2)).transpose(1, 2)


@register_objective(
    "labels", title="A noisy estimate of each photo's values", paper="arXiv 2401.15866"
)
class Labels(Objective):
    """The squared distance between a map's values and labels computed from its photo's own masks.

    Args:
        estimate: how labels are estimated; ``"permutation"`` needs 2 (d - 1) masks of d cells, ``"ridge"``
            is biased and only for comparison.
        link: the type of value: ``"probability"``, ``"log_odds"`` or ``"logit"`` of the class.
        normalization: how a map is normalised to satisfy efficiency before the loss, as in ``shapley``;
            Banzhaf values are not efficient, so they need ``"none"``.
        penalty: ridge penalty for ``"ridge"``.
    """

    players = True

    def __init__(
        self,
        estimate: Estimate = "regression",
        link: Link = "probability",
        normalization: Normalization = "none",
        penalty: Positive = 1.0,
    ) -> None:
        if estimate == "banzhaf" and normalization != "none":
            raise ValueError(
                f"normalization: got {normalization!r}, but Banzhaf values are not efficient; "
                "give none"
            )
        self.estimate, self.link = estimate, link
        self.normalization, self.penalty = normalization, penalty
        self.sizes = SIZES[estimate]  # type: ignore[misc]

    def table_loss(self, scores: Tensor, outcomes: OutcomeBatch, index: Tensor) -> Terms:
        phi, masks, values, nobody, everyone = masks_as_game(scores, outcomes, index, self.link)
        phi = normalize_sum(phi, everyone - nobody, self.normalization)
        labels = self.labels(masks, values, nobody, everyone)
        return {"loss": phi.shape[-1] * (phi - labels).square().mean()}

    def labels(self, masks: Tensor, values: Tensor, nobody: Tensor, everyone: Tensor) -> Tensor:
        """Return the labels a (B, M, d), computed from ``masks`` (B, N, d), their ``values`` (B, M, N),
        and v(0) and v(1), (B, M)."""
        gains = values - nobody[..., None]
        if self.estimate == "regression":
            return regression_labels(masks, gains, everyone - nobody)
        if self.estimate == "permutation":
            return permutation_labels(masks, values, nobody, everyone)
        if self.estimate == "banzhaf":
            return banzhaf_labels(masks, values)
        return ridge_labels(masks, gains, self.penalty)
