"""The arguments of softmax attention, as one record."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """See :func:`xattn.kernels.softmax.softmax_attention`."""

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, Hk, S, D)"""
    v: Tensor
    """(B, Hk, S, Dv)"""
    bias: Tensor | None
    """(B or 1, H or 1, N or 1, S)"""
    scale: float
    causal: bool
    backend: str
