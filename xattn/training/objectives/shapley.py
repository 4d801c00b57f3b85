"""``shapley``: learn maps whose cells are Shapley values of the network's outputs (FastSHAP,
ViT-Shapley).

    L = d mean ( v_k(0) + <s, phi_k> - v_k(s) )^2 + gamma d mean ( sum_n phi_nk - (v_k(1) - v_k(0)) )^2

The means are over photos, classes and masks s of d cells, whose sizes m are drawn as q(m) ~ 1 / (m (d -
m)), in pairs s and 1 - s. For an unrestricted head, the phi with the least loss are the Shapley values of
v_k. Adding a constant to all cells of a map makes it efficient, sum_n phi_nk = v_k(1) - v_k(0), but does
not change the order of the cells, so maps are shown without it. Sources: arXiv 2107.07436 and 2206.05282.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from xattn.runtime.option_checks import NotNegative
from xattn.training.objectives.base import Link, Objective, Terms, masks_as_game, register_objective
from xattn.training.outcomes import OutcomeBatch

SMALLEST = 1e-3  # smallest sum of a map's values, relative to the sum of their sizes

Normalization = Literal["additive", "multiplicative", "none"]


def normalize_sum(phi: Tensor, total: Tensor, how: Normalization) -> Tensor:
    """Adjust the values phi (B, M, d) so that they sum to ``total`` (B, M), v(1) - v(0).

    Raises:
        ValueError: the normalization is multiplicative, but the values sum to about 0.
    """
    left = phi.sum(-1)
    if how == "additive":
        return phi + ((total - left) / phi.shape[-1])[..., None]
    if how == "multiplicative":
        if bool((left.abs() <= SMALLEST * phi.abs().sum(-1)).any()):
            raise ValueError(
                "normalization: the values of a map sum to about 0, so no factor can give them "
                "another sum; give normalization=additive"
            )
        return phi * (total / left)[..., None]
    return phi


@register_objective(
    "shapley", title="Shapley values of the outputs for masked photos", paper="arXiv 2107.07436"
)
class Shapley(Objective):
    """The loss of FastSHAP, on a table of masks with Shapley's distribution of sizes.

    Args:
        link: the type of value: ``"probability"``, ``"log_odds"`` or ``"logit"`` of the class.
        normalization: how a map is made efficient before the loss: by adding a constant to its cells, by
            multiplying it by a factor (impossible for maps with mean 0), or not at all.
        gamma: weight of the efficiency gap, which is 0 after a normalization.
    """

    players, sizes = True, "shapley"

    def __init__(
        self,
        link: Link = "probability",
        normalization: Normalization = "additive",
        gamma: NotNegative = 0.0,
    ) -> None:
        self.link, self.normalization, self.gamma = link, normalization, gamma

    def table_loss(self, scores: Tensor, outcomes: OutcomeBatch, index: Tensor) -> Terms:
        phi, masks, values, nobody, everyone = masks_as_game(scores, outcomes, index, self.link)
        phi = normalize_sum(phi, everyone - nobody, self.normalization)
        predicted = nobody[..., None] + phi @ masks.transpose(1, 2)
        error = phi.shape[-1] * (predicted - values).square().mean()
        gap = phi.shape[-1] * (phi.sum(-1) - (everyone - nobody)).square().mean()
        return {"loss": error + self.gamma * gap, "error": error, "gap": gap}
