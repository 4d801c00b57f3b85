"""The arguments of a solve with every query's own covariance of keys, as one record."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """See :func:`xattn.kernels.covariance_solve.covariance_solve`."""

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
