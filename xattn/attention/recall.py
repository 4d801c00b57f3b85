"""Compare a mechanism's choice of key blocks with the exact choice, the blocks to which dense attention
gives the most weight.

    m_ab = sum over the queries i of block a and the keys j of block b of softmax_j(scale q_i . k_j)
    exact choice of a: the blocks b with the largest m_ab, as many as its list can hold

The softmax is over all keys, including prefix tokens, in float32 at least. It is computed in chunks of
rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.inputs import Inputs
from xattn.attention.operators.base import SoftmaxOperator
from xattn.attention.order import Order
from xattn.attention.selection import Blocks
from xattn.kernels.block_sparse.block_lists import listed_blocks
from xattn.kernels.softmax.reference import widen


@dataclass(frozen=True, eq=False)
class Choice:
    """The key blocks that each block of queries reads, out of the M blocks of tokens after the prefix."""

    blocks: Blocks
    """Lists (B, Hk, query blocks, s), including the blocks that are always read."""
    order: Order | None = None
    """An order of these tokens in which the tokens of a block are consecutive; None keeps the given
    order."""
    forced: Tensor | None = None
    """int32 (1, 1, query blocks, f), the blocks that are always read; -1 marks unused entries."""

    def table(self, count: int) -> Tensor:
        """Return which of ``count`` blocks each list contains, bool (B, Hk, query blocks, count)."""
        return listed_blocks(self.blocks.index, count)

    def always(self, count: int) -> Tensor:
        """Return which of ``count`` blocks are always read, bool (1, 1, query blocks, count)."""
        forced = self.forced
        return listed_blocks(self.blocks.index[:1, :1, :, :0] if forced is None else forced, count)

    def tokens(self, inputs: Inputs) -> Tensor:
        """Return the number of the token at each place, LongTensor (M k_block,).

        Tokens are counted from the end of the prefix; -1 marks padding.
        """
        n = inputs.q.shape[2] - inputs.prefix
        every = torch.arange(n, device=inputs.q.device)
        every = every if self.order is None else self.order.index.to(every.device)
        return F.pad(every, (0, -len(every) % self.blocks.k_block), value=-1)


class Recall(NamedTuple):
    """How close a choice comes to the exact one.

    Both fields are (B, H), or (B, Hk) if query heads that share a key head select the same blocks. In that
    case the attention of these heads is summed.
    """

    blocks: Tensor
    """Share of the exact choice that was chosen. Blocks without any attention do not count."""
    mass: Tensor
    """Attention to the chosen blocks, divided by the attention to the blocks of the exact choice."""


@torch.no_grad()
def recall(inputs: Inputs, choice: Choice, *, forced: bool = True) -> Recall:
    """Compare ``choice`` with the exact choice; this costs as much as dense attention.

    Args:
        forced: whether blocks that are always read count as chosen. If True, the exact choice need not
            contain these blocks and may contain others in their place. If False, only the other blocks are
            compared; if there are none, every value is 1.
    """
    lists = choice.blocks.index
    shape = 4, len(inputs.q), lists.shape[1]
    hits, total, mine, best = widen(inputs.q.new_empty(0)).new_zeros(shape)
    for part, mass in _masses(inputs, choice):
        count = mass.shape[3]
        chosen = choice.table(count)[:, :, part]
        room: int | Tensor = lists.shape[3]
        if not forced:
            always = choice.always(count)[:, :, part]
            chosen, mass = chosen & ~always, mass.masked_fill(always, 0.0)
            room = room - always.sum(3, keepdim=True)
        values, order = mass.sort(-1, descending=True)
        exact = (torch.arange(count, device=mass.device) < room) & (values > 0)
        hits += (chosen.expand_as(mass).gather(-1, order) & exact).sum((2, 3))
        total += exact.sum((2, 3))
        mine += (mass * chosen).sum((2, 3))
        best += (values * exact).sum((2, 3))
    return Recall(
        torch.where(total > 0, hits / total, 1.0), torch.where(total > 0, mine / best, 1.0)
    )


def _masses(inputs: Inputs, choice: Choice) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the query blocks with their dense attention to key blocks, (B, Hk, query blocks,
    M)."""
    blocks, prefix, tokens = choice.blocks, inputs.prefix, choice.tokens(inputs)
    groups, rows = blocks.index.shape[1:3]
    q, k = widen(inputs.q), widen(inputs.k)
    dense = SoftmaxOperator(q, k, inputs.scale, causal=inputs.causal)
    count, real = len(tokens) // blocks.k_block, tokens >= 0
    block = torch.empty_like(tokens[real])
    block[tokens[real]] = real.nonzero()[:, 0] // blocks.k_block
    step = max(1, dense.row_chunks()[0].stop // blocks.q_block)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        at = tokens[part.start * blocks.q_block : part.stop * blocks.q_block]
        own = torch.arange(len(at), device=at.device) // blocks.q_block
        a = dense.rows(at[at >= 0] + prefix)[..., prefix:]
        a = a.new_zeros(*a.shape[:3], count).index_add_(3, block, a)
        shape = *a.shape[:2], part.stop - part.start, count
        mass = a.new_zeros(shape).index_add_(2, own[at >= 0], a)
        yield part, mass.unflatten(1, (groups, -1)).sum(2)
