"""Operators that consist of other operators or of small factors: products, sums, gates, pooling, low rank.

Product  A_1 A_2 ...      Sum  A_1 + A_2 + ...      Gated  diag(g) A      Columns  A diag(c)
LowRank  L R              Pool  means or weighted sums over runs of keys
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from xattn.attention.inputs import spread_heads
from xattn.attention.operators.base import Operator, check_heads
from xattn.attention.order import Order
from xattn.kernels.backend import without_autocast
from xattn.kernels.softmax.reference import widen


class LowRankOperator(Operator):
    """A = L R with L (B, H, N, f) and R (B, H, f, S), f much smaller than N and S.

    ``stochastic`` and ``signed`` state known properties of A. Products with values are computed in the
    wider of the two dtypes, that of A and that of the values.

    Example:
        >>> import torch
        >>> from xattn.attention import LowRankOperator
        >>> left, right = torch.rand(1, 1, 5, 2), torch.rand(1, 1, 2, 5)
        >>> A = LowRankOperator(left, right)
        >>> torch.allclose(A.rows(torch.arange(5)), left @ right)
        True
    """

    def __init__(
        self, left: Tensor, right: Tensor, *, stochastic: bool = False, signed: bool = True
    ) -> None:
        self.left, self.right = left, right
        self.stochastic, self.signed = stochastic, signed
        self.shape = (left.shape[0], left.shape[1], left.shape[2], right.shape[3])

    @property
    def pairs(self) -> float:
        return self.left.shape[3] * (self.shape[2] + self.shape[3]) / 2

    def matvec(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.left.dtype, x.dtype)
        with without_autocast(x):
            return (self.left.to(dtype) @ (self.right.to(dtype) @ x.to(dtype))).to(x.dtype)

    def rows(self, index: Tensor) -> Tensor:
        with without_autocast(self.left):
            return widen(self.left[:, :, index]) @ widen(self.right)

    def vecmat(self, r: Tensor, heads: str = "each") -> Tensor:
        product = (self._spread(r) @ widen(self.left)) @ widen(self.right)
        return product.mean(1) if check_heads(heads) else product

    def _anchor(self) -> Tensor:
        return self.left


class ProductOperator(Operator):
    """A = A_1 A_2 ...: attention in stages, as with agents, landmarks or pooled keys.

    ``causal`` states whether A is known to be causal.

    Example:
        >>> import torch
        >>> from xattn.attention import ProductOperator, SoftmaxOperator
        >>> A, B = (SoftmaxOperator(*torch.rand(2, 1, 1, 3, 8)) for _ in range(2))
        >>> AB = ProductOperator([A, B])
        >>> every = torch.arange(3)
        >>> torch.allclose(AB.rows(every), A.rows(every) @ B.rows(every))
        True
    """

    def __init__(self, factors: Sequence[Operator], *, causal: bool = False) -> None:
        self.factors, self.causal = tuple(factors), causal
        first, last = self.factors[0], self.factors[-1]
        self.shape = (*first.shape[:3], last.shape[3])
        self.stochastic = all(f.stochastic for f in self.factors)
        self.signed = any(f.signed for f in self.factors)

    @property
    def pairs(self) -> float:
        return sum(factor.pairs for factor in self.factors)

    def matvec(self, x: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            x = factor.matvec(x)
        return x

    def matvec_and_keep(self, x: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            x = factor.matvec_and_keep(x)
        return x

    def rows(self, index: Tensor) -> Tensor:
        r = self.factors[0].rows(index)
        for factor in self.factors[1:]:
            r = factor.vecmat(r)
        return r

    def vecmat(self, r: Tensor, heads: str = "each") -> Tensor:
        r = self._spread(r)
        for factor in self.factors:
            r = factor.vecmat(r)
        return r.mean(1) if check_heads(heads) else r

    def _anchor(self) -> Tensor:
        return self.factors[0]._anchor()


class SumOperator(Operator):
    """A = A_1 + A_2 + ..., where all terms have the same shape: attention in branches.

    ``stochastic``, ``signed`` and ``hides`` state properties of A that its terms alone do not imply.

    Example:
        >>> import torch
        >>> from xattn.attention import SoftmaxOperator, SumOperator
        >>> A, B = (SoftmaxOperator(*torch.rand(2, 1, 1, 3, 8)) for _ in range(2))
        >>> SumOperator([A, B]).row_sums()
        tensor([[[2., 2., 2.]]])
    """

    def __init__(
        self,
        terms: Sequence[Operator],
        *,
        stochastic: bool = False,
        signed: bool | None = None,
        hides: bool | None = None,
    ) -> None:
        self.terms = tuple(terms)
        if not self.terms:
            raise ValueError("terms: got none; give at least one operator")
        self.shape = self.terms[0].shape
        wrong = [term.shape for term in self.terms if term.shape != self.shape]
        if wrong:
            raise ValueError(
                f"terms: got shapes {self.shape} and {wrong[0]}; give terms of one shape"
            )
        self.stochastic = stochastic
        self.signed = any(term.signed for term in self.terms) if signed is None else signed
        self.causal = all(term.causal for term in self.terms)
        self.hides = all(term.hides for term in self.terms) if hides is None else hides

    @property
    def pairs(self) -> float:
        return sum(term.pairs for term in self.terms)

    def matvec(self, x: Tensor) -> Tensor:
        return sum_terms(term.matvec(x) for term in self.terms)

    def matvec_and_keep(self, x: Tensor) -> Tensor:
        return sum_terms(term.matvec_and_keep(x) for term in self.terms)

    def rows(self, index: Tensor) -> Tensor:
        rows = sum_terms(term.rows(index) for term in self.terms)
        rounded = not self.signed and any(term.signed for term in self.terms)
        return rows.clamp_min(0) if rounded else rows

    def vecmat(self, r: Tensor, heads: str = "each") -> Tensor:
        return sum_terms(term.vecmat(r, heads) for term in self.terms)

    def row_sums(self) -> Tensor:
        return sum_terms(term.row_sums() for term in self.terms)

    def _anchor(self) -> Tensor:
        return self.terms[0]._anchor()


def sum_terms(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of ``terms``, starting from the first term instead of from zero."""
    first, *rest = terms
    return sum(rest, first)


