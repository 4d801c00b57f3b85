"""Cross-attention of a few queries to many tokens, with projections after the pooling, and self-attention.

    s_qht = (W_q,h q) . (W_k,h x_t) / sqrt(d) = (W_k,h^T W_q,h q / sqrt(d)) . x_t
    o_q = W_o concat_h W_v,h (A_qh X)

Keys and values are never formed. For Q queries and H heads, this takes 2 N Q H D instead of 2 N D^2
multiplications, and gives the same result as the usual order (Vaswani et al., arXiv 1706.03762). Keys have
no bias, since it would only add the same number to all scores of a query.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xattn.heads.attended import Queries
from xattn.heads.pullback import Step, step


class SelfAttention(nn.Module):
    """The weights of W_o concat_h softmax(X W_q,h (X W_k,h)^T / sqrt(d)) X W_v,h (+ b): 4 D^2 parameters,
    plus D for the output's bias."""

    def __init__(self, width: int, heads: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=bias)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> q, k and v, (B, H, N, D / H)."""
        q, k, v = (self.by_head(part) for part in self.qkv(x).chunk(3, -1))
        return q, k, v

    def by_head(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N, D / H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CrossAttention(nn.Module):
    """Queries and output of multi-head attention; the caller computes the pooling A_qh X between the two.

    Args:
        width: D of queries and tokens.
        heads: H; None uses :func:`head_count`.
        bias: biases of queries, values and output.
        query, output: whether to have W_q and W_o.

    Raises:
        ValueError: ``heads`` does not divide ``width``.
    """

    def __init__(
        self,
        width: int,
        heads: int | None,
        bias: bool = False,
        query: bool = True,
        output: bool = True,
    ) -> None:
        super().__init__()
        self.heads = head_count(width, heads)
        self.q = nn.Linear(width, width, bias=bias) if query else nn.Identity()
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias) if output else nn.Identity()
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def queries(self, queries: Tensor, tokens: Tensor) -> Queries:
        """(B or 1, Q, D) queries, (B, T, D) tokens -> Q H queries whose keys are the tokens themselves."""
        q = self.q(queries).unflatten(-1, (self.heads, -1))
        rows = torch.einsum("bqhd,hdc->bqhc", q * q.shape[-1] ** -0.5, self._split(self.k.weight))
        return Queries(rows.flatten(1, 2), tokens)

    def project(self, pooled: Tensor) -> Step:
        """(B, Q H, D) pooled tokens -> (B, Q, D), and the pullback."""
        heads, weight = self.heads, self._split(self.v.weight)
        parts = pooled.unflatten(1, (-1, heads))
        o = torch.einsum("bqhc,hdc->bqhd", parts, weight).flatten(2)
        if self.v.bias is not None:
            o = o + self.v.bias
        z, back = step(self.proj, o)

        def pull(rows: Tensor) -> Tensor:
            rows = back(rows).unflatten(-1, (heads, -1))
            return torch.einsum("bmqhd,hdc->bmqhc", rows, weight).flatten(2, 3)

        return z, pull

    def _split(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (self.heads, -1))


def head_count(width: int, heads: int | None) -> int:
    """Return ``heads`` if it is valid; for None, the largest divisor of ``width`` with at least 64 channels
    per head.

    >>> head_count(768, None), head_count(1280, None), head_count(40, None)
    (12, 20, 1)
    """
    if heads is None:
        return next(h for h in range(max(1, width // 64), 0, -1) if width % h == 0)
    if heads < 1 or width % heads:
        raise ValueError(
            f"heads: got {heads}; choose a divisor of the tokens' width {width}, or None"
        )
    return heads
