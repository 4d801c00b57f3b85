"""Visibility of keys, given by one box of grid positions for each query.

    key j is visible to query i  <=>  for every dimension t:
        low[i, t] <= position[j, t] <= high[i, t]  and  (position[j, t] - low[i, t]) mod dilation[t] = 0

Causal attention, windows and n-dimensional neighbourhoods are such boxes. An empty box (low > high)
marks a padding query, and a position outside every box marks a padding key. The neighbourhood follows
Generalized Neighborhood Attention (arXiv 2504.16922) and, at stride 1, Neighborhood Attention (arXiv
2204.07143).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BEYOND = 2**30  # the position of a padding key


class Box(NamedTuple):
    """One box per query, as described in the module; all tensors are int32, for N queries and S keys on a
    grid of n = 1 to 3 dimensions."""

    low: Tensor
    """(N, n)"""
    high: Tensor
    """(N, n)"""
    position: Tensor
    """(S, n)"""
    dilation: tuple[int, ...]
    """n numbers of at least 1."""
    rank: Tensor | None = None
    """(B, H, S), ranks of the keys. With them, a query sees only keys in its box whose rank is at most the
    query's limit, and the key with its own index."""
    limit: Tensor | None = None
    """(B, H, N)"""

    def to(self, device: torch.device | str) -> Box:
        tensors: dict[str, Any] = {
            k: x.to(device) for k, x in self._asdict().items() if isinstance(x, Tensor)
        }
        return self._replace(**tensors)


def causal(n: int) -> Box:
    """Return a box in which token i of ``n`` sees tokens 0 to i."""
    i = _line(n)
    return Box(torch.zeros_like(i), i, i, (1,))


def window(n: int, left: int, right: int) -> Box:
    """Return a box in which token i of ``n`` sees tokens i - left to i + right, or fewer at the ends."""
    i = _line(n)
    if left < 0 or right < 0:
        raise ValueError(f"left, right: got {left}, {right}; give numbers of tokens, 0 or more")
    return Box((i - left).clamp(min=0), (i + right).clamp(max=n - 1), i, (1,))


def neighbourhood(
    shape: Sequence[int],
    kernel: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> Box:
    """Generalized neighbourhood attention on a grid with tokens in raster order.

    A query sees ``kernel`` keys in each dimension, shifted inwards at the border. The queries of a
    stride group share the keys of the group's leader. With a dilation d, queries see only coordinates with
    their own residue modulo d. A causal dimension hides later keys, so fewer keys may remain.

    Args:
        shape: the lengths of the grid in 1 to 3 dimensions; N = S is their product.
        kernel, stride, dilation, causal: one value for all dimensions, or one for each.

    Raises:
        ValueError: unless 1 <= stride <= kernel and kernel * dilation <= length in each dimension.
    """
    shape = tuple(shape)
    if not 1 <= len(shape) <= 3 or min(shape) < 1:
        raise ValueError(f"shape: got {shape}; give 1 to 3 lengths of at least 1")
    kernels, strides, dilations, causals = (
        _each(name, value, len(shape))
        for name, value in (
            ("kernel", kernel),
            ("stride", stride),
            ("dilation", dilation),
            ("causal", causal),
        )
    )
    bounds = []
    for x, k, s, d, c in zip(shape, kernels, strides, dilations, causals, strict=True):
        if d < 1 or k < 1 or k * d > x:
            raise ValueError(
                f"kernel, dilation: got {k} and {d} on a grid of length {x}; kernel * dilation "
                f"has to be 1 to {x}"
            )
        if not 1 <= s <= k:
            raise ValueError(f"stride: got {s}; give 1 to the kernel's {k}")
        bounds.append(_reach(x, k, s, d, bool(c)))
    coordinates = torch.cartesian_prod(*(torch.arange(x, device="cpu") for x in shape)).view(
        -1, len(shape)
    )
    low, high = (
        torch.stack([b[side][coordinates[:, t]] for t, b in enumerate(bounds)], -1).int()
        for side in (0, 1)
    )
    return Box(low, high, coordinates.int(), tuple(dilations))


def permute(box: Box, order: Tensor) -> Box:
    """Return the same box for tokens in a different order.

    Args:
        box: a box of N queries and as many keys.
        order: (P,) integers: the token at each position; -1 is padding, which neither sees nor is
            seen.
    """
    n = box.low.shape[0]
    if box.position.shape[0] != n:
        raise ValueError(
            f"box: got {n} queries and {box.position.shape[0]} keys; one order needs them equal"
        )
    if order.ndim != 1 or order.is_floating_point() or ((order < -1) | (order >= n)).any():
        raise ValueError(f"order: give one row of token numbers, -1 (padding) to {n - 1}")
    padding = (order < 0)[:, None].to(box.low.device)
    at = order.clamp(min=0)
    low, high, position = (x[at.to(x.device)] for x in box[:3])
    return Box(
        low.masked_fill(padding, 1),
        high.masked_fill(padding, 0),
        position.masked_fill(padding, BEYOND),
        box.dilation,
        *(None if x is None else x[..., at.to(x.device)] for x in (box.rank, box.limit)),
    )


def _line(n: int) -> Tensor:
    if n < 1:
        raise ValueError(f"n: got {n}; give a number of tokens of at least 1")
    return torch.arange(n, dtype=torch.int32, device="cpu")[:, None]


def _each(name: str, value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    values = (value,) * dimensions if isinstance(value, int) else tuple(value)
    if len(values) != dimensions:
        raise ValueError(f"{name}: got {value}; give one value or {dimensions}, as many as shape")
    return values


def _reach(x: int, k: int, s: int, d: int, causal: bool) -> tuple[Tensor, Tensor]:
    """First and last visible coordinate for each of the ``x`` coordinates of one dimension."""
    at = torch.arange(x, device="cpu")
    residue, i = at % d, at // d
    last = (x - residue + d - 1) // d - 1  # of the coordinates with this residue
    leader = torch.minimum(i // s * s + (s - 1 if causal else s // 2), last)
    if causal:
        first, end = (leader - k + 1).clamp(min=0), i
    else:
        right = k // 2 + k % 2 - 1
        centre = torch.minimum(leader.clamp(min=k // 2), last - right)
        first, end = centre - k // 2, centre + right
    return first * d + residue, end * d + residue
