"""Attention within subsets of the tokens, such as clusters or the tokens that remain after pruning.

    y_i = mean over the subsets that contain query i of  sum_j a_ij v_j,   j over the keys of the subset

The row of a query that is in no subset is 0. Each head of each image has its own subsets, all of the same
size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.attention.inputs import on_cpu, spread_heads
from xattn.attention.operators.base import Operator, check_heads
from xattn.attention.order import take_rows
from xattn.kernels.softmax.reference import widen


class SubsetsOperator(Operator):
    """The operator A (B, H, N, N) of attention within the G subsets of each head.

    Args:
        inner: an operator (B, H G, w, s), the attention of each subset's queries to its keys.
        queries: LongTensor (B, H, G, w), token numbers; ``keys``: (B, H, G, s).
        tokens: N.
        first: an operator (B, H, R, N) with the rows of the first R tokens, which are queries of no subset.
        once: whether every token is known to be a query of at most one subset.
        stochastic, causal: known properties of A.

    Example:
        >>> import torch
        >>> from xattn.attention import SoftmaxOperator, SubsetsOperator
        >>> inner = SoftmaxOperator(*torch.rand(2, 1, 2, 3, 8))
        >>> chosen = torch.tensor([[[0, 2, 4], [1, 3, 5]]])  # the tokens of each head
        >>> A = SubsetsOperator(inner, chosen, chosen, tokens=6)
        >>> A.matvec(torch.rand(1, 2, 6, 8)).shape
        torch.Size([1, 2, 6, 8])
    """

    hides = True

    def __init__(
        self,
        inner: Operator,
        queries: Tensor,
        keys: Tensor,
        tokens: int,
        first: Operator | None = None,
        *,
        once: bool = False,
        stochastic: bool = False,
        causal: bool = False,
    ) -> None:
        self.inner, self.first = inner, first
        self.queries, self.keys = queries.flatten(2), keys.flatten(2)
        self.groups = queries.shape[2]
        self.shape = (*queries.shape[:2], tokens, tokens)
        self.stochastic, self.causal, self.signed = stochastic, causal, inner.signed
        self.share: Tensor | None = None  # (B, H, N), the weight of one subset in a token's row
        if not once:
            self.share = 1 / self.subset_counts().clamp_min(1)

    def subset_counts(self) -> Tensor:
        """Count the subsets in which each token is a query, (B, H, N)."""
        none = widen(self._anchor().new_zeros(self.shape[:3]))
        return none.scatter_add_(2, self.queries, torch.ones_like(self.queries, dtype=none.dtype))

    @property
    def pairs(self) -> float:
        return self.groups * self.inner.pairs + (0 if self.first is None else self.first.pairs)

    def matvec(self, x: Tensor) -> Tensor:
        y = self.scatter(self.inner.matvec(self.gather(x)))
        return y if self.first is None else self.with_first(self.first.matvec(x), y)

    def matvec_and_keep(self, x: Tensor) -> Tensor:
        y = self.scatter(self.inner.matvec_and_keep(self.gather(x)))
        return y if self.first is None else self.with_first(self.first.matvec_and_keep(x), y)

    def gather(self, x: Tensor) -> Tensor:
        """Return the rows of x (B, H or Hk, N, m) for the keys of each subset, (B, H G, s, m)."""
        return self._by_subset(take_rows(spread_heads(x, self.shape[1]), self.keys))

    def scatter(self, y: Tensor) -> Tensor:
        """Average, for each token, its rows in y (B, H G, w, m) over the subsets; return (B, H, N, m)."""
        batch, heads, tokens, _ = self.shape
        y = y.unflatten(1, (heads, -1)).flatten(2, 3)
        if not on_cpu(y):
            at = self.queries[..., None].expand_as(y)
            out = y.new_zeros(batch, heads, tokens, y.shape[-1]).scatter_add(2, at, y)
            return out if self.share is None else out * self.share[..., None].to(y.dtype)
        first = tokens * torch.arange(batch * heads, device=y.device).view(batch, heads, 1)
        at = (first + self.queries).flatten()[:, None].expand(-1, y.shape[-1])
        none = y.new_zeros(batch * heads * tokens, y.shape[-1])
        out = none.scatter_add(0, at, y.reshape(-1, y.shape[-1])).view(batch, heads, tokens, -1)
        return out if self.share is None else out * self.share[..., None].to(y.dtype)

    def with_first(self, first: Tensor, y: Tensor) -> Tensor:
        return torch.cat([first, y[:, :, first.shape[2] :]], 2)

    def rows(self, index: Tensor) -> Tensor:
        one = torch.arange(self.shape[2], device=index.device) == index[:, None]
        return self.vecmat(one[None].expand(self.shape[0], -1, -1).to(self._anchor().dtype))

    def vecmat(self, r: Tensor, heads: str = "each") -> Tensor:
        r = self._spread(r)
        own = r if self.share is None else r * self.share[:, :, None].to(r.dtype)
        at = self.queries[:, :, None].expand(-1, -1, r.shape[2], -1)
        parts = own.gather(3, at).unflatten(3, (self.groups, -1)).transpose(2, 3)
        inner = self.inner.vecmat(parts.flatten(1, 2))
        inner = inner.unflatten(1, (-1, self.groups)).transpose(2, 3).flatten(3)
        to = self.keys[:, :, None].expand(-1, -1, r.shape[2], -1)
        product = torch.zeros_like(r).scatter_add(3, to, inner.to(r.dtype))
        if self.first is not None:
            product = product + self.first.vecmat(r[..., : self.first.shape[2]]).to(r.dtype)
        return product.mean(1) if check_heads(heads) else product

    def _by_subset(self, x: Tensor) -> Tensor:
        """Reshape (B, H, G s, m) to (B, H G, s, m)."""
        return x.unflatten(2, (self.groups, -1)).flatten(1, 2)

    def _anchor(self) -> Tensor:
        return self.inner._anchor()
