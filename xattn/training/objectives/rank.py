"""``rank``: optimise insertion and deletion through a soft order of cells (AHA, arXiv 2604.05819).

    A_ij = -(c_j - t_i)^2,   t_i = 1 - i / (g^2 - 1);   R = Sinkhorn((A + Gumbel noise) / tau)
    D(r) = sum_{i <= r} R_i;   x(q) = (1 - w) x + w reference,   w = blur(upsample D(q g^2))
    L = AUC_q( p_k of x(q); c ) + 1 - AUC_q( p_k of x(q); -c ) + .0025 mean relu(S - avgpool15 S)^2

c are the map's cells, standardised over the photo and passed through a sigmoid, because the anchors t are
in [0, 1]. In each step, g is drawn from 7 to 28; tau falls from 1 to .3 over the run. Each share q needs a
pass with gradients, so the objective is expensive; it optimises the metrics insertion and deletion
directly.
"""

from __future__ import annotations

import random
import warnings
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.softmax.reference import widen
from xattn.runtime.option_checks import Condition, Count, NotNegative, Positive
from xattn.training.objectives.base import (
    Objective,
    Step,
    Terms,
    register_objective,
    resample_to_cells,
)
from xattn.training.objectives.mask import predicted_targets
from xattn.training.outcome_rows import replacement_pixels

ROUNDS = 30
OFF = 0.1  # how far from 1 the sum of a column may be without a warning
WINDOW = 15


def soft_order(
    cells: Tensor, tau: float, rounds: int = ROUNDS, noise: Tensor | None = None
) -> Tensor:
    """Compute the doubly stochastic matrix R (B, n, n) of cells (B, n) in [0, 1]: R_ij is the degree to
    which cell j has place i if cells are sorted from the highest to the lowest. ``noise`` (B, n, n) is
    added to the logits before the temperature."""
    count = cells.shape[1]
    places = 1 - torch.arange(count, dtype=cells.dtype, device=cells.device) / max(count - 1, 1)
    logits = -(cells[:, None, :] - places[None, :, None]).square()
    logits = (logits if noise is None else logits + noise) / tau
    for _ in range(rounds):
        logits = logits - logits.logsumexp(1, keepdim=True)  # over the places i
        logits = logits - logits.logsumexp(2, keepdim=True)  # over the cells j
    return logits.exp()


def removed_fraction(order: Tensor, shares: Tensor) -> Tensor:
    """Compute, for each of ``shares`` (Q,), how much of each cell is removed, (B, Q, n), if this share of
    the places is removed, from the first place on; the result is linear between places."""
    count = order.shape[1]
    summed = F.pad(order.cumsum(1), (0, 0, 1, 0))  # after 0 .. n places
    at = shares * count
    low = at.floor().clamp(max=count - 1).long()
    part = (at - low)[None, :, None]
    return (1 - part) * summed[:, low] + part * summed[:, low + 1]


