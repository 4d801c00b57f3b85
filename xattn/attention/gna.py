"""Generalized neighborhood attention: every token sees a window of its grid neighbours.

In each dimension a query sees ``kernel`` keys around the leader of its stride group; with ``dilation``
only keys of its own residue. Stride 1 is neighborhood attention (arXiv 2204.07143), stride = kernel is
blocked (window) attention, kernel = length is dense. Prefix tokens see all and are seen by all.
Hassani et al., arXiv 2504.16922.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.base import Mechanism, register, whole
from xattn.attention.operator import Operator, SoftmaxOperator
from xattn.attention.order import Order, tile_order
from xattn.attention.segments import (
    Blocks,
    Rule,
    Segment,
    SegmentsOperator,
    dense_is_faster,
    grid_operator,
    visible,
    visible_blocks,
)
from xattn.kernels.block_sparse.box import neighbourhood, permuted
from xattn.kernels.softmax import softmax_attention

Lengths = int | tuple[int, ...]
TILES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}


@register(
    "gna",
    paper="arXiv 2504.16922",
    complexity="N k^n D",
    grid=(1, 2, 3),
    causal=True,
    training_free=True,
)
class GNA(Mechanism):
    """Generalized neighborhood attention on grids of 1 to 3 dimensions.

    ``kernel``, ``stride``, ``dilation`` and ``causal`` take one value or one for each dimension.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        kernel: keys seen in each dimension; at most the grid's length.
        stride: queries that share a window, 1 to ``kernel``.
        dilation: distance of the keys seen.
        causal: whether later keys are hidden.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel: Lengths = 7,
        stride: Lengths = 1,
        dilation: Lengths = 1,
        causal: bool | tuple[bool, ...] = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        for name, value in (("kernel", kernel), ("stride", stride), ("dilation", dilation)):
            for length in value if isinstance(value, tuple | list) else (value,):
                whole(name, length)
        self.window = (_hashable(kernel), _hashable(stride), _hashable(dilation), _hashable(causal))
        # The caches below share them with equal layers; kept here as well so that torch.compile sees them.
        self._plans: dict[Any, tuple[Order, Blocks, Rule]] = {}
        self._masks: dict[Any, Tensor] = {}

    def operator(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...] | None, prefix: int
    ) -> SoftmaxOperator | SegmentsOperator:
        assert grid is not None
        key = grid, q.device
        if key not in self._plans:
            self._plans[key] = plan(grid, *self.window, q.device.type == "cpu", q.device)
        order, blocks, rule = self._plans[key]
        if self.backend == "auto" and dense_is_faster(q, k, blocks):
            place = grid, prefix, q.dtype, q.device
            if place not in self._masks:
                self._masks[place] = mask(grid, *self.window, prefix, q.dtype, q.device)
            return SoftmaxOperator(q, k, bias=self._masks[place], every_row=True)
        return grid_operator(q, k, prefix, order, blocks, rule, backend=self.backend)

    def maps(
        self, operator: Operator, grid: tuple[int, ...] | None, prefix: int
    ) -> dict[str, Tensor]:
        """``received``: the attention that each patch gets from all tokens, mean over heads."""
        if grid is None or len(grid) != 2:
            return {}
        ones = operator.row_sums().new_ones(operator.shape[0], 1, operator.shape[2])
        return {"received": operator.vecmat(ones, "mean")[..., prefix:].unflatten(-1, grid)}

    def locality(self, q: Tensor, k: Tensor, grid: Sequence[int], prefix: int = 0) -> Tensor:
        """Share of dense attention that falls into the window (and the prefix), (B, H, N) in [0, 1].

        exp(lse of the window - lse of all keys) shows where a trained softmax layer is already local.
        """
        inside = self.operator(q, k, k, tuple(grid), prefix).attend(k)[1]
        return (inside - softmax_attention(q, k, k, backend=self.backend)[1]).exp()


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # cached tensors may serve training later
def plan(
    grid: tuple[int, ...],
    kernel: Lengths,
    stride: Lengths = 1,
    dilation: Lengths = 1,
    causal: bool | tuple[bool, ...] = False,
    single_keys: bool = True,
    device: torch.device | str = "cpu",
) -> tuple[Order, Blocks, Rule]:
    """Order of the tokens, lists and element rule of one neighbourhood; cached.

    Args:
        single_keys: lists of keys (less work, for gathers) instead of key tiles (for kernels).

    Raises:
        ValueError: a window larger than the grid, a stride above the kernel, ...
    """
    rule = neighbourhood(grid, kernel, stride, dilation, causal)
    tile = tuple(min(t, g) for t, g in zip(TILES[len(grid)], grid, strict=True))
    order = residue_order(grid, rule.dilation, tile)
    rule = permuted(rule, order.index)
    size = math.prod(tile)
    blocks = visible_blocks(rule, size, 1 if single_keys else size)
    return order.to(device), blocks.to(device), rule.to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def mask(
    grid: tuple[int, ...],
    kernel: Lengths,
    stride: Lengths,
    dilation: Lengths,
    causal: bool | tuple[bool, ...],
    prefix: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The neighbourhood as a bias (1, 1, N, N) of 0 and -inf; prefix tokens see and are seen."""
    rule = neighbourhood(grid, kernel, stride, dilation, causal)
    n = len(rule.position)
    seen = visible(
        Segment(torch.empty(1, 1, n, 0, device="cpu"), rule=rule), torch.arange(n, device="cpu")
    )
    hidden = torch.zeros(1, 1, n, n, dtype=dtype, device="cpu").masked_fill_(~seen, -torch.inf)
    return F.pad(hidden, (prefix, 0, prefix, 0)).to(device)


def residue_order(grid: Sequence[int], dilation: Sequence[int], tile: Sequence[int]) -> Order:
    """Tile order within each class of coordinates that see one another under the dilation."""
    tokens = torch.arange(math.prod(grid), device="cpu").view(*grid)
    parts = []
    for start in product(*(range(d) for d in dilation)):
        group = tokens[tuple(slice(s, None, d) for s, d in zip(start, dilation, strict=True))]
        index = tile_order(group.shape, tile).index
        parts.append(torch.where(index < 0, -1, group.flatten()[index.clamp(min=0)]))
    index = torch.cat(parts)
    inverse = torch.empty(tokens.numel(), dtype=torch.long, device="cpu")
    real = (index >= 0).nonzero()[:, 0]
    inverse[index[real]] = real
    return Order(index, inverse)


class Bound(NamedTuple):
    """How much of a neighbourhood's saving is left with tiles."""

    operations: float
    """Dense operations over the window's: N / k^n."""
    tiles: float
    """Dense tiles over visited tiles: the largest speed-up of a kernel with these tiles."""
    efficiency: float
    """tiles / operations; 1 is perfectly block-sparse."""


def speedup_bound(
    grid: Sequence[int],
    kernel: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    q_tile: int | Sequence[int] = 8,
    k_tile: int | Sequence[int] = 8,
    dynamic: bool = False,
) -> Bound:
    """The tile simulator: count the key tiles that query tiles have to visit.

    A tile visits the union of its queries' windows; key tiles lie on a fixed grid, or with
    ``dynamic`` begin where the union does. Our own definition: the paper's simulator is not public.

    Raises:
        ValueError: as for :class:`GNA`.
    """
    n = len(grid)
    rule = neighbourhood(grid, kernel, stride, dilation, causal)
    sides = [(t,) * n if isinstance(t, int) else tuple(t) for t in (q_tile, k_tile)]
    shape = (*grid, n)
    low, high = rule.low.view(shape), rule.high.view(shape)
    seen = visited = dense = 1
    for t, (length, d) in enumerate(zip(grid, rule.dilation, strict=True)):
        # Windows of one dimension do not depend on the others.
        line = tuple(slice(None) if i == t else 0 for i in range(n))
        first, last = low[line][:, t] // d, high[line][:, t] // d
        q_side, k_side = sides[0][t], sides[1][t]
        count = 0
        for residue in range(d):
            starts = first[residue::d].split(q_side)
            ends = last[residue::d].split(q_side)
            for start, end in zip(starts, ends, strict=True):
                lo, hi = int(start.min()), int(end.max())
                count += -(-(hi - lo + 1) // k_side) if dynamic else hi // k_side - lo // k_side + 1
        seen *= int((last - first + 1).sum())
        visited *= count
        dense *= -(-length // q_side) * -(-length // k_side)
    operations = math.prod(grid) ** 2 / seen
    return Bound(operations, dense / visited, dense / visited / operations)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
