"""The arguments of row vectors times attention, as one record."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """See :func:`xattn.kernels.vecmat.gradient_vecmat`; ``v`` and ``grad`` are None for plain attention."""

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, Hk, S, D)"""
    lse: Tensor
    """(B, H, N), at least float32"""
    r: Tensor
    """(B, H, R, N), in the dtype of ``lse``"""
    v: Tensor | None
    """(B, Hk, S, Dv)"""
    grad: Tensor | None
    """(B, H, N, Dv)"""
    bias: Tensor | None
    """(B or 1, H or 1, N or 1, S)"""
    scale: float
    causal: bool
    backend: str
