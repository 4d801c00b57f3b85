"""The weights of softmax attention, some rows of some heads at a time, from the log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xattn.kernels.backend import tile_entries
from xattn.kernels.softmax.reference import widen

ROWS = 128  # of a head
TILE = 2**17  # weights, over heads: 512 KB in float32, which stay in the cache
FEWEST = 32  # fewest rows, whatever the number of keys, since smaller products are inefficient


class Tile(NamedTuple):
    """Some rows of some heads, and the keys that they see."""

    heads: slice
    """Heads, among all B H heads of the batch."""
    rows: slice
    keys: slice
    weights: Tensor
    """(heads, rows, keys); tiles share its memory."""


def weight_rows(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, causal: bool
) -> Iterator[tuple[Tile, Tensor]]:
    """Yield tiles that cover every row of every head once, each with a buffer of the same shape as its
    weights.

    Args:
        q: (B H, N, D); ``k``: (B H, S, D); ``lse``: (B H, N).
    """
    heads, n, s = q.shape[0], q.shape[1], k.shape[1]
    left = torch.cat([widen(q) * scale, -lse[..., None]], -1)
    right = torch.cat([widen(k), lse.new_ones(heads, s, 1)], -1).transpose(1, 2)
    entries = tile_entries(q.device, TILE)
    size = min(n, ROWS if q.is_cpu else n, max(FEWEST, entries // s))
    group = min(heads, max(1, entries // (size * s)))
    memory = lse.new_empty(2, group * size * s)
    for h in range(0, heads, group):
        hs = slice(h, min(h + group, heads))
        for start in range(0, n, size):
            i = slice(start, min(start + size, n))
            j = slice(0, i.stop if causal else s)
            shape = (hs.stop - hs.start, i.stop - i.start, j.stop)
            a, buffer = (x[: shape[0] * shape[1] * shape[2]].view(shape) for x in memory)
            torch.bmm(left[hs, i], right[hs, :, j], out=a)
            a.exp_()
            yield Tile(hs, i, j, a.tril_(start) if causal else a), buffer


def flatten_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, H, ...) as (B H, ...)."""
    return tuple(x.flatten(0, 1) for x in tensors)


def append_ones(features: Tensor) -> Tensor:
    """Append a 1 to each row of (..., S, F), so that z . f_j + c is a single product."""
    return torch.cat([features, torch.ones_like(features[..., :1])], -1)
