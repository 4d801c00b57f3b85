"""The arguments of flows, as one record."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

EPS = 1e-6
"""e, which is added to both factors of every flow."""


class Problem(NamedTuple):
    """See :func:`xattn.kernels.flows.flows`."""

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, H, S, D)"""
    added: float
    backend: str