class GatedOperator(Operator):
    """diag(g) A, in which every row is multiplied by a factor for its token and head.

    Args:
        operator: A.
        factor: g, (B, H, N).
        signed: whether g may be negative. Set it to False for gates that cannot be negative.
        sparse: whether many entries of g are 0, so that it is worth skipping these rows.

    Example:
        >>> import torch
        >>> from xattn.attention import GatedOperator, SoftmaxOperator
        >>> A = SoftmaxOperator(*torch.rand(2, 1, 1, 3, 8))
        >>> GatedOperator(A, torch.tensor([1.0, 0.5, 0.0]).view(1, 1, 3)).row_sums()
        tensor([[[1.0000, 0.5000, 0.0000]]])
    """

    def __init__(
        self, operator: Operator, factor: Tensor, *, signed: bool = True, sparse: bool = False
    ) -> None:
        if factor.shape != operator.shape[:3]:
            raise ValueError(
                f"factor: got shape {tuple(factor.shape)}; give {operator.shape[:3]}, one for each "
                f"token and head"
            )
        self.operator, self.factor, self.sparse = operator, factor, sparse
        self.shape, self.causal = operator.shape, operator.causal
        self.signed, self.hides = signed or operator.signed, operator.hides

    @property
    def pairs(self) -> float:
        kept = float((self.factor != 0).float().mean()) if self.sparse else 1.0
        return kept * self.operator.pairs

    def matvec(self, x: Tensor) -> Tensor:
        if self.sparse:
            y = self.operator.matvec_where(x, self.factor.detach() != 0)
        else:
            y = self.operator.matvec(x)
        return self.factor[..., None].to(y.dtype) * y

    def matvec_and_keep(self, x: Tensor) -> Tensor:
        if self.sparse:  # rows that are not computed have nothing to keep
            return self.matvec(x)
        y = self.operator.matvec_and_keep(x)
        return self.factor[..., None].to(y.dtype) * y

    def rows(self, index: Tensor) -> Tensor:
        rows = self.operator.rows(index)
        return self.factor[:, :, index, None].to(rows.dtype) * rows

    def vecmat(self, r: Tensor, heads: str = "each") -> Tensor:
        r = self._spread(r)
        return self.operator.vecmat(r * self.factor[:, :, None].to(r.dtype), heads)

    def gradient_vecmat(self, v: Tensor, grad: Tensor, r: Tensor) -> Tensor:
        # A' dA' = g A (grad . v) = A ((g grad) . v); this also holds for negative g
        return self.operator.gradient_vecmat(v, grad * self.factor[..., None].to(grad.dtype), r)

    def row_sums(self) -> Tensor:
        sums = self.operator.row_sums()
        return self.factor.to(sums.dtype) * sums

    def _anchor(self) -> Tensor:
        return self.operator._anchor()


