"""The definition of local linear attention with known slopes, in plain torch; stores N x S.

    A = p o e,   e_ij = 1 + x_i . (f_j - m_i),   Y = A V

With dY given and G = dY V^T: dV = A^T dY, and with W = p o G

    dX = W F - rowsum(W) m,   dF = W^T X,   dm = -rowsum(W) x,   dS = A o G

and then, as in softmax attention, dQ = scale dS K, dK = scale dS^T Q, dlse = -rowsum(dS).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from xattn.kernels.softmax.reference import scores, weights, widen


class Problem(NamedTuple):
    """The arguments of local linear attention with known slopes.

    See :func:`xattn.kernels.local_linear.local_linear`.
    """

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, H, S, D)"""
    v: Tensor
    """(B, H, S, Dv)"""
    features: Tensor
    """(B, H, S, F), at least float32, as are all that follow"""
    lse: Tensor
    """(B, H, N)"""
    mean: Tensor
    """(B, H, N, F)"""
    slope: Tensor
    """(B, H, N, F)"""
    scale: float
    causal: bool
    backend: str


def forward(p: Problem) -> tuple[Tensor]:
    return ((_weights(p) * _factor(p) @ widen(p.v)).to(p.v.dtype),)


def backward(
    p: Problem, outputs: tuple[Tensor], grads: tuple[Tensor], wanted: Collection[str]
) -> dict[str, Tensor]:
    dy, v = widen(grads[0]), widen(p.v)
    weighted, e = _weights(p), _factor(p)
    a, g = weighted * e, dy @ v.transpose(-2, -1)
    ds, w = a * g, weighted * g
    total = w.sum(-1, keepdim=True)
    return {
        "q": (p.scale * ds @ widen(p.k)).to(p.q.dtype),
        "k": (p.scale * ds.transpose(-2, -1) @ widen(p.q)).to(p.k.dtype),
        "v": (a.transpose(-2, -1) @ dy).to(p.v.dtype),
        "features": w.transpose(-2, -1) @ p.slope,
        "lse": -ds.sum(-1),
        "mean": -total * p.slope,
        "slope": w @ p.features - total * p.mean,
    }


def _weights(p: Problem) -> Tensor:
    return weights(scores(p.q, p.k, None, p.scale, p.causal), p.lse)


def _factor(p: Problem) -> Tensor:
    along = p.slope @ p.features.transpose(-2, -1)
    return 1 + along - (p.slope * p.mean).sum(-1, keepdim=True)
