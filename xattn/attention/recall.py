"""How close a choice of key blocks comes to the exact choice: the blocks that get most of dense attention.

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
    """Which of the M blocks of tokens after the prefix each block of queries reads."""

    blocks: Blocks
    """Lists (B, Hk, query blocks, s), including the blocks that are always read."""
    order: Order | None = None
    """Order of these tokens, in which blocks are consecutive; None keeps the given order."""
    forced: Tensor | None = None
    """int32 (1, 1, query blocks, f), blocks that are always read; -1 = none."""

    def table(self, count: int) -> Tensor:
        """Whether each of ``count`` blocks is in each list, bool (B, Hk, query blocks, count)."""
        return listed_blocks(self.blocks.index, count)

    def always(self, count: int) -> Tensor:
        """The same for the blocks that are always read, (1, 1, query blocks, count)."""
        forced = self.forced
        return listed_blocks(self.blocks.index[:1, :1, :, :0] if forced is None else forced, count)

    def tokens(self, inputs: Inputs) -> Tensor:
        """LongTensor (M k_block,): the token after the prefix at each place, -1 for padding."""
        n = inputs.q.shape[2] - inputs.prefix
        every = torch.arange(n, device=inputs.q.device)
        every = every if self.order is None else self.order.index.to(every.device)
        return F.pad(every, (0, -len(every) % self.blocks.k_block), value=-1)


class Recall(NamedTuple):
    """How close a choice comes to the exact one, (B, H) each; (B, Hk) if the heads that share a key head
    choose together, in which case their attention is summed."""

    blocks: Tensor
    """Share of the exact choice that was chosen. Blocks without any attention do not count."""
    mass: Tensor
    """Attention to the chosen blocks, as a share of that to the exact choice."""


@torch.no_grad()
def recall(inputs: Inputs, choice: Choice, *, forced: bool = True) -> Recall:
    """Compare ``choice`` with the exact choice; this costs as much as dense attention.

    Args:
        forced: whether blocks that are always read count as chosen, so that the exact choice may have
            others in their place. If False, only the other blocks are compared; if there are none, every
            value is 1.
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
    """Dense attention of query blocks to key blocks: some query blocks, and (B, Hk, query blocks, M)."""
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