class ColumnsOperator(Operator):
    """A diag(c), in which every column is multiplied by a factor for its token and head.

    Args:
        operator: A. It must accept values in the wider of its own dtype and the dtype of c.
        factor: c, (B, H, S), nonnegative.

    Example:
        >>> import torch
        >>> from xattn.attention import ColumnsOperator, SoftmaxOperator
        >>> A = SoftmaxOperator(*torch.rand(2, 1, 1, 3, 8))
        >>> factor = torch.tensor([1.0, 1.0, 0.0]).view(1, 1, 3)  # ignores the last key
        >>> half = ColumnsOperator(A, factor)
        >>> half.rows(torch.arange(3))[..., 2].abs().max()
        tensor(0.)
    """

    def __init__(self, operator: Operator, factor: Tensor) -> None:
        self.operator, self.factor = operator, factor
        self.shape, self.causal, self.signed = operator.shape, operator.causal, operator.signed
        self.hides = operator.hides

    @property
    def pairs(self) -> float:
        return self.operator.pairs

    def matvec(self, x: Tensor) -> Tensor:
        return self.operator.matvec(self.scaled(x)).to(x.dtype)

    def matvec_and_keep(self, x: Tensor) -> Tensor:
        return self.operator.matvec_and_keep(self.scaled(x)).to(x.dtype)

    def scaled(self, x: Tensor) -> Tensor:
        """Compute diag(c) X, (B, H, S, m), for X of H or Hk heads, in the wider of the dtypes of c and
        X."""
        return spread_heads(x, self.shape[1]) * self.factor[..., None]

    def rows(self, index: Tensor) -> Tensor:
        rows = self.operator.rows(index)
        return rows * self.factor[:, :, None].to(rows.dtype)

    def vecmat(self, r: Tensor, heads: str = "each") -> Tensor:
        product = self.operator.vecmat(r)
        product = product * self.factor[:, :, None].to(product.dtype)
        return product.mean(1) if check_heads(heads) else product

    def _anchor(self) -> Tensor:
        return self.operator._anchor()


