"""The arguments of causal low-rank products, as one record."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """See :func:`xattn.kernels.causal_product.causal_product`; the leading dimensions as one, H."""

    left: Tensor
    """(H, N, f)"""
    right: Tensor
    """(H, N, f)"""
    x: Tensor
    """(H, N, m)"""
    reverse: bool
    backend: str
