"""The arguments of softplus attention, as one record."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """See :func:`xattn.kernels.softplus.softplus_attention`."""

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, H, S, D)"""
    v: Tensor
    """(B, H, S, Dv)"""
    scale: float
    power: int
    offset: float
    eps: float
    causal: bool
    backend: str
