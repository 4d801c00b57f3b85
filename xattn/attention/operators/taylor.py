"""Attention with a Taylor series of the exponential, as an operator whose rows are recomputed on demand."""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.attention.operators.base import Operator, products
from xattn.kernels.backend import without_autocast


class TaylorOperator(Operator):
    """A_ij proportional to 1 + z + z^2 / 2, z = q_i . k_j / sqrt(f), with rows that sum to 1.

    The cost is O(N S f), which is less than the O((N + S) f^2 D) of Taylor features if there are fewer keys
    than features.

    Args:
        q: (B, H, N, f); ``k``: (B, H, S, f), both float32 or float64.
        causal: whether query i reads only keys 0 to i; this requires N = S.

    Example:
        >>> import torch
        >>> from xattn.attention import TaylorOperator
        >>> A = TaylorOperator(torch.rand(1, 2, 5, 4), torch.rand(1, 2, 5, 4))
        >>> A.row_sums().allclose(torch.ones(1, 2, 5))
        True
    """

    stochastic = True

    def __init__(self, q: Tensor, k: Tensor, *, causal: bool = False) -> None:
        self.q, self.k, self.causal = q, k, causal
        self.shape = (*q.shape[:3], k.shape[2])

    def matvec(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.q.dtype, x.dtype)
        with without_autocast(x):
            return (self.tile(slice(None), slice(None)).to(dtype) @ x.to(dtype)).to(x.dtype)

    def rows(self, index: Tensor) -> Tensor:
        with without_autocast(self.q):
            z = products(self.q[:, :, index], self.k, self.q.shape[3] ** -0.5)
            weights = 1 + z + z.square() / 2
        if self.causal:
            later = torch.arange(self.shape[3], device=index.device) > index[:, None]
            weights = weights.masked_fill(later, 0.0)
        return weights / weights.sum(-1, keepdim=True)

    def _anchor(self) -> Tensor:
        return self.q