class PoolOperator(Operator):
    """Pooling of S tokens: each of C pooled tokens is the mean or a weighted sum of a run of tokens.

    Args:
        like: a tensor (B, H, S, ...) that defines sizes, dtype and device.
        block: the number of tokens in a run; ``stride``: the distance between the starts of runs, by
            default ``block``.
        weight: the weights of the sums, either (H or Hk, block), a convolution kernel for each head, or
            (B, H or Hk, C, block), weights for each pooled token after the prefix. With None, runs are
            averaged.
        order: an order of the tokens after the prefix, in which the tokens of a run are consecutive.
            Padding is ignored.
        prefix: the number of tokens at the start that belong to no run.
        keep_prefix: whether the pooled tokens are preceded by the unchanged prefix tokens.

    Raises:
        ValueError: if a block is longer than the sequence, or a length is not positive.

    Example:
        >>> import torch
        >>> from xattn.attention import PoolOperator
        >>> A = PoolOperator(torch.rand(1, 1, 6, 8), block=2)
        >>> A.rows(torch.arange(3))[0, 0]
        tensor([[0.5000, 0.5000, 0.0000, 0.0000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.5000, 0.5000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.0000, 0.0000, 0.5000, 0.5000]])
    """

    def __init__(
        self,
        like: Tensor,
        block: int,
        stride: int | None = None,
        *,
        weight: Tensor | None = None,
        order: Order | None = None,
        prefix: int = 0,
        keep_prefix: bool = False,
    ) -> None:
        batch, heads, tokens = like.shape[:3]
        places = tokens - prefix if order is None else len(order.index)
        stride = block if stride is None else stride
        if not 1 <= block <= places or stride < 1:
            raise ValueError(
                f"block, stride: got {block}, {stride} for {places} tokens; give a block of 1 to "
                f"{places} and a stride of at least 1"
            )
        self.block, self.stride, self.order, self.prefix = block, stride, order, prefix
        self.weight, self._like = weight, like.new_empty(0)
        self.kept = prefix if keep_prefix else 0
        self.stochastic, self.signed = weight is None, weight is not None
        self.shape = (batch, heads, self.kept + (places - block) // stride + 1, tokens)
        self._share: Tensor | None = None
        if weight is None and order is not None and order.is_padded:
            real = (~order.padding).to(like.dtype).unfold(0, block, stride)
            self._share = 1 / real.sum(-1).clamp_min(1)

    @property
    def pairs(self) -> float:
        return self.shape[2] * self.block / 4  # one addition per token and channel

    def matvec(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            x = spread_heads(
                x, max(x.shape[1], self.weight.shape[1 if self.weight.ndim == 4 else 0])
            )
        pooled = self._pool(x[:, :, self.prefix :])
        return torch.cat([x[:, :, : self.kept], pooled], 2) if self.kept else pooled

    def _pool(self, x: Tensor) -> Tensor:
        """Pool ``x``, the tokens after the prefix."""
        x = x if self.order is None else self.order.apply(x)
        runs = x.unfold(2, self.block, self.stride)  # (B, H, C, m, block)
        if self.weight is not None:
            weight = spread_heads(self._weights(), x.shape[1]).to(x.dtype)
            return (runs @ weight[..., None])[..., 0]
        if self._share is None:
            return runs.mean(-1)
        return runs.sum(-1) * self._share.to(x.dtype)[:, None]

    def _weights(self) -> Tensor:
        """Return the weights as (1 or B, H or Hk, 1 or C, block)."""
        assert self.weight is not None
        return self.weight if self.weight.ndim == 4 else self.weight[None, :, None]

    def rows(self, index: Tensor) -> Tensor:
        kept, tokens = index < self.kept, self.shape[3]
        pooled = self._pooled_rows((index - self.kept).clamp(min=0))
        alone = torch.arange(tokens, device=index.device) == index[:, None]
        return torch.where(kept[:, None], alone.to(pooled.dtype), pooled)

    def _pooled_rows(self, index: Tensor) -> Tensor:
        batch, heads, _, tokens = self.shape
        at = index[:, None] * self.stride + torch.arange(self.block, device=index.device)
        token = at if self.order is None else self.order.index[at]  # (R, block)
        share = torch.ones_like(at, dtype=widen(self._like).dtype).expand(batch, heads, -1, -1)
        if self.weight is not None:
            weight = spread_heads(widen(self._weights()), heads)
            share = (weight if weight.shape[2] == 1 else weight[:, :, index]).expand_as(share)
        elif self._share is not None:
            share = share * widen(self._share)[index][:, None]
        else:
            share = share / self.block
        share = share.masked_fill(token < 0, 0.0)
        out = share.new_zeros(batch, heads, len(index), tokens)
        where = (token.clamp(min=0) + self.prefix).expand(batch, heads, -1, -1)
        return out.scatter_add(-1, where, share)

    def _anchor(self) -> Tensor:
        return self._like


def pool(x: Tensor, block: int, stride: int | None = None) -> Tensor:
    """Average runs of ``block`` tokens. A new run starts every ``stride`` tokens, by default ``block``.

    (B, H, N, D) -> (B, H, C, D), C = (N - block) // stride + 1. Remaining tokens at the end are
    ignored. For a grid, put the tokens in a tile order first, or use :class:`PoolOperator`.

    Raises:
        ValueError: if ``block`` is larger than N, or a length is not positive.

    Example:
        >>> import torch
        >>> from xattn.attention import pool
        >>> pool(torch.arange(6.0).view(1, 1, 6, 1), block=2).flatten()
        tensor([0.5000, 2.5000, 4.5000])
    """
    return PoolOperator(x, block, stride).matvec(x)
