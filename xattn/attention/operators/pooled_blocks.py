"""Blocks of tokens with one pooled key each: queries read the pooled keys, and choose among the blocks.

On a grid, a block is a tile, and all queries of a tile choose the same blocks. In a sequence of tokens,
pooled blocks may overlap and differ from the blocks that are chosen (Native Sparse Attention, arXiv
2502.11089). In a causal call, each query chooses for itself and reads only pooled blocks that have ended.
Prefix tokens belong to no block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.inputs import Inputs
from xattn.attention.operators.algebra import PoolOperator
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.operators.patterns import Pattern
from xattn.attention.operators.segments import Piece, SegmentsOperator
from xattn.attention.order import Order, blocks_to_tokens, take_rows, tile_order
from xattn.attention.plans import cache_plan
from xattn.attention.selection import Blocks, Rule, Segment, select, visible_blocks
from xattn.kernels.block_sparse.box import causal as causal_rule
from xattn.kernels.softmax.reference import widen


@dataclass(frozen=True, eq=False)
class PooledBlocks:
    """C pooled blocks of the N tokens after the prefix, and the M blocks that can be chosen."""

    tile: tuple[int, ...]
    """Side lengths of a pooled block."""
    stride: int
    """Distance between the first tokens of pooled blocks, in the order of ``pooling``."""
    pooling: Order
    """An order in which the tokens of a pooled block are consecutive; the last blocks may end in
    padding."""
    order: Order | None
    """An order in which the tokens of a block that can be chosen are consecutive; None keeps the given
    order."""
    q_block: int
    """Number of queries that make a joint choice; 1 in a causal call."""
    k_block: int
    """Number of tokens in a block that can be chosen."""
    forced: Tensor
    """int32 (1, 1, query blocks, 1 or 3): the block that contains the queries; in a causal call, also the
    previous block and the first block."""
    overlap: Tensor | None = None
    """(C, M), the share of each pooled block that lies in each block that can be chosen; None if the two
    kinds of block are the same."""
    cells: Tensor | None = None
    """int32 (M, o), the pooled blocks that overlap each block that can be chosen; -1 marks unused entries.
    ``parts`` are the shares of these pooled blocks that lie in the block."""
    parts: Tensor | None = None
    visible: Tensor | None = None
    """For causal calls: int32 (N,), the number of pooled blocks that have ended."""
    rule: Rule | None = None
    """For causal calls: which tokens a query sees."""
    ended: Segment | None = None
    """For causal calls: which prefix tokens and pooled blocks a query sees. The keys are filled in
    later."""

    @property
    def count(self) -> int:
        """M, the number of blocks that can be chosen."""
        places = len(self.pooling.inverse) if self.order is None else len(self.order.index)
        return -(-places // self.k_block)

    def pool(self, like: Tensor, prefix: int, weight: Tensor | None = None) -> PoolOperator:
        """Return the operator from all tokens to the prefix tokens and the C pooled blocks.

        For the arguments, see :class:`~xattn.attention.operators.algebra.PoolOperator`.
        """
        length = math.prod(self.tile)
        return PoolOperator(
            like, length, self.stride, weight=weight, order=self.pooling, prefix=prefix,
            keep_prefix=True,
        )  # fmt: skip

    def runs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens of each pooled block, (B, Hk, N, D) -> (B, Hk, C, l, D), with zeros in padding,
        and which places hold a token, bool (C, l)."""
        length = math.prod(self.tile)
        real = (~self.pooling.padding).unfold(0, length, self.stride)
        return self.pooling.apply(x).unfold(2, length, self.stride).transpose(-2, -1), real

    def read(self, inputs: Inputs, keys: Tensor, *, backend: str = "auto") -> Operator:
        """Return the softmax over the R prefix tokens and C pooled blocks as an operator.

        Their ``keys`` are (B, H or Hk, R + C, D). In a causal call, the softmax is only over blocks that
        have ended, and a row that sees nothing is 0.
        """
        if self.ended is None:
            return SoftmaxOperator(inputs.q, keys, inputs.scale, backend=backend)
        count = keys.shape[2]
        piece = Piece(inputs.q, (replace(self.ended, k=keys),), (range(count),))
        return SegmentsOperator([piece], None, count, inputs.scale, backend)

    def choose(
        self,
        inputs: Inputs,
        keys: Tensor,
        s: int,
        *,
        forced: bool = True,
        lse: Tensor | None = None,
        backend: str = "auto",
    ) -> Blocks:
        """Choose the ``s`` blocks whose pooled ``keys`` (B, Hk, C, D) get the most weight from the queries.

        The weights of a query are its softmax over the C blocks only. They are summed over the queries of a
        block and over the heads that share a key head. If ``forced``, the block that contains the queries
        is always chosen and, in a causal call, so are the previous block and the first block. ``lse`` (B,
        H, N) is the log-sum-exp of the softmax, if it is known.
        """
        q = inputs.q[:, :, inputs.prefix :]
        s = min(s, self.count)
        return select(
            q if self.order is None else self.order.apply(q),
            keys,
            s,
            q_block=self.q_block,
            k_block=self.k_block,
            softmax=True,
            spread=None if self.cells is None else (self.cells, self.parts, "sum"),
            forced=self.forced[..., :s].contiguous() if forced else None,
            visible=self.visible,
            lse=None if lse is None else lse.detach(),
            scale=inputs.scale,
            backend=backend,
        )[0]

    def importance(self, inputs: Inputs, keys: Tensor, lse: Tensor, blocks: Blocks) -> Tensor:
        """Compute the weight that queries give to each of the ``blocks`` that they chose, with gradients.

        The result is (B, Hk, query blocks, s), averaged over the queries of a block and over the heads that
        share a key head.

        Args:
            keys: the pooled keys, (B, Hk, C, D).
            lse: (B, H, N), the log-sum-exp of the patches' scores over the pooled keys.
        """
        index = blocks.index.long()
        q, groups = inputs.q[:, :, inputs.prefix :], keys.shape[1]
        one = torch.ones_like(lse[:1, :1])
        lse, q, one = (
            self._by_query_block(x, groups, index.shape[2])
            for x in (lse.masked_fill(lse.isneginf(), 0.0)[..., None], q, one[..., None])
        )
        cells, part = self._cells(keys)
        cell = cells[index.clamp(min=0)]  # (B, Hk, query blocks, s, o)
        near = take_rows(keys, cell.flatten(2)).unflatten(2, (index.shape[2], -1))
        scores = widen(q) @ (inputs.scale * widen(near)).transpose(-2, -1)[:, :, None]
        seen = (index >= 0)[..., None].expand_as(cell).flatten(3)[:, :, None, :, None]
        if self.visible is not None:
            seen = seen & (cell.flatten(3)[:, :, None, :, None] < self.visible[:, None, None])
        p = torch.where(seen, (scores - lse).masked_fill(~seen, 0.0).exp(), 0.0) * one
        weight = part[index.clamp(min=0)].flatten(3).to(p.dtype)[:, :, None, :, None]
        total = (p * weight).sum((2, 4)).unflatten(-1, cell.shape[3:]).sum(-1)
        return total / (one.sum((2, 4)) * q.shape[2]).clamp_min(1)

    def _by_query_block(self, x: Tensor, groups: int, count: int) -> Tensor:
        """Reshape (B, H, N, m) to (B, Hk, G, query blocks, queries, m), with zeros in padding."""
        x = x if self.order is None else self.order.apply(x)
        x = F.pad(x, (0, 0, 0, count * self.q_block - x.shape[2]))
        heads = groups if x.shape[1] % groups == 0 else 1
        return x.unflatten(2, (count, self.q_block)).unflatten(1, (heads, -1))

    def _cells(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled blocks that overlap each block that can be chosen, (M, o), and their shares
        that lie in it."""
        if self.cells is None or self.parts is None:
            every = torch.arange(self.count, device=keys.device)[:, None]
            return every, torch.ones_like(every)
        return self.cells.clamp_min(0), self.parts

    def pattern(self, blocks: Blocks, share: Tensor | None = None) -> Pattern:
        """Return the pattern in which queries see the tokens of the ``blocks`` that they chose."""
        return Pattern(blocks, self.order, self.rule, share=share)

    def frequency(self, blocks: Blocks) -> Tensor:
        """Return the share of the lists that contain each block, (B, Hk, M) in [0, 1]."""
        return blocks.shares(self.count)

    def on_tokens(self, x: Tensor) -> Tensor:
        """Return the values of blocks, (..., M), as values of the tokens after the prefix, (..., N)."""
        return blocks_to_tokens(x, self.k_block, self.order, len(self.pooling.inverse))


@cache_plan
def pooled_blocks(
    grid: tuple[int, ...],
    block: int,
    stride: int,
    k_block: int,
    prefix: int = 0,
    causal: bool = False,
) -> PooledBlocks:
    """Return the blocks of a grid or of a sequence of tokens. The result is cached.

    Args:
        grid: side lengths of the grid; a single length for a sequence.
        block: side length of a pooled block. If the grid is shorter along a side, the block covers all of
            it.
        stride: distance between the starts of pooled blocks, at most ``block``.
        k_block: on a grid ``block``; in a sequence, the number of tokens in a block that can be chosen.
        causal: whether calls are causal; only for a sequence.

    Raises:
        ValueError: if ``stride`` or ``k_block`` differs from ``block`` on a grid.
    """
    if len(grid) == 1:
        return _row(grid[0], block, stride, k_block, prefix, causal)
    if (stride, k_block) != (block, block):
        raise ValueError(
            f"stride, select_block: got {stride}, {k_block} on a grid, whose tiles neither overlap nor "
            f"differ in size; leave them out"
        )
    tile = tuple(min(block, length) for length in grid)
    order, size = tile_order(grid, tile), math.prod(tile)
    own = torch.arange(len(order.index) // size, dtype=torch.int32)
    return PooledBlocks(tile, size, order, order, size, size, own[None, None, :, None])


def _row(n: int, block: int, stride: int, k_block: int, prefix: int, causal: bool) -> PooledBlocks:
    """Compute the result of :func:`pooled_blocks` for a sequence of ``n`` tokens."""
    line = torch.arange(n, dtype=torch.int32)
    start = torch.arange(0, max(n - block, 0) + stride, stride)
    pooling = tile_order((n,), int(start[-1]) + block)
    first = torch.arange(0, n, k_block)
    start, end = start[:, None], start[:, None] + block
    overlap = torch.minimum(end, first + k_block) - torch.maximum(start, first)
    own = (line if causal else line[::k_block]) // k_block
    forced = torch.stack([own, own - 1, 0 * own] if causal else [own], -1)
    made = PooledBlocks(
        (block,), stride, pooling, None, 1 if causal else k_block, k_block, forced[None, None]
    )
    if not stride == block == k_block:
        overlap = overlap.clamp(min=0) / block
        parts, cells = overlap.T.topk(int((overlap > 0).sum(0).max()), -1)
        cells = cells.int().masked_fill(parts == 0, -1)
        made = replace(made, overlap=overlap, cells=cells, parts=parts)
    if not causal:
        return made
    # The position of a pooled block is just after its last token, that of the prefix before all tokens.
    position = F.pad(end[:, 0].int(), (prefix, 0))[:, None]
    high = F.pad(line + 1, (prefix, 0))[:, None]
    seen = Rule(torch.zeros_like(high), high, position, (1,))
    nothing = position.new_empty(1, 1, len(position), 0)
    return replace(
        made,
        visible=((line + 1 - block) // stride + 1).clamp(min=0),
        rule=causal_rule(n),
        ended=Segment(nothing, blocks=visible_blocks(seen, 64, 64), rule=seen),
    )