def sharp_spots(scores: Tensor) -> Tensor:
    """Compute mean relu(S - avgpool15 S)^2, which penalises values that stand out from their
    surroundings."""
    smooth = F.avg_pool2d(scores, WINDOW, 1, WINDOW // 2, count_include_pad=False)
    return (scores - smooth).clamp_min(0).square().mean()


@register_objective(
    "rank", title="Insertion and deletion, through a soft order", paper="arXiv 2604.05819"
)
class Rank(Objective):
    """The areas under the deletion and insertion curves for a soft order of the cells.

    Args:
        steps: number of shares q of removed cells, which are evenly spaced from 0 to 1.
        smallest, largest: limits of the side g of the grid, which is drawn anew in each step.
        tau: the final temperature; it starts at 1.
        spots: weight of :func:`sharp_spots`.
        noise: add Gumbel noise to the logits of the order.
        reference: what replaces a removed pixel: ``"black"``, ``"blur"``, ``"mean"``, or ``"drawn"``,
            which draws one of the three at random in each step.
    """

    reads = "photos"

    def __init__(
        self,
        steps: Annotated[int, Condition(lambda n: n >= 2, "an int of at least 2")] = 16,
        smallest: Count = 7,
        largest: Count = 28,
        tau: Positive = 0.3,
        spots: NotNegative = 0.0025,
        noise: bool = True,
        reference: Literal["black", "blur", "mean", "drawn"] = "drawn",
    ) -> None:
        if smallest > largest:
            raise ValueError(
                f"largest: got {largest}, which is below smallest={smallest}; give a larger value"
            )
        self.steps, self.smallest, self.largest = steps, smallest, largest
        self.tau, self.spots, self.noise, self.reference = tau, spots, noise, reference
        self._warned = False

    def on_photos(self, step: Step) -> Terms:
        images, backbone, draw = step.images, step.backbone, random.Random(step.seed)
        with torch.no_grad():
            taps = backbone(images)
        target = predicted_targets(taps.logits, backbone.task, step.part.places)
        scores = widen(step.head(taps, target[:, None]))
        side = draw.randint(self.smallest, self.largest)
        cells = resample_to_cells(scores, (side, side)).flatten(1)
        spread = cells.std(1, correction=0, keepdim=True).clamp_min(1e-6)
        cells = ((cells - cells.mean(1, keepdim=True)) / spread).sigmoid()
        tau = 1 + (self.tau - 1) * step.progress
        fill = (
            draw.choice(("black", "blur", "mean")) if self.reference == "drawn" else self.reference
        )
        behind = torch.stack([replacement_pixels(image, fill) for image in images])
        shares = torch.linspace(0, 1, self.steps, dtype=cells.dtype, device=cells.device)
        areas, noises = [], step.draws()
        for sign in (1, -1):
            noise = self._gumbel(cells, noises)
            order = soft_order(cells if sign > 0 else 1 - cells, tau, noise=noise)
            self._check(order)
            gone = removed_fraction(order, shares).view(len(images), self.steps, side, side)
            areas.append(self._area(step, gone, behind, target))
        deletion, insertion = areas
        spots = sharp_spots(scores)
        loss = deletion + 1 - insertion + self.spots * spots
        return {"loss": loss, "deletion": deletion, "insertion": insertion, "spots": spots}

    def _gumbel(self, cells: Tensor, draws: list[torch.Generator]) -> Tensor | None:
        if not self.noise:
            return None
        count = cells.shape[1]
        even = torch.stack([torch.rand(count, count, generator=g, device="cpu") for g in draws])
        even = even.clamp(1e-12, 1 - 1e-7)
        return -(-even.log()).log().to(cells)

    def _check(self, order: Tensor) -> None:
        """Warn once if Sinkhorn's iteration has not converged."""
        off = float((order.detach().sum(1) - 1).abs().max())
        if off > OFF and not self._warned:
            self._warned = True
            warnings.warn(
                f"rank: after {ROUNDS} rounds of Sinkhorn, the places of a cell sum to 1 only "
                f"within {off:.2f}; give a larger tau",
                stacklevel=2,
            )

    def _area(self, step: Step, gone: Tensor, behind: Tensor, target: Tensor) -> Tensor:
        """The mean over the shares of the probability of ``target`` (B,) for photos in which ``gone``
        (B, Q, g, g) is replaced by ``behind`` (B, 3, H, W), by the trapezoidal rule."""
        size = tuple(step.images.shape[2:])
        weights = blur_weights(F.interpolate(gone, size, mode="bilinear", align_corners=False))
        weights = weights.to(step.images.dtype)[:, :, None]
        mixed = (1 - weights) * step.images[:, None] + weights * behind[:, None]
        logits = widen(step.backbone.logits(mixed.flatten(0, 1)))
        index = target.repeat_interleave(self.steps)[:, None]
        multilabel = step.backbone.task == "multilabel"
        chances = logits.sigmoid() if multilabel else logits.softmax(1)
        curve = chances.gather(1, index).view(len(gone), self.steps)
        return ((curve[:, 1:] + curve[:, :-1]) / 2).mean()


def blur_weights(weights: Tensor) -> Tensor:
    """Smooth weights (B, Q, H, W) with a Gaussian of 1 pixel."""
    kernel = torch.exp(
        -torch.arange(-3, 4, dtype=weights.dtype, device=weights.device).square() / 2
    )
    kernel = kernel / kernel.sum()
    flat = F.pad(weights.flatten(0, 1)[:, None], (3, 3, 3, 3), mode="replicate")
    flat = F.conv2d(F.conv2d(flat, kernel.view(1, 1, 7, 1)), kernel.view(1, 1, 1, 7))
    return flat.view_as(weights)
