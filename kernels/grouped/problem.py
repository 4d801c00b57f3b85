"""The arguments of grouped attention over lists of key blocks, as one record."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """See :func:`xattn.kernels.grouped.grouped_attention`."""

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, Hk, S, D)"""
    v: Tensor
    """(B, Hk, S, Dv)"""
    marks: Tensor
    """(B, Hk, key blocks, D)"""
    lists: Tensor
    """(B or 1, 1 or Hk or H, query blocks, entries) int32"""
    bias: Tensor | None
    """(B or 1, 1 or Hk or H, S)"""
    weight: Tensor | None
    """(key blocks,)"""
    q_block: int
    k_block: int
    scale: float
    backend: str

    @property
    def query_blocks(self) -> int:
        return -(-self.q.shape[2] // self.q_block)

    @property
    def key_blocks(self) -> int:
        return -(-self.k.shape[2] // self.k_block)
