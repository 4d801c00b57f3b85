"""Softplus attention with l1 norms, as an operator whose rows are recomputed from queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.attention.operators.base import Operator
from xattn.kernels import softplus as kernel
from xattn.kernels.backend import without_autocast
from xattn.kernels.softmax.reference import widen
from xattn.kernels.softplus.reference import weights


class SoftplusOperator(Operator):
    """W_ij proportional to max(softplus(scale ln(N_i) q_i . k_j) - o m_i, 0)^p, see
    :mod:`xattn.kernels.softplus.reference`.

    Args:
        q: (B, H, N, D); ``k``: (B, H, S, D), both float32 or float64.
        scale: a factor of the products q_i . k_j, in addition to ln(N_i).
        power, offset, eps, causal, backend: see :func:`xattn.kernels.softplus.softplus_attention`.

    Example:
        >>> import torch
        >>> from xattn.attention import SoftplusOperator
        >>> A = SoftplusOperator(torch.rand(1, 2, 5, 8), torch.rand(1, 2, 5, 8), scale=0.35)
        >>> A.matvec(torch.rand(1, 2, 5, 8)).shape
        torch.Size([1, 2, 5, 8])
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        *,
        power: int = 1,
        offset: float = 0.0,
        eps: float = 0.0,
        causal: bool = False,
        backend: str = "auto",
    ) -> None:
        self.q, self.k, self.scale, self.causal, self.backend = q, k, scale, causal, backend
        self.power, self.offset, self.eps = power, offset, eps
        self.shape = (*q.shape[:3], k.shape[2])
        self.stochastic, self.hides = eps == 0, offset > 0

    @property
    def pairs(self) -> float:
        visible = 0.5 if self.causal else 1.0
        sweeps = 1.0 if self.power == 1 and self.offset == 0 else 1.5  # scores are computed twice
        return visible * sweeps * self.shape[2] * self.shape[3]

    def matvec(self, x: Tensor) -> Tensor:
        values = x if widen(x).dtype == self.q.dtype else x.to(self.q.dtype)
        y: Tensor = kernel.softplus_attention(
            self.q,
            self.k,
            values,
            scale=self.scale,
            power=self.power,
            offset=self.offset,
            eps=self.eps,
            causal=self.causal,
            backend=self.backend,
        )
        return y.to(x.dtype)

    def rows(self, index: Tensor) -> Tensor:
        asked = kernel.softplus_attention.problem(
            self.q,
            self.k,
            self.k,
            scale=self.scale,
            power=self.power,
            offset=self.offset,
            eps=self.eps,
            causal=self.causal,
            backend="cpu",
        )
        with without_autocast(self.q):
            return weights(asked, index)

    def tile(self, rows: slice | Tensor, columns: slice) -> Tensor:
        if isinstance(rows, slice):
            rows = torch.arange(self.shape[2], device=self.device)[rows]
        return self.rows(rows)[..., columns]  # a row's weights depend on all of its keys

    def _anchor(self) -> Tensor:
        return self.q
