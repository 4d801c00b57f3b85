"""Pyramids of means: the tokens, the mean of every tile of tokens, the mean of every tile of tiles, and so
on.

Level l has one place for each run of B^l tokens. The mean is over the tokens of the run, without padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.attention.operators.algebra import ProductOperator
from xattn.attention.operators.base import Operator
from xattn.attention.operators.segments import SegmentsOperator
from xattn.attention.order import Order, tile_order
from xattn.attention.plans import cache_plan
from xattn.attention.selection import Blocks, Rule, visible_blocks
from xattn.kernels.block_sparse.box import causal as causal_rule
from xattn.kernels.softmax.reference import widen


@dataclass(frozen=True, eq=False)
class Pyramid:
    """A pyramid of the tokens after the prefix, which are arranged on M places. M is a multiple of B^L."""

    order: Order
    block: int
    """B"""
    levels: int
    """L"""
    counts: tuple[Tensor, ...]
    """For each level from 0, the number of tokens that each of its places represents: (M / B^l,)."""
    rules: tuple[Rule, ...] = ()
    """For causal calls, one rule for each level from 0: a query sees tokens up to itself, and the means of
    blocks before its own."""
    top: Blocks | None = None
    """For causal calls: the blocks of level-L means in which a block of queries sees at least one mean."""
    is_token: tuple[Tensor, ...] = ()
    """For each level from 0, a LongTensor of the places that represent at least one token."""

    @property
    def padded(self) -> bool:
        return self.order.is_padded

    def means(self, x: Tensor, prefix: int = 0) -> list[Tensor]:
        """Return the tokens of x (B, H, prefix + N, m) on their places, (B, H, M, m), followed by the means
        of each level. Prefix tokens are left out."""
        found = [self.order.apply(x[:, :, prefix:])]
        total = found[0]
        for level in range(1, self.levels + 1):
            total = total.unflatten(2, (-1, self.block)).sum(3)
            if self.padded:
                found.append(total * (1 / self.counts[level].clamp_min(1).to(x.dtype))[:, None])
            else:
                found.append(total * self.block**-level)
        return found

    def bias(self, level: int, like: Tensor) -> Tensor | None:
        """Return the log of the counts, (1, 1, M / B^l), with -inf for empty places; None without
        padding."""
        return self.counts[level].to(like.dtype).log()[None, None] if self.padded else None

    def shift(self, level: int) -> float:
        """Return the log of the number of tokens in a place, which is the same for all places if there is
        no padding; with padding, return 0."""
        return 0.0 if self.padded else level * math.log(self.block)

    def on_tokens(self, x: Tensor, level: int) -> Tensor:
        """Return the values of the places of a level, (..., M / B^l), as values of tokens, (..., N)."""
        return self.order.undo(x.repeat_interleave(self.block**level, -1), -1)


@cache_plan
def pyramid(grid: tuple[int, ...], block: int, levels: int, causal: bool = False) -> Pyramid:
    """Return the pyramid of a grid or of a sequence of tokens. The result is cached.

    Tiles have ``block`` tokens along each side. Along a side shorter than ``block``, they are as long as
    the side. There is no level above the first one with a single place.
    """
    tile = tuple(min(block, length) for length in grid)
    sides, useful = list(grid), 0
    while max(sides) > 1:
        sides = [-(-n // t) for n, t in zip(sides, tile, strict=True)]
        useful += 1
    levels = max(1, min(levels, useful))
    order, size = tile_order(grid, tile, levels), math.prod(tile)
    counts = [(~order.padding).float()]
    for _ in range(levels):
        counts.append(counts[-1].unflatten(0, (-1, size)).sum(1))
    real = tuple((count > 0).nonzero()[:, 0] for count in counts)
    if not causal:
        return Pyramid(order, size, levels, tuple(counts), is_token=real)
    places = torch.arange(len(order.index), dtype=torch.int32)[:, None]
    rules = [causal_rule(len(places))]
    for level in range(1, levels + 1):
        before = places.div(size**level, rounding_mode="floor") - 1
        rules.append(Rule(torch.zeros_like(places), before, places[: len(counts[level])], (1,)))
    top = visible_blocks(rules[-1], 64, 64)
    return Pyramid(order, size, levels, tuple(counts), tuple(rules), top, real)


class PyramidOperator(Operator):
    """Operator from all tokens to the prefix tokens, the tokens on their places, and the means of levels 1
    to L.

    Args:
        like: a tensor (B, H, prefix + N, ...) that defines sizes, dtype and device.
    """

    def __init__(self, like: Tensor, made: Pyramid, prefix: int) -> None:
        self.made, self.prefix, self._like = made, prefix, like.new_empty(0)
        self.starts = [prefix]
        for count in made.counts:
            self.starts.append(self.starts[-1] + len(count))
        self.shape = (like.shape[0], like.shape[1], self.starts[-1], like.shape[2])
        self.stochastic = not made.padded

    @property
    def pairs(self) -> float:
        return len(self.made.order.index) / 4  # one addition per token and channel

    def columns(self, level: int) -> range:
        """Return the range of rows that hold the places of a level; level -1 is the prefix tokens."""
        return range(self.starts[level] if level >= 0 else 0, self.starts[level + 1])

    def parts(self, x: Tensor) -> dict[range, Tensor]:
        """Compute the rows of A X, keyed by the ranges that :meth:`columns` returns."""
        levels = [x[:, :, : self.prefix], *self.made.means(x, self.prefix)]
        return {self.columns(i): part for i, part in enumerate(levels, -1)}

    def matvec(self, x: Tensor) -> Tensor:
        return torch.cat(list(self.parts(x).values()), 2)

    def rows(self, index: Tensor) -> Tensor:
        order, out = self.made.order, []
        places = torch.arange(len(order.index), device=index.device)
        token = torch.where(order.padding, -1, order.index + self.prefix)
        every = torch.arange(self.shape[3], device=index.device)
        kind = widen(self._like)
        for i in index.tolist():
            if i < self.prefix:
                out.append((every == i).to(kind.dtype))
                continue
            level = max(n for n, start in enumerate(self.starts[:-1]) if i >= start)
            size = self.made.block**level
            own = token[(places // size) == i - self.starts[level]]
            own = own[own >= 0]
            row = torch.zeros(len(every), dtype=kind.dtype, device=index.device)
            out.append(row.index_fill(0, own, 1 / max(1, len(own))))
        return torch.stack(out).expand(*self.shape[:2], -1, -1)

    def _anchor(self) -> Tensor:
        return self._like


class PyramidAttention(ProductOperator):
    """Attention to the rows of a :class:`PyramidOperator`, without joining these rows in a single
    tensor."""

    def __init__(self, read: SegmentsOperator, pyramid: PyramidOperator, *, causal: bool) -> None:
        super().__init__([read, pyramid], causal=causal)
        self.stochastic = True  # padding, which has no mean, is not read

    def matvec(self, x: Tensor) -> Tensor:
        read, pyramid = self.factors
        return read.matvec_of(pyramid.parts(x))  # type: ignore[attr-defined, no-any-return]

    def matvec_and_keep(self, x: Tensor) -> Tensor:
        return self.matvec(x)
