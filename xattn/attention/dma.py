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

from xattn.attention.base import Mechanism, register, whole
from xattn.attention.operator import Operator, SoftmaxOperator
from xattn.attention.segments import DENSE, Blocks, Piece, Segment, SegmentsOperator

ROWS = 2**22  # scores held at a time while the causal lists are made


@register("dma", paper="arXiv 2508.02124", complexity="N w D", causal=True)
class DMA(Mechanism):
    """Dynamic mask attention.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        window: w, how many keys are kept beside the prefix tokens, whose b is 0.
        causal: whether a token sees only earlier tokens and itself; prefix tokens see one another.

    ``a`` starts at zero: with ``window`` at least N the layer is softmax attention until it learns.
    """

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
        z = torch.matmul(v, weight.permute(1, 2, 0)).sum(1).transpose(1, 2)
        return self.a[:, None] * F.softplus(z)

    def operator(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...] | None, prefix: int
    ) -> Operator:
        b = F.pad(self.key_bias(v[:, :, prefix:]), (prefix, 0))
        if self.causal:
            return self._causal(q, k, b, prefix)
        tokens = k.shape[2]
        if self.window >= tokens - prefix:
            bias = b[:, :, None]
            return SoftmaxOperator(q, k, None, bias, None, self.backend, every_row=True)
        keep = b[:, :, prefix:].detach().topk(self.window).indices.sort(-1).values + prefix
        always = torch.arange(prefix, device=q.device).expand(*keep.shape[:2], -1)
        columns = torch.cat([always, keep], -1)
        kept = k.gather(2, columns[..., None].expand(-1, -1, -1, k.shape[-1]))
        segment = Segment(kept, bias=b.gather(2, columns))
        piece = Piece(q, (segment,), (columns,))
        return SegmentsOperator([piece], None, tokens, None, self.backend, every_row=True)

    def _causal(self, q: Tensor, k: Tensor, b: Tensor, prefix: int) -> Operator:
        every = torch.arange(q.shape[2], device=q.device)
        lists = causal_lists(b[:, :, prefix:], self.window)
        if self.backend == "auto" and q.device.type == "cpu" and len(every) <= DENSE:
            return SoftmaxOperator(q, k, None, self._mask(lists, b, prefix), None, "auto", True)
        segments = [Segment(k[:, :, prefix:], None, Blocks(lists, 1, 1), bias=b[:, :, prefix:])]
        columns = [every[prefix:]]
        pieces = []
        if prefix:
            first, own = Segment(k[:, :, :prefix]), every[:prefix]
            segments.append(first)
            columns.append(own)
            pieces.append(Piece(q[:, :, :prefix], (first,), (own,)))
        pieces.append(Piece(q[:, :, prefix:], tuple(segments), tuple(columns)))
        return SegmentsOperator(pieces, None, len(every), backend=self.backend)

    def _mask(self, lists: Tensor, b: Tensor, prefix: int) -> Tensor:
        """b for the listed keys, -inf for all others: (B, H, N, N)."""
        n = b.shape[2]
        seen = torch.zeros(*b.shape, n + 1, dtype=torch.bool, device=b.device)
        columns = torch.where(lists < 0, n, lists.long() + prefix)
        seen[:, :, prefix:].scatter_(-1, columns, True)
        seen[..., :prefix] = True
        return b[:, :, None].masked_fill(~seen[..., :n], -torch.inf)

    def maps(
        self, operator: Operator, grid: tuple[int, ...] | None, prefix: int
    ) -> dict[str, Tensor]:
        """``importance``: b of each patch, one channel per head; the same for all queries and classes."""
        if grid is None or len(grid) != 2 or self.causal:
            return {}
        if isinstance(operator, SoftmaxOperator):
            assert operator.bias is not None
            return {"importance": operator.bias[:, :, 0, prefix:].detach().unflatten(-1, grid)}
        (piece,) = operator.pieces  # type: ignore[attr-defined]
        columns, bias = (
            piece.columns[0][..., prefix:],
            piece.segments[0].bias[..., prefix:].detach(),
        )
        full = bias.new_zeros(*bias.shape[:2], operator.shape[3]).scatter_(-1, columns, bias)
        kept = torch.zeros_like(full).scatter_(-1, columns, 1.0)
        return {
            "importance": full[..., prefix:].unflatten(-1, grid),
            "kept": kept[..., prefix:].unflatten(-1, grid),
        }


def causal_lists(b: Tensor, window: int) -> Tensor:
    """For each query the ``window`` best keys up to itself, always with itself: int32 (B, H, N, w)."""
    batch, heads, n = b.shape
    window = min(window, n)
    lists = torch.empty(batch, heads, n, window, dtype=torch.int32, device=b.device)
    step = max(1, ROWS // (batch * heads * n))
    for start in range(0, n, step):
        i = torch.arange(start, min(start + step, n), device=b.device)
        later = torch.arange(n, device=b.device) > i[:, None]
        scores = b.detach()[:, :, None].masked_fill(later, -torch.inf)
        scores[:, :, torch.arange(len(i), device="cpu"), i] = torch.inf
        best = scores.topk(window).indices
        lists[:, :, i] = best.masked_fill(best > i[:, None], -1).int()
    return lists
