"""A router that chooses among the heads of a layer and counts how often it uses each, for pruning by SHRP.

    r = softmax(W_r mean_n x_n + b_r),   j* = argmax r,   gate = 1, with the gradient of r_j*
    usage <- decay usage + (1 - decay) mean_b 1[j*_b = j]

arXiv 2512.20635; the equations are ours, based on its abstract. The gate is straight-through, and usage
sums to 1. By itself a router need not choose the same head for all images; adding :func:`usage_entropy` to
the loss makes it do so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.base import check_whole


class Choice(NamedTuple):
    """For B images: ``shares`` (B, M) of the heads, the head ``chosen`` (B,), and its ``gate`` (B,)."""

    shares: Tensor
    chosen: Tensor
    gate: Tensor


class HeadRouter(nn.Module):
    """``router(tokens) -> Choice`` for tokens (B, N, C); in training, it counts how often it chooses each
    head.

    Args:
        dim: C; ``heads``: M.
        decay: decay of the running mean of usage.

    Attributes:
        usage: (M,), the running mean of how often each head was chosen.
        kept: the head fixed by :meth:`settle`, or -1.
    """

    usage: Tensor
    kept: Tensor

    def __init__(self, dim: int, heads: int, decay: float = 0.95) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay}; give a number in [0, 1)")
        self.heads, self.decay = check_whole("heads", heads), decay
        self.linear = nn.Linear(dim, heads)
        self.register_buffer("usage", torch.full((heads,), 1 / heads))
        self.register_buffer("kept", torch.tensor(-1))

    def forward(self, tokens: Tensor) -> Choice:
        shares = self.linear(tokens.mean(1)).softmax(-1)
        if self.kept >= 0:
            chosen = self.kept.expand(len(tokens))
            return Choice(shares, chosen, shares.new_ones(len(tokens)))
        chosen = shares.argmax(-1)
        if self.training:
            count_choices(self.usage, chosen, self.decay)
        return Choice(shares, chosen, straight_through(shares, chosen))

    @torch.no_grad()
    def settle(self, head: int | None = None) -> int:
        """Always choose ``head`` from now on, by default the most used one, and return it.

        Raises:
            ValueError: there is no such head.
        """
        kept = head_to_keep(self.usage, head)
        self.kept.fill_(kept)
        return kept


def straight_through(shares: Tensor, chosen: Tensor) -> Tensor:
    """Gates (B,), all equal to 1, whose gradient is that of the chosen head's share. ``shares`` (B, M) are
    the shares of all heads, ``chosen`` (B,) the chosen heads."""
    share = shares.gather(1, chosen[:, None])[:, 0]
    return 1 + (share - share.detach())


def head_to_keep(usage: Tensor, head: int | None = None) -> int:
    """``head`` or, if it is None, the most used head according to ``usage`` (M,).

    Raises:
        ValueError: there is no such head.
    """
    kept = int(usage.argmax()) if head is None else head
    if not 0 <= kept < len(usage):
        raise ValueError(f"head: got {head}; give 0 to {len(usage) - 1}, or None for the most used")
    return kept


@torch.no_grad()
def count_choices(usage: Tensor, chosen: Tensor, decay: float) -> None:
    """Update the running mean ``usage`` (M,) with the heads ``chosen`` (B,) for a batch."""
    now = F.one_hot(chosen, len(usage)).to(usage.dtype).mean(0)
    usage.lerp_(now, 1 - decay)


def usage_entropy(shares: Tensor) -> Tensor:
    """Entropy, in nats, of ``shares`` (B, M) averaged over images: 0 if all choose the same head with
    certainty."""
    mean = shares.mean(0)
    return -(mean * mean.clamp_min(1e-12).log()).sum()
