"""Softmax attention with a linear factor for each query: a signed operator whose rows sum to 1."""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.attention.operators.base import Operator, SoftmaxOperator, products
from xattn.kernels.backend import without_autocast
from xattn.kernels.local_linear import local_linear
from xattn.kernels.softmax import softmax_attention
from xattn.kernels.softmax.reference import widen


class LocalLinearOperator(Operator):
    """A_ij = p_ij [1 + x_i . (f_j - m_i)] with p = softmax(scale q k^T), recomputed on demand.

    Args:
        q: (B, H, N, D); ``k``: (B, H, S, D); all tensors in float32 at least.
        features: f, (B, H, S, F); ``slope``: x, (B, H, N, F).
        lse: (B, H, N), the log-sum-exp of the scores; ``mean``: m = p f, (B, H, N, F).
        causal: whether query i sees only keys 0 to i; this requires N = S.

    Products with values in half precision are summed in float32.

    Example:
        >>> import torch
        >>> from xattn.attention import Inputs, create_mechanism
        >>> mechanism = create_mechanism("lla", 16, 2)
        >>> q, k, v = torch.rand(3, 1, 2, 6, 8)
        >>> A = mechanism.operator(Inputs(q, k, v))
        >>> type(A).__name__, A.row_sums().allclose(torch.ones(1, 2, 6), atol=1e-4)
        ('LocalLinearOperator', True)
    """

    stochastic = signed = True

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        features: Tensor,
        lse: Tensor,
        mean: Tensor,
        slope: Tensor,
        scale: float,
        *,
        causal: bool = False,
        backend: str = "auto",
    ) -> None:
        self.q, self.k, self.features = q, k, features
        self.lse, self.mean, self.slope = lse, mean, slope
        self.scale, self.causal, self.backend = scale, causal, backend
        self.shape = (*q.shape[:3], k.shape[2])

    @property
    def pairs(self) -> float:
        return 1.5 * self.shape[2] * self.shape[3]  # scores, factors, values

    @property
    def softmax(self) -> SoftmaxOperator:
        """The operator p, without the linear factors."""
        return SoftmaxOperator(
            self.q, self.k, self.scale, None, self.lse, self.backend, causal=self.causal
        )

    def matvec(self, x: Tensor) -> Tensor:
        y = local_linear(
            self.q, self.k, x.to(self.q.dtype), self.features, self.lse, self.mean, self.slope,
            scale=self.scale, causal=self.causal, backend=self.backend,
        )  # fmt: skip
        return y.to(x.dtype)

    def with_constant_factors(self, q: Tensor, k: Tensor) -> LocalLinearOperator:
        """Return the same operator with gradients only through p, which is computed from ``q`` and
        ``k``."""
        lse = softmax_attention(q, k, k, scale=self.scale, causal=self.causal)[1]
        features, mean, slope = (x.detach() for x in (self.features, self.mean, self.slope))
        return LocalLinearOperator(
            q, k, features, lse, mean, slope, self.scale,
            causal=self.causal, backend=self.backend,
        )  # fmt: skip

    def rows(self, index: Tensor) -> Tensor:
        s = products(self.q[:, :, index], self.k, self.scale)
        if self.causal:
            later = torch.arange(self.shape[3], device=index.device) > index[:, None]
            s = s.masked_fill(later, -torch.inf)
        slope, mean = self.slope[:, :, index], self.mean[:, :, index]
        with without_autocast(slope):
            along = slope @ self.features.transpose(-2, -1)
        factor = 1 + along - (slope * mean).sum(-1, keepdim=True)
        return (s - self.lse[:, :, index, None]).exp() * factor

    def _anchor(self) -> Tensor:
        return widen(self.q)
