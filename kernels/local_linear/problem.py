"""The arguments of local linear attention with known slopes, as one record."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """See :func:`xattn.kernels.local_linear.local_linear`."""

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
