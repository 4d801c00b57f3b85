"""Local linear attention: each query fits a linear function to the values near it, and evaluates it there.

    minimise  sum_j p_ij |v_j - b - W (k_j - q_i)|^2 + ridge_i |W|^2,   y_i = b
    A_ij = p_ij [1 + x_i . (k_j - m_i)],   (C_i + ridge_i I) x_i = q_i - m_i

p is softmax attention; m_i and C_i are the mean and the covariance of the keys under p_i. Softmax attention
fits a constant instead, which is the limit of an infinite ridge. Rows sum to 1, but entries may be
negative: keys on the far side of the mean are subtracted. The matrix C_i is never formed. The linear
systems are solved by conjugate gradients, with at most 16 steps by default. The method is from Zuo et al.,
arXiv 2510.01450 (ICLR 2026).
"""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from xattn.attention.base import Mechanism, check_whole, register_attention
from xattn.attention.inputs import Inputs
from xattn.attention.operators.base import Operator
from xattn.attention.operators.local_linear import LocalLinearOperator
from xattn.kernels.covariance_solve import covariance_solve
from xattn.kernels.softmax import softmax_attention
from xattn.kernels.softmax.reference import widen

RIDGES = ("key_variance", "relative", "absolute")
LEAST, MOST = 1e-6, 1e6  # limits of an absolute ridge


@register_attention(
    "lla",
    paper="arXiv 2510.01450",
    complexity="T N^2 D",
    causal=True,
    cross=True,
    cases=(
        {"iterations": 20, "tolerance": 1e-9},
        {"ridge": "absolute", "ridge_lambda": 10.0, "iterations": 20, "tolerance": 1e-9},
    ),
    studies={
        "attention-maps": {
            "legends": dict.fromkeys(
                ("row", "correction", "received"),
                ("subtracted", "added", "row, correction, received", "diverging"),
            )
        }
    },
)
class LLA(Mechanism):
    """Softmax attention with a local linear fit.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        ridge: the unit of ``ridge_lambda``. "key_variance": the variance of the head's keys (if causal, of
            the keys that a query sees), averaged over their dimensions, so that the scale of the keys does
            not matter. "relative": the number 1, for a fit whose weights sum to 1. "absolute", as
            published: the number 1, for a fit whose weights are exp(scale q k^T) without a normaliser. In
            terms of p, this ridge_i is lambda exp(-lse_i); it is limited to the range from 1e-6 to 1e6.
        ridge_lambda: lambda, the positive factor of this unit.
        iterations: the largest number of conjugate gradient steps.
        tolerance: a row stops when its residual, relative to q_i - m_i, is below this. A warning reports
            rows whose residual stays above ten times the tolerance.

    Raises:
        ValueError: if ``ridge`` is unknown, or a number is out of range.

    Everything is computed in float32 or wider. Float32 is precise enough if the condition number of C_i +
    ridge_i I is at most 300. Far above that, the steps do not converge in float32, which the warning
    reports.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ridge: str = "key_variance",
        ridge_lambda: float = 1.0,
        iterations: int = 16,
        tolerance: float = 1e-4,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        if ridge not in RIDGES:
            raise ValueError(f"ridge: got {ridge!r}; choose one of {', '.join(RIDGES)}")
        if not 0 < ridge_lambda < math.inf:
            raise ValueError(f"ridge_lambda: got {ridge_lambda}; give a positive number, such as 1")
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance: got {tolerance}; give a share between 0 and 1")
        self.ridge, self.ridge_lambda = ridge, ridge_lambda
        self.iterations, self.tolerance = check_whole("iterations", iterations), tolerance

    def operator(self, inputs: Inputs) -> Operator:
        assert inputs.scale is not None
        if inputs.q.dtype in (torch.float16, torch.bfloat16):
            _say_promoted(inputs.q.dtype)
        q, k = widen(inputs.q), widen(inputs.k)
        # The fit does not change if the same constant is subtracted from its queries and keys, and the
        # mean key improves precision. In causal attention, the mean key would leak later keys.
        centre = (
            torch.zeros_like(k[:, :, :1]) if inputs.causal else k.detach().mean(2, keepdim=True)
        )
        features, at = k - centre, q - centre
        given: dict[str, Any] = {
            "scale": inputs.scale,
            "causal": inputs.causal,
            "backend": self.backend,
        }
        mean, lse = softmax_attention(q, k, features, **given)
        slope = covariance_solve(
            q, k, features, lse, mean, at - mean, self._ridge(k, lse, inputs.causal),
            iterations=self.iterations, tolerance=self.tolerance, **given,
        )  # fmt: skip
        operator = LocalLinearOperator(q, k, features, lse, mean, slope, **given)
        operator.selection = (1 + 1.5 * self.iterations) * q.shape[2] * k.shape[2]
        return operator

    def _ridge(self, k: Tensor, lse: Tensor, causal: bool) -> Tensor:
        """Return the ridge of each query, (B, H, N) or a shape that expands to it."""
        if self.ridge == "relative":
            return torch.full_like(lse, self.ridge_lambda)
        if self.ridge == "absolute":
            return (math.log(self.ridge_lambda) - lse).exp().clamp(LEAST, MOST)
        return (self.ridge_lambda * key_variance(k, causal)).expand_as(lse)

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``row``, the row of A for the class token (without one, the mean over all tokens), with
        its sign; and ``correction``, its difference from softmax attention, both per head. Also return
        ``received``, the sum of A over all queries, averaged over heads."""
        assert isinstance(operator, LocalLinearOperator)
        batch, _, n, s = operator.shape
        if inputs.grid is None or len(inputs.grid) != 2 or n != s:
            return {}
        r = operator.q.new_full((batch, 1, n), 1 / n)
        if inputs.prefix:
            r = torch.zeros_like(r).index_fill(2, r.new_zeros(1, dtype=torch.int64), 1.0)
        row = operator.vecmat(r)[:, :, 0]
        found = {
            "row": row,
            "correction": row - operator.softmax.vecmat(r)[:, :, 0],
            "received": operator.vecmat(torch.ones_like(r), "mean"),
        }
        return {
            name: x[..., inputs.prefix :].unflatten(-1, inputs.grid) for name, x in found.items()
        }


def key_variance(k: Tensor, causal: bool = False) -> Tensor:
    """Compute the variance of keys (B, H, S, D), averaged over D: (B, H, 1), or if causal (B, H, S), where
    entry i covers keys 0 to i.

    The result is never smaller than the share of the keys' mean square that rounding may hide, so that even
    equal keys have a ridge. A single key has no variance; its mean square is used instead.
    """
    count = torch.arange(1, k.shape[2] + 1, device=k.device, dtype=k.dtype)
    least = torch.where(count == 1, 1.0, torch.finfo(k.dtype).eps ** 0.5)
    if not causal:
        variance, square = k.var(2, unbiased=False).mean(-1), k.square().mean((2, 3))
        return torch.maximum(variance, least[-1] * square)[..., None]

    def running(x: Tensor) -> Tensor:
        return x.cumsum(2) / count[:, None]

    away = k - k[:, :, :1]  # avoids subtracting the square of a large mean
    variance = (running(away.square()) - running(away).square()).mean(-1)
    return torch.maximum(variance, least * running(k.square()).mean(-1))


@cache
def _say_promoted(dtype: torch.dtype) -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"lla: got {dtype}; its linear systems are solved in float32",
            RuntimeWarning,
            stacklevel=3,
        )
