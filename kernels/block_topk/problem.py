"""The arguments of the choice of blocks, as one record."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """See :func:`xattn.kernels.block_topk.block_topk`."""

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, Hk, C, D)"""
    forced: Tensor | None
    """(B or 1, 1 or Hk, query blocks, f) int32"""
    within: Tensor | None
    """(B or 1, 1 or Hk, parents, sp) int32"""
    visible: Tensor | None
    """(query blocks,) int32"""
    table: Tensor | None
    """(M, f) int32, the candidates that each of M blocks pools; in place of ``spread``"""
    lse: Tensor | None
    """(B, H, N)"""
    s: int
    q_block: int
    reduce: str
    softmax: bool
    spread: list[int]
    """Kernel, stride and padding; 1, 1, 0 for none."""
    pooling: str
    children: int
    """Candidates of a parent; 1 without ``within``."""
    scale: float
    backend: str

    @property
    def query_blocks(self) -> int:
        return -(-self.q.shape[2] // self.q_block)

    @property
    def candidates(self) -> int:
        """Their number after pooling."""
        if self.table is not None:
            return self.table.shape[0]
        kernel, stride, padding = self.spread
        return (self.k.shape[2] + 2 * padding - kernel) // stride + 1

    @property
    def pools(self) -> bool:
        return self.table is not None or self.spread != [1, 1, 0]

    @property
    def linear(self) -> bool:
        """Whether the score of a query block is the score of the sum of its queries."""
        return self.reduce != "max" and not self.softmax

    def part(self, blocks: slice) -> Problem:
        """The same problem for some of the query blocks, without a choice of parents."""
        tokens = slice(blocks.start * self.q_block, blocks.stop * self.q_block)
        return self._replace(
            q=self.q[:, :, tokens],
            forced=None if self.forced is None else self.forced[:, :, blocks],
            within=None,
            visible=None if self.visible is None else self.visible[blocks],
            lse=None if self.lse is None else self.lse[:, :, tokens],
        )
