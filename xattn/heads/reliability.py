"""Reliability balancing: anchors of each class correct a classifier where it is unsure (arXiv 2305.01486).

    p0 = softmax(logits / T),   conf(p) = 1 + sum_c p_c log p_c / log K    1 one-hot, 0 uniform
    g_c = sum_k softmax_{c,k}(-||e - a_ck|| / delta)              geometric label distribution
    t_c = sum_k softmax_{c,k}(W_q e . W_k a_ck / sqrt(D))         attention to the anchors
    corr = (conf(g) g + conf(t) t) / (conf(g) + conf(t))
    p = (1 - tau) p0 + tau (conf(p0) p0 + (1 - conf(p0)) corr)    trust tau grows from 0 to 1

This module differs from the released code as follows. Anchors start at different points (N(0, 1/D)), not at
zero. Attention is computed within a sample, so that no prediction depends on the batch. The repulsion
between anchors of different classes is a hinge and therefore bounded. Entropies are finite at p = 0.
conf(p0) weights the pull towards the anchors, but no gradient flows from the pull to conf(p0); otherwise
uncertainty would lower the loss. ``repulsion="distances"`` is the published loss of the anchors, which has
no bound.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from xattn.kernels.softmax.reference import widen
from xattn.runtime.option_checks import Count, Positive, checked

TINY = 1e-12
OPTIONS = ("anchors", "temperature", "delta", "margin", "repulsion")


class Balanced(NamedTuple):
    """The result of the correction: ``probabilities`` (B, K), their ``reliability`` (B,) =
    conf(probabilities) in [0, 1], and the two label distributions (B, K) with which they were corrected."""

    probabilities: Tensor
    reliability: Tensor
    geometric: Tensor
    attention: Tensor


def confidence(p: Tensor) -> Tensor:
    """Compute 1 - entropy / log K of probabilities (..., K): 1 for one-hot, 0 for uniform."""
    entropy = -(p * p.clamp_min(TINY).log()).sum(-1)  # xlogy has an infinite slope at 0
    return (1 - entropy / math.log(p.shape[-1])).clamp(0, 1)


class ReliabilityBalancing(nn.Module):
    """Anchors, and the correction computed from them, for any classifier of embeddings e (B, D).

    Args:
        classes: K, at least 2.
        width: D, the width of the embeddings.
        anchors: k, the number of anchors per class.
        temperature: T of p0.
        delta: the scale of the distances.
        margin: the distance below which anchors of different classes repel one another, in units of
            sqrt(D).
        repulsion: "hinge", which acts only within the margin, or "distances", as published, which acts at
            any distance; see :meth:`anchor_loss`.
    """

    @checked
    def __init__(
        self,
        classes: int,
        width: int,
        anchors: Count = 8,
        temperature: Positive = 1.0,
        delta: Positive = 1.0,
        margin: Positive = 1.0,
        repulsion: Literal["hinge", "distances"] = "hinge",
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes: got {classes}; reliability balancing needs at least 2")
        self.temperature, self.delta, self.margin = temperature, delta, margin
        self.repulsion = repulsion
        self.anchors = nn.Parameter(torch.randn(classes, anchors, width) * width**-0.5)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)

    def distances(self, e: Tensor) -> Tensor:
        """Compute ||e - a_ck||, (..., K, k), from embeddings (..., D)."""
        anchors = self.anchors.flatten(0, 1)
        return _distances(e, anchors).unflatten(-1, self.anchors.shape[:2])

    def geometric(self, e: Tensor) -> Tensor:
        """Compute g (..., K) from embeddings (..., D): how close the anchors of each class are to the
        embedding."""
        return (
            (-self.distances(e) / self.delta)
            .flatten(-2)
            .softmax(-1)
            .unflatten(-1, self.anchors.shape[:2])
            .sum(-1)
        )

    def attention(self, e: Tensor) -> Tensor:
        """Compute t (..., K), the attention to each class's anchors, from embeddings (..., D)."""
        scores = self.query(e) @ self.key(self.anchors.flatten(0, 1)).t() / e.shape[-1] ** 0.5
        return widen(scores).softmax(-1).unflatten(-1, self.anchors.shape[:2]).sum(-1)

    def forward(self, e: Tensor, logits: Tensor, trust: Tensor | float = 1.0) -> Balanced:
        """Correct ``logits`` (B, K) of embeddings e (B, D); ``trust`` is tau, in [0, 1]."""
        p0 = (widen(logits) / self.temperature).softmax(-1)
        g, t = self.geometric(e), self.attention(e)
        weights = torch.stack([confidence(g), confidence(t)])
        total = weights.sum(0)
        # If both are uniform, their mean is the correction.
        shares = torch.where(total > TINY, weights / total.clamp_min(TINY), 0.5)
        correction = shares[0, :, None] * g + shares[1, :, None] * t
        sure = confidence(p0)[:, None]
        p = (1 - trust) * p0 + trust * (sure * p0 + (1 - sure) * correction)
        return Balanced(p, confidence(p), g, t)

    def anchor_loss(self) -> Tensor:
        """Compute mean max(0, margin - ||a - a'|| / sqrt(D))^2 over pairs of anchors of different classes.

        With "distances" it is - sum_ij ||A_i - A_j||^2 / (sqrt(D) k^2), where A_i are all k anchors of
        class i."""
        classes, count, width = self.anchors.shape
        if self.repulsion == "distances":
            stacked = self.anchors.flatten(1)
            squares = (stacked[:, None] - stacked).square().sum()
            return -squares / (width**0.5 * count**2)
        flat = self.anchors.flatten(0, 1)
        owner = torch.arange(classes, device=flat.device).repeat_interleave(count)
        apart = owner[:, None] != owner
        gaps = _distances(flat, flat)[apart]
        return (self.margin - gaps / width**0.5).clamp_min(0).square().mean()

    def center_loss(self, e: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        """Compute mean conf(p0) min_k ||e - a_yk|| / sqrt(D) for labels y (B,)."""
        sure = confidence((logits.detach() / self.temperature).softmax(-1))
        own = self.distances(e)[torch.arange(len(e), device=e.device), target]
        return (sure * own.amin(-1)).mean() / e.shape[-1] ** 0.5


def create_balancing(classes: int, width: int, options: dict[str, Any]) -> ReliabilityBalancing:
    """Create a :class:`ReliabilityBalancing` with a head's ``reliability`` options.

    Raises:
        ValueError: if an option is unknown, or a value is invalid.
    """
    unknown = [key for key in options if key not in OPTIONS]
    if unknown:
        raise ValueError(f"reliability: got {unknown[0]!r}; its options are {', '.join(OPTIONS)}")
    try:
        return ReliabilityBalancing(classes, width, **options)
    except ValueError as error:
        raise ValueError(f"reliability: {error}") from None


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Compute |x - y| (..., n) for (..., D) and (n, D), in float32 at least, without the differences."""
    x, y = widen(x), widen(y)
    squares = x.square().sum(-1, keepdim=True) + y.square().sum(-1) - 2 * x @ y.t()
    return squares.clamp_min(TINY).sqrt()
