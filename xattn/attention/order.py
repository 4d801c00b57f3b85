"""Orders of grid tokens in which neighbours in the sequence are neighbours on the grid.

Block-sparse attention reads runs of consecutive tokens. In an image, each run should be a square.
``tile_order`` visits a grid tile by tile. ``z_order`` interleaves the bits of the coordinates (Morton
1966), so that runs of 4, 16, 64, ... tokens are squares, each made of four squares of the next smaller
size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn.attention.inputs import on_cpu


class Rows(NamedTuple):
    """K rows to take from a tensor; some of them may be zeros instead."""

    at: Tensor
    """LongTensor (K,), row numbers; for rows of zeros, any valid number."""
    none: Tensor | None
    """bool (K,), which rows are zeros; None if there are no such rows."""

    @classmethod
    def of(cls, index: Tensor) -> Rows:
        """Create the record for the rows ``index``, with zeros where it is -1."""
        none = index < 0
        return cls(index.clamp(min=0), none if none.any() else None)


@dataclass(frozen=True, eq=False)
class Order:
    """A new order that puts N tokens on M >= N places. Places without a token are padding.

    Attributes: ``index``, LongTensor (M,), the token of each place, -1 for padding; ``inverse``,
    LongTensor (N,), the place of each token.

    Example:
        >>> import torch
        >>> from xattn.attention import Order
        >>> order = Order(torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0]))
        >>> x = torch.tensor([10.0, 20.0, 30.0])[:, None]
        >>> order.apply(x).flatten(), torch.equal(order.undo(order.apply(x)), x)
        (tensor([30., 10., 20.]), True)
    """

    index: Tensor
    inverse: Tensor
    forth: Rows = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forth", Rows.of(self.index))

    @property
    def back(self) -> Rows:
        return Rows(self.inverse, None)

    @property
    def padding(self) -> Tensor:
        """bool (M,), True for places without a token."""
        return self.index < 0

    @property
    def is_padded(self) -> bool:
        return self.index.shape[0] > self.inverse.shape[0]

    def apply(self, x: Tensor, dim: int = -2) -> Tensor:
        """Return the tokens along ``dim`` in the new order, with zeros in padding places."""
        return _Moved.apply(x, dim, *self.forth, *self.back)  # type: ignore[no-any-return]

    def undo(self, x: Tensor, dim: int = -2) -> Tensor:
        """Return the tokens along ``dim`` in the original order, without the padding."""
        return _Moved.apply(x, dim, *self.back, *self.forth)  # type: ignore[no-any-return]


class _Moved(torch.autograd.Function):
    """Selection of rows along a dimension. A row is selected at most once, so the gradient is also a
    selection of rows and needs no additions."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, dim: int, at: Tensor, none: Tensor | None, back: Tensor, beyond: Tensor | None
    ) -> Tensor:
        return _taken(x, dim, at, none)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.dim = inputs[1]
        ctx.save_for_backward(*inputs[4:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _taken(grad, ctx.dim, *ctx.saved_tensors), None, None, None, None, None


def _taken(x: Tensor, dim: int, at: Tensor, none: Tensor | None) -> Tensor:
    """Return the rows ``at`` of ``x``, with zeros where ``none`` is true."""
    rows = dim in (-2, x.ndim - 2) and x.ndim > 2
    out = take_rows(x, at) if rows else x.index_select(dim, at)
    if none is None:
        return out
    shape = [1] * x.ndim
    shape[dim] = -1
    return out.masked_fill(none.view(shape), 0)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Take rows of ``x`` (..., S, m) by their numbers and return (..., K, m).

    ``index`` is a LongTensor (..., K), or (K,) for the same numbers everywhere. Leading dimensions are
    broadcast.
    """
    if not on_cpu(x):  # on a GPU, more calls cost more than copying numbers one by one
        if index.ndim == 1:
            return x.index_select(-2, index)
        tables = torch.broadcast_shapes(x.shape[:-2], index.shape[:-1])
        index = index.expand(*tables, -1)[..., None].expand(*tables, -1, x.shape[-1])
        return x.expand(*tables, -1, -1).gather(-2, index)
    tables, rows, width = x.shape[:-2], x.shape[-2], x.shape[-1]
    first = rows * torch.arange(tables.numel(), device=x.device).view(*tables, 1)
    at = first + index
    taken = x.reshape(-1, width).index_select(0, at.flatten())
    return taken.view(*at.shape, width)  # twice as fast as gather, which copies single numbers


def blocks_to_tokens(x: Tensor, block: int, order: Order | None, tokens: int) -> Tensor:
    """Return the value of each token's block, (..., tokens), for values (..., M) of blocks of ``block``
    places. If there is an ``order`` of the places, it is undone."""
    x = x.repeat_interleave(block, -1)
    return x[..., :tokens] if order is None else order.undo(x, -1)


def tile_order(grid: Sequence[int], tile: Sequence[int] | int, levels: int = 1) -> Order:
    """Order the tokens tile by tile. Tiles are in raster order, and so are the tokens inside a tile.

    With several ``levels``, tiles are nested: a larger tile consists of ``tile`` smaller tiles along each
    side, and so on. Inside the largest tiles, a ``tile`` of 2 gives Z-order; with any power of two, every
    tile contains the same tokens as a run in Z-order.

    Args:
        grid: side lengths in 1 to 3 dimensions, with tokens in raster order. The sides are padded to
            multiples of the largest tile.
        tile: side lengths of the smallest tile: one for all dimensions, or one for each.

    Raises:
        ValueError: if a length is not positive or ``tile`` has the wrong number of dimensions.

    Example:
        >>> from xattn.attention import tile_order
        >>> tile_order((4, 4), (2, 2)).index[:4]  # the first tile of 2 x 2 tokens
        tensor([0, 1, 4, 5])
    """
    grid = _lengths("grid", grid)
    tile = _lengths("tile", (tile,) * len(grid) if isinstance(tile, int) else tile, len(grid))
    whole = [t**levels for t in tile]
    padded = [-(-g // t) * t for g, t in zip(grid, whole, strict=True)]
    places = _padded(grid, padded)
    sizes = zip(padded, whole, tile, strict=True)
    split = [n for p, w, t in sizes for n in (p // w, *(t,) * levels)]
    axes = [d * (levels + 1) + level for level in range(levels + 1) for d in range(len(grid))]
    return _order(places.view(split).permute(axes).flatten(), grid)


def z_order(grid: Sequence[int]) -> Order:
    """Return the Z-order (Morton order) of a grid, with each side padded to the next power of two.

    If the sides differ, squares with the length of the shortest side are put side by side along the longer
    sides.

    Raises:
        ValueError: if a length is not positive.

    Example:
        >>> from xattn.attention import z_order
        >>> z_order((4, 4)).index[:8]
        tensor([0, 1, 4, 5, 2, 3, 6, 7])
    """
    grid = _lengths("grid", grid)
    bits = [(n - 1).bit_length() for n in grid]
    places = _padded(grid, [2**b for b in bits])
    # (2, ..., 2) for each dimension; then the highest bits of all dimensions, the next bits, ...
    split = places.view([2] * sum(bits))
    first = [sum(bits[:d]) for d in range(len(grid))]
    axes = [
        first[d] + bits[d] - 1 - b
        for b in reversed(range(max(bits)))
        for d in range(len(grid))
        if b < bits[d]
    ]
    return _order(split.permute(axes).flatten() if axes else places.flatten(), grid)


def residue_order(grid: Sequence[int], dilation: Sequence[int], tile: Sequence[int]) -> Order:
    """Order the tokens by their coordinates modulo ``dilation``, because only tokens that agree in these
    see one another. Tokens with the same residues are in tile order."""
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


def _padded(grid: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return the token numbers on a grid of ``shape``, with -1 outside ``grid``."""
    places = torch.full(tuple(shape), -1, device="cpu")
    inside = tuple(slice(0, n) for n in grid)
    places[inside] = torch.arange(places[inside].numel(), device="cpu").view(*grid)
    return places


def _order(index: Tensor, grid: Sequence[int]) -> Order:
    places = (index >= 0).nonzero()[:, 0]
    inverse = torch.empty(len(places), dtype=torch.long, device="cpu")
    inverse[index[places]] = places
    return Order(index, inverse)


def _lengths(name: str, value: Sequence[int], count: int | None = None) -> tuple[int, ...]:
    lengths = tuple(int(n) for n in value)
    if not 1 <= len(lengths) <= 3 or min(lengths) < 1 or count not in (None, len(lengths)):
        raise ValueError(f"{name}: got {value}; give {count or '1 to 3'} positive lengths")
    return lengths
