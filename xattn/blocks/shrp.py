"""SHRP: one routed attention head per layer, and one small MLP for all heads (arXiv 2512.20635).

    o_j = softmax(q_j k_j^T / sqrt(d)) v_j,          E(o) = W_2 GELU(W_1 LN(o))
    r = softmax(W_r mean_n x_n),   j* = argmax r,    x <- x + E(o_j*)      or   x + sum_j r_j E(o_j)

E replaces W_O and the MLP of a transformer block. The gate of j* is 1, with the gradient of r_j*
(straight-through), so a layer whose router always chooses the same head loses nothing by
:meth:`ShrpBlock.pruned`, which keeps only that head. The equations are based on the abstract, because no
program is public.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.base import check_whole
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.blocks.base import Block, received_attention, register_block
from xattn.blocks.routing_usage import (
    count_choices,
    head_to_keep,
    straight_through,
    usage_entropy,
)


@register_block(
    "shrp",
    paper="arXiv 2512.20635",
    complexity="3 N C^2 + N (d + C) m, N^2 d",
    cases=(
        {"heads": 4, "hidden": 12},
        {"heads": 4, "hidden": 12, "routing": "soft"},
        {"heads": 1, "head_dim": 8, "hidden": 12},
    ),
)
class ShrpBlock(Block):
    """Routed heads; ``heads=1`` is the pruned block, a single head without a router.

    With several heads, ``aux`` of the recorded operator has ``usage_entropy``, the entropy of the batch's
    mean of r. Adding it to the loss makes a layer choose the same head for all images; without it usage
    stays spread out, and pruning costs accuracy.

    Args:
        heads: M.
        head_dim: d; by default C / M.
        hidden: m, the hidden width of E; by default 4 C.
        routing: "top1", or "soft", the mixture of all heads, for a warm-up.
        reads: the router's input: the "mean" of all tokens, or the "class" token, the first one.
        decay: decay of the running mean of usage.

    Attributes:
        usage: (M,), running mean of how often each head was chosen in training; it sums to 1.
    """

    usage: Tensor

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        head_dim: int | None = None,
        hidden: int | None = None,
        routing: Literal["top1", "soft"] = "top1",
        reads: Literal["mean", "class"] = "mean",
        decay: float = 0.95,
    ) -> None:
        super().__init__(dim)
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay}; give a number in [0, 1)")
        self.heads, self.routing, self.reads, self.decay = (
            check_whole("heads", heads),
            routing,
            reads,
            decay,
        )
        if head_dim is None and dim % heads:
            raise ValueError(f"heads: got {heads}; give a divisor of dim, {dim}, or head_dim")
        self.head_dim = dim // heads if head_dim is None else check_whole("head_dim", head_dim)
        width = 4 * dim if hidden is None else check_whole("hidden", hidden)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * heads * self.head_dim)
        self.router = nn.Linear(dim, heads) if heads > 1 else None
        self.expand_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.expand_in = nn.Linear(self.head_dim, width)
        self.expand_out = nn.Linear(width, dim)
        self.register_buffer("usage", torch.full((heads,), 1 / heads))

    def run(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> Tensor:
        operator, value, gates = self._attention(x)
        seen = operator.detach()

        def maps() -> dict[str, Tensor]:
            return _maps(seen, grid, prefix)

        mixed = self.mix(operator, value, maps)  # (B, 1 or M, N, d)
        return x + (gates[..., None, None] * self.expand(mixed)).sum(1)

    def expand(self, o: Tensor) -> Tensor:
        """E(o): (..., d) -> (..., C), the same for all heads."""
        return self.expand_out(F.gelu(self.expand_in(self.expand_norm(o))))

    def route(self, x: Tensor) -> Tensor:
        """The shares r (B, M) of the heads, computed from tokens (B, N, C)."""
        if self.router is None:
            return x.new_ones(len(x), 1)
        n = self.norm(x)
        return self.router(n.mean(1) if self.reads == "mean" else n[:, 0]).softmax(-1)

    def operator(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> Operator:
        """The operator A of the chosen head (B, 1, N, N), or of all heads with "soft" routing."""
        return self._attention(x, count=False)[0]

    def maps(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> dict[str, Tensor]:
        """``received``: the mean of A over its rows, (B, 1 or M, h, w)."""
        return _maps(self.operator(x, grid, prefix), grid, prefix)

    def pruned(self, head: int | None = None) -> ShrpBlock:
        """A block with one head, by default the most used in training: y = x + E(o_head).

        Raises:
            ValueError: there is no such head.
        """
        kept = head_to_keep(self.usage, head)
        made = ShrpBlock(
            self.dim,
            1,
            self.head_dim,
            self.expand_in.out_features,
            reads=self.reads,
            decay=self.decay,
        ).to(self.qkv.weight)
        state = {
            k: v for k, v in self.state_dict().items() if not k.startswith(("router", "usage"))
        }
        for name in ("qkv.weight", "qkv.bias"):
            rows = state[name].unflatten(0, (3, self.heads, self.head_dim))
            state[name] = rows[:, kept].flatten(0, 1)
        made.load_state_dict({**state, "usage": made.usage})
        return made.train(self.training)

    def _attention(self, x: Tensor, count: bool = True) -> tuple[SoftmaxOperator, Tensor, Tensor]:
        """A and V of the heads that run, (B, 1 or M, N, d), and their gates (B, 1 or M)."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, self.head_dim))
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, M, N, d)
        shares = self.route(x)
        gates = shares
        if self.routing == "top1" and self.heads > 1:
            chosen = shares.argmax(-1)
            qkv = qkv.take_along_dim(chosen[None, :, None, None, None], 2)
            gates = straight_through(shares, chosen)[:, None]
        if count and self.training and self.heads > 1:
            count_choices(self.usage, shares.argmax(-1), self.decay)
        operator = SoftmaxOperator(qkv[0], qkv[1])
        if self.heads > 1:
            operator.aux = {"usage_entropy": usage_entropy(shares)}
        return operator, qkv[2], gates


@torch.no_grad()
def _maps(operator: Operator, grid: tuple[int, ...] | None, prefix: int) -> dict[str, Tensor]:
    return (
        {}
        if grid is None
        else {"received": received_attention(operator)[..., prefix:].unflatten(-1, grid)}
    )
