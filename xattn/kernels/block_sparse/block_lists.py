"""Lists of key blocks: checks, and the transposed lists that the gradient of keys needs.

It uses only stable sorts, counts and cumulative sums without atomics, so two runs agree to the bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.backend import readable


def listed_blocks(lists: Tensor, count: int) -> Tensor:
    """Convert lists (..., s) of indices below ``count``, where -1 is empty, to bool (..., count)."""
    lists = torch.where(lists < 0, count, lists.long())
    table = torch.zeros(*lists.shape[:-1], count + 1, dtype=torch.bool, device=lists.device)
    return table.scatter_(-1, lists, True)[..., :-1]


def check_index(index: Tensor, blocks: int, name: str = "index") -> None:
    """Raise a ``ValueError`` if a block is out of range or occurs twice in a row.

    On a GPU, where this would stall the stream, it checks only with ``XATTN_CHECK=1``.

    Args:
        index: (..., Mq, s) int32, -1 for an empty entry.
        blocks: number of key blocks.
        name: the argument's name, for the message.
    """
    if not readable(index) or index.numel() == 0:
        return
    check_numbers(index, blocks, name)
    ordered = index.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        block = int(ordered[..., 1:][twice][0])
        raise ValueError(f"{name}: block {block} is twice in a row; give each block once")


def check_numbers(x: Tensor, count: int, name: str) -> None:
    """Raise a ``ValueError`` unless every number is -1 (empty), or at least 0 and below ``count``."""
    if not readable(x):
        return
    low, high = (int(y) for y in x.aminmax())
    if low < -1 or high >= count:
        raise ValueError(
            f"{name}: got the block {low if low < -1 else high}; give -1 (none) to {count - 1}"
        )


def transpose_index(
    index: Tensor, blocks: int, pack: int = 1
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return, for each group of ``pack`` neighbouring key blocks, the query blocks that read it, in
    ascending order.

    Args:
        index: (B, H, Mq, s) int32, -1 for an empty entry; no block twice in a row.
        blocks: number of key blocks, in M groups.
        pack: at most 63.

    Returns:
        pointer (B, H, M + 1) and queries (B, H, Mq * s), both int32: group m is read by
        ``queries[..., pointer[m] : pointer[m + 1]]``. The third tensor is int64 (B, H, Mq * s); bit j of an
        entry says whether the query block at the same place in ``queries`` reads block j of the group. This
        tensor is None if groups have only one block. Entries after the last pointer are undefined.
    """
    (batch, heads, rows, s), groups = index.shape, -(-blocks // pack)
    entries = index.reshape(batch, heads, rows * s).long()
    group = torch.where(entries < 0, groups, entries.div(pack, rounding_mode="floor"))
    row = torch.arange(rows, device=index.device).repeat_interleave(s)
    # Sorted by (group, query block), so the entries of a pair are adjacent.
    pair, order = torch.sort(group * rows + row, dim=-1, stable=True)
    # Searching the sorted pairs counts like bincount, but without a transfer from the device.
    edges = torch.arange(groups + 1, device=index.device) * rows
    below = torch.searchsorted(pair, edges.expand(batch, heads, -1).contiguous())
    if pack == 1:  # each pair occurs once
        return below.int(), (pair % rows).int(), None
    change = pair[..., 1:] != pair[..., :-1]
    first, last = F.pad(change, (1, 0), value=True), F.pad(change, (0, 1), value=True)
    pairs = first.cumsum(-1)
    place = torch.where(last, pairs - 1, rows * s)  # only one entry writes each pair

    def compact(values: Tensor) -> Tensor:
        out = values.new_zeros(batch, heads, rows * s + 1)
        return out.scatter_(-1, place, values)[..., :-1]

    # Distinct bits add up to the set; the cumulative sum may wrap around, but its differences are right.
    bits = torch.ones_like(entries) << entries.clamp(min=0) % pack
    bits = compact(bits.gather(-1, order).cumsum(-1))
    bits = bits - F.pad(bits, (1, -1))
    pointer = F.pad(pairs, (1, 0)).gather(-1, below)
    return pointer.int(), compact(pair % rows).int(), bits
