"""Dynamic mask attention: each head keeps the w keys whose values score highest, for all queries.

    b_j = a softplus(w . V_j),   A = softmax over the kept keys of (q k^T / sqrt(D) + b)

V_j is the value of token j over all heads; a and w are learned per head through b, the choice of keys
has no gradient. Without a causal mask b does not depend on the query, so one list of keys serves all:
4 N w D operations, no special kernel. Causal: each query keeps the best w keys up to itself.
Trainable Dynamic Mask Sparse Attention, arXiv 2508.02124; the paper's exp(.) around b is left out, as
in the authors' code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.base import Mechanism, register_attention, whole
from xattn.attention.inputs import Inputs
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.operators.lowering import needs_grad
from xattn.attention.operators.patterns import Pattern, chosen_keys_operator, pattern_operator
from xattn.attention.recall import Choice
from xattn.attention.selection import Blocks

ROWS = 2**22  # scores held at a time while the causal lists are made


@register_attention(
    "dma",
    paper="arXiv 2508.02124",
    complexity="N w D",
    causal=True,
    cases=(
        {"window": 4},
        {"window": 4, "causal": True},
        {"window": 4, "causal": True, "backend": "cpu"},
        {"window": 64},
    ),
    bench=({"window": 128}, {"window": 512}),
    studies={"swap": ({"options": {"window": 64}},), "attention-maps": {"options": {"window": 64}}},
)
class DMA(Mechanism):
    """Dynamic mask attention.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        window: w, how many keys are kept beside the prefix tokens, whose b is 0.
        causal: whether a token sees only earlier tokens and itself, always or where a call asks for
            it.

    ``a`` starts at zero: with ``window`` at least N the layer is softmax attention until it learns.
    """

    reads = ("values",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int = 128,
        causal: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        self.window, self.causal = whole("window", window), causal
        self.a = nn.Parameter(torch.zeros(num_heads))
        self.score = nn.Linear(dim, num_heads, bias=False)

    def key_bias(self, v: Tensor) -> Tensor:
        """b, (B, H, N), from values (B, H, N, D)."""
        weight = self.score.weight.unflatten(1, (self.num_heads, -1))  # no copy of v by token
        if needs_grad(v):  # whose gradient then lies as v does
            z = (v @ weight.permute(1, 2, 0)).sum(1).transpose(1, 2)
        else:
            z = (weight.transpose(0, 1) @ v.transpose(2, 3)).sum(1)
        return self.a[:, None] * F.softplus(z)

    def kept(self, b: Tensor) -> Tensor:
        """The patches with the largest b, LongTensor (B, H, w), rising."""
        return b.detach().topk(self.window, sorted=False).indices.sort(-1).values

    def choice(self, inputs: Inputs) -> Choice | None:
        b = self.key_bias(inputs.v[:, :, inputs.prefix :])
        n = b.shape[2]
        if self.causal or inputs.causal:
            return Choice(Blocks(causal_lists(b, self.window), 1, 1))
        return None if self.window >= n else Choice(Blocks(self.kept(b)[:, :, None].int(), n, 1))

    def operator(self, inputs: Inputs) -> Operator:
        b = self.key_bias(inputs.v[:, :, inputs.prefix :])
        if self.causal or inputs.causal:
            blocks = Blocks(causal_lists(b, self.window), 1, 1)
            pattern = Pattern(blocks, bias=b)
            return pattern_operator(inputs.replace(causal=True), pattern, backend=self.backend)
        bias, keep = F.pad(b, (inputs.prefix, 0)), None
        operator: Operator
        if self.window >= b.shape[2]:
            operator = SoftmaxOperator(
                inputs.q, inputs.k, inputs.scale, bias[:, :, None], None, self.backend, True
            )
        else:
            keep = self.kept(b)
            operator = chosen_keys_operator(
                inputs, keep + inputs.prefix, bias, backend=self.backend
            )
        operator.context = b.detach(), keep
        return operator

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """``importance``: b of each patch that is kept, one channel per head, the same for all
        queries and classes; ``kept``: 1 where it is kept."""
        if operator.context is None or inputs.grid is None or len(inputs.grid) != 2:
            return {}
        b, keep = operator.context
        if keep is None:
            return {"importance": b.unflatten(-1, inputs.grid)}
        kept = torch.zeros_like(b).scatter_(-1, keep, 1.0)
        return {
            "importance": (b * kept).unflatten(-1, inputs.grid),
            "kept": kept.unflatten(-1, inputs.grid),
        }


def causal_lists(b: Tensor, window: int) -> Tensor:
    """For each query the ``window`` best keys up to itself, always with itself: int32 (B, H, N, w)."""
    batch, heads, n = b.shape
    window = min(window, n)
    lists = torch.empty(batch, heads, n, window, dtype=torch.int32, device=b.device)
    step = max(1, ROWS // max(1, batch * heads * n))
    for start in range(0, n, step):
        i = torch.arange(start, min(start + step, n), device=b.device)
        later = torch.arange(n, device=b.device) > i[:, None]
        scores = b.detach()[:, :, None].masked_fill(later, -torch.inf)
        scores[:, :, torch.arange(len(i), device="cpu"), i] = torch.inf
        best = scores.topk(window).indices
        lists[:, :, i] = best.masked_fill(best > i[:, None], -1).int()
    return lists
