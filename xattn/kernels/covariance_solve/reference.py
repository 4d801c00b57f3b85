"""The definition of a solve with each query's covariance, in plain torch; stores N matrices F x F.

    A_i = C_i + ridge_i I,   C_i = sum_j p_ij t_ij t_ij^T,   t_ij = f_j - m_i,   x_i = A_i^-1 b_i

With dx given, u_i = A_i^-1 dx_i is db, and

    dridge_i = -u_i . x_i,   dp_ij = -(u_i . t_ij) (x_i . t_ij),
    dt_ij = -p_ij [(x_i . t_ij) u_i + (u_i . t_ij) x_i],   df_j = sum_i dt_ij,   dm_i = -sum_j dt_ij

and with dS = p o dp, as in softmax attention, dQ = scale dS K, dK = scale dS^T Q, dlse = -rowsum(dS).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from xattn.kernels.backend import readable
from xattn.kernels.softmax.reference import scores, weights, widen


class Problem(NamedTuple):
    """The arguments of a solve with each query's own covariance of keys.

    See :func:`xattn.kernels.covariance_solve.covariance_solve`.
    """

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, H, S, D)"""
    features: Tensor
    """(B, H, S, F), at least float32, as are all that follow"""
    lse: Tensor
    """(B, H, N)"""
    mean: Tensor
    """(B, H, N, F)"""
    right: Tensor
    """(B, H, N, F)"""
    ridge: Tensor
    """(B, H, N)"""
    scale: float
    causal: bool
    iterations: int
    tolerance: float
    backend: str


FAR = 10  # a residual above this many tolerances gives a warning
ROUNDING = 1024  # rounding may leave a residual of this many times the dtype's precision


def forward(p: Problem) -> tuple[Tensor]:
    return (_solve(p, _weights(p), p.right),)


def backward(
    p: Problem, outputs: tuple[Tensor], grads: tuple[Tensor], wanted: Collection[str]
) -> dict[str, Tensor]:
    (x,), (dx,) = outputs, grads
    a = _weights(p)
    u = _solve(p, a, dx)
    by_x, by_u = (_along(p, z) for z in (x, u))
    ds = -a * by_u * by_x
    share_x, share_u = a * by_x, a * by_u
    return {
        "q": (p.scale * ds @ widen(p.k)).to(p.q.dtype),
        "k": (p.scale * ds.transpose(-2, -1) @ widen(p.q)).to(p.k.dtype),
        "features": -(share_x.transpose(-2, -1) @ u + share_u.transpose(-2, -1) @ x),
        "lse": -ds.sum(-1),
        "mean": share_x.sum(-1, keepdim=True) * u + share_u.sum(-1, keepdim=True) * x,
        "right": u,
        "ridge": -(u * x).sum(-1),
    }


def _weights(p: Problem) -> Tensor:
    return weights(scores(p.q, p.k, None, p.scale, p.causal), p.lse)


def _along(p: Problem, z: Tensor) -> Tensor:
    """z_i . (f_j - m_i): (B, H, N, S)."""
    return z @ p.features.transpose(-2, -1) - (z * p.mean).sum(-1, keepdim=True)


def _solve(p: Problem, a: Tensor, right: Tensor) -> Tensor:
    t = p.features[:, :, None] - p.mean[:, :, :, None]
    matrix = torch.einsum("bhns,bhnsd,bhnse->bhnde", a, t, t)
    matrix.diagonal(dim1=-2, dim2=-1).add_(p.ridge[..., None])
    return torch.linalg.solve(matrix, right)


def warn_of_residual(residual: Tensor, tolerance: float) -> None:
    """Warn if some of these relative residuals are far above the tolerance and above rounding errors."""
    line = max(FAR * tolerance, ROUNDING * torch.finfo(residual.dtype).eps)
    if not readable(residual):
        return
    above = residual > line
    count = int(above.sum())
    if count:
        warnings.warn(
            f"conjugate gradients: {count} of {residual.numel()} rows have not converged, with residuals "
            f"of up to {float(residual[above].max()):.2g} (tolerance {tolerance:.2g}); give more "
            f"iterations, a larger ridge, or float64",
            RuntimeWarning,
            stacklevel=2,
        )
