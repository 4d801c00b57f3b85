"""Causal attention of low rank, A = tril(L R): linear attention in which token i reads tokens 0 to i."""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.attention.operators.base import Operator, check_heads
from xattn.kernels.backend import without_autocast
from xattn.kernels.causal_product import causal_product
from xattn.kernels.causal_product.cpu import CHUNK
from xattn.kernels.softmax.reference import widen


class CausalLowRankOperator(Operator):
    """A = tril(L R) with L (B, H, N, f) and R (B, H, f, N), f much smaller than N.

    A product with A is a forward scan over the tokens, and a product with its transpose is a backward scan.
    Each takes O(N f m) time and O(N (f + m)) memory, with sums in float32 at least. ``stochastic`` and
    ``signed`` state known properties of A.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> import torch
        >>> from xattn.attention import CausalLowRankOperator
        >>> left, right = torch.rand(1, 1, 5, 2), torch.rand(1, 1, 2, 5)
        >>> A = CausalLowRankOperator(left, right)
        >>> torch.allclose(A.rows(torch.arange(5)), (left @ right).tril())
        True
    """

    causal = True

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        *,
        stochastic: bool = False,
        signed: bool = True,
        backend: str = "auto",
    ) -> None:
        if left.ndim != 4 or right.transpose(-2, -1).shape != left.shape:
            raise ValueError(
                f"left, right: got shapes {tuple(left.shape)}, {tuple(right.shape)}; give "
                f"(B, H, N, f) and (B, H, f, N)"
            )
        self.left, self.right = left, right
        self.stochastic, self.signed, self.backend = stochastic, signed, backend
        self.shape = (left.shape[0], left.shape[1], left.shape[2], left.shape[2])

    @property
    def pairs(self) -> float:
        return self.shape[2] * (self.left.shape[3] + CHUNK)

    def matvec(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.left.dtype, x.dtype)
        left, right = self.left.to(dtype), self.right.to(dtype)
        product = causal_product(left, right.transpose(-2, -1), x.to(dtype), backend=self.backend)
        return product.to(x.dtype)

    def rows(self, index: Tensor) -> Tensor:
        return self.tile(index, slice(None))

    def tile(self, rows: slice | Tensor, columns: slice) -> Tensor:
        every = torch.arange(self.shape[2], device=self.device)
        with without_autocast(self.left):
            a = widen(self.left[:, :, rows]) @ widen(self.right[..., columns])
        return a.masked_fill(every[columns] > every[rows][:, None], 0.0)

    def vecmat(self, r: Tensor, heads: str = "each") -> Tensor:
        right, r = widen(self.right).transpose(-2, -1), self._spread(r).transpose(-2, -1)
        left, backend = widen(self.left), self.backend
        product = causal_product(right, left, r, reverse=True, backend=backend).transpose(-2, -1)
        return product.mean(1) if check_heads(heads) else product

    def _anchor(self) -> Tensor:
        return self.left
