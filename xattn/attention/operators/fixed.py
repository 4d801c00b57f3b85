"""Operators whose A is the identity, is stored, or has the same row for all queries.

Identity  A = I      Stored  A_ij = M_ij, the same for all images      SharedRow  A_ij = r_j
"""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.attention.inputs import spread_heads
from xattn.attention.operators.base import Operator, check_heads
from xattn.kernels.backend import without_autocast
from xattn.kernels.softmax.reference import widen


class IdentityOperator(Operator):
    """A = I: every token reads only itself.

    Args:
        like: a tensor (B, H, N, ...) that defines sizes, dtype and device.
    """

    stochastic, causal, hides = True, True, True

    def __init__(self, like: Tensor) -> None:
        batch, heads, n = like.shape[:3]
        self.shape = (batch, heads, n, n)
        self._like = like.new_empty(0)

    @property
    def pairs(self) -> float:
        return self.shape[2] / 4  # the cost of a copy

    def matvec(self, x: Tensor) -> Tensor:
        return spread_heads(x, self.shape[1])

    def rows(self, index: Tensor) -> Tensor:
        own = torch.arange(self.shape[3], device=index.device) == index[:, None]
        return own.to(widen(self._like).dtype).expand(*self.shape[:2], -1, -1)

    def vecmat(self, r: Tensor, heads: str = "each") -> Tensor:
        product = self._spread(r)
        return product.mean(1) if check_heads(heads) else product

    def _anchor(self) -> Tensor:
        return self._like


class StoredOperator(Operator):
    """A stored matrix for each head, which is the same for all images.

    The images of a batch are therefore columns of a single matrix product.

    Args:
        matrix: M, (H, N, S), with rows that sum to 1.
        like: a tensor (B, ...) that defines batch size and dtype.
    """

    stochastic = True

    def __init__(self, matrix: Tensor, like: Tensor) -> None:
        self.matrix, self._like = matrix, like.new_empty(0)
        self.shape = (len(like), *matrix.shape)  # type: ignore[assignment]

    @property
    def pairs(self) -> float:
        return self.shape[2] * self.shape[3] / 2

    def matvec(self, x: Tensor) -> Tensor:
        x = spread_heads(x, self.shape[1])
        dtype = torch.promote_types(self.matrix.dtype, x.dtype)
        with without_autocast(x):
            side_by_side = x.to(dtype).permute(1, 2, 0, 3).flatten(2)
            y = self.matrix.to(dtype) @ side_by_side
        return y.unflatten(2, (len(x), -1)).permute(2, 0, 1, 3).to(x.dtype)

    def rows(self, index: Tensor) -> Tensor:
        return widen(self.matrix)[:, index].expand(self.shape[0], -1, -1, -1)

    def vecmat(self, r: Tensor, heads: str = "each") -> Tensor:
        r = self._spread(r)
        product = r @ self.matrix.to(r.dtype)
        return product.mean(1) if check_heads(heads) else product

    def _anchor(self) -> Tensor:
        return self._like


class SharedRowOperator(Operator):
    """A of rank 1: every query reads the same mean of the values.

    Args:
        row: r, (B, H, S), nonnegative, with sum 1.
        queries: N.
        like: a tensor that defines the dtype.
    """

    stochastic = True

    def __init__(self, row: Tensor, queries: int, like: Tensor) -> None:
        self.row, self._like = row, like.new_empty(0)
        self.shape = (*row.shape[:2], queries, row.shape[2])

    @property
    def pairs(self) -> float:
        return self.shape[3] / 2

    def matvec(self, x: Tensor) -> Tensor:
        x = spread_heads(x, self.shape[1])
        dtype = torch.promote_types(self.row.dtype, x.dtype)
        with without_autocast(x):
            y = self.row[:, :, None].to(dtype) @ x.to(dtype)
        return y.to(x.dtype).expand(-1, -1, self.shape[2], -1)

    def rows(self, index: Tensor) -> Tensor:
        return widen(self.row)[:, :, None].expand(-1, -1, len(index), -1)

    def vecmat(self, r: Tensor, heads: str = "each") -> Tensor:
        r = self._spread(r)
        product = r.sum(-1, keepdim=True) * self.row[:, :, None].to(r.dtype)
        return product.mean(1) if check_heads(heads) else product

    def _anchor(self) -> Tensor:
        return self._like
