"""Lists of key blocks: checks, and the transposed lists that the gradient of keys needs.

All of it is stable sorts, counts and cumulative sums without atomics, so two runs agree to the bit.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def listed_blocks(lists: Tensor, count: int) -> Tensor:
    """Lists (..., s) of numbers below ``count``, -1 = nothing, as bool (..., count)."""
    lists = torch.where(lists < 0, count, lists.long())
    table = torch.zeros(*lists.shape[:-1], count + 1, dtype=torch.bool, device=lists.device)
    return table.scatter_(-1, lists, True)[..., :-1]


def check_index(index: Tensor, blocks: int, name: str = "index") -> None:
    """Raise a ``ValueError`` for a block that is out of range or twice in a row.

    On a GPU, where it would stall the stream, this checks only with ``XATTN_CHECK=1``.

    Args:
        index: (..., Mq, s) int32, -1 for an empty entry.
        blocks: number of key blocks.
        name: of the argument, for the message.
    """
    if index.device.type != "cpu" and os.environ.get("XATTN_CHECK") != "1":
        return
    if index.numel() == 0:
        return
    low, high = (int(x) for x in index.aminmax())
    if low < -1 or high >= blocks:
        raise ValueError(
            f"{name}: got the block {low if low < -1 else high}; give -1 (empty) to {blocks - 1}"
        )
    ordered = index.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        block = int(ordered[..., 1:][twice][0])
        raise ValueError(f"{name}: block {block} is twice in a row; give each block once")


def transpose_index(index: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """For each key block the query blocks that read it, in ascending order.

    Args:
        index: (B, H, Mq, s) int32, -1 for an empty entry; no block twice in a row.
        blocks: number of key blocks, Mk.

    Returns:
        pointer (B, H, Mk + 1) and queries (B, H, Mq * s), both int32: block m is read by
        ``queries[..., pointer[m] : pointer[m + 1]]``. Entries after the last pointer are undefined.
    """
    pointer, queries, _ = transpose_groups(index, blocks, 1)
    return pointer, queries


def transpose_groups(index: Tensor, blocks: int, pack: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`transpose_index` for groups of ``pack`` (at most 63) neighbouring key blocks.

    Bit j of the third tensor, int64 (B, H, Mq * s), says whether the query block of that entry reads
    block j of the group.
    """
    batch, heads, rows, s = index.shape
    groups = -(-blocks // pack)
    entries = index.reshape(batch * heads, rows * s).long()
    group = torch.where(entries < 0, groups, entries.div(pack, rounding_mode="floor"))
    row = torch.arange(rows, device=index.device).repeat_interleave(s)
    # Sorted by (group, query block), so the entries of a pair are adjacent.
    pair, order = torch.sort(group * rows + row, dim=-1, stable=True)
    change = pair[:, 1:] != pair[:, :-1]
    first, last = F.pad(change, (1, 0), value=True), F.pad(change, (0, 1), value=True)
    place = first.cumsum(-1) - 1  # of each entry's pair in the list of pairs
    place = torch.where(last, place, rows * s)  # only one entry writes each pair

    def compact(values: Tensor) -> Tensor:
        out = values.new_zeros(batch * heads, rows * s + 1)
        return out.scatter_(-1, place, values)[:, :-1].reshape(batch, heads, rows * s)

    # Distinct bits add up to the set; the cumulative sum may wrap around, its differences are right.
    bits = compact(
        (torch.ones_like(entries) << entries.clamp(min=0) % pack).gather(-1, order).cumsum(-1)
    )
    bits = bits - F.pad(bits, (1, -1))
    # Searching the sorted pairs counts like bincount, but without a transfer from the device.
    edges = torch.arange(groups + 1, device=index.device) * rows
    below = torch.searchsorted(pair, edges.expand(batch * heads, -1).contiguous())
    pairs = F.pad(first.cumsum(-1), (1, 0))
    pointer = pairs.gather(-1, below).view(batch, heads, groups + 1)
    return pointer.int(), compact(pair % rows).int(), bits


LONGEST = 4096  # queries that one program reads, unless lists are longer on average


class Parts(NamedTuple):
    """The lists of M units of keys in C parts, so that no program reads a long one alone."""

    unit: Tensor
    """int32 (B Hk, C), of each part."""
    part: Tensor
    """int32 (B Hk, C), its number among the parts of the unit."""
    ends: Tensor | None
    """(B Hk, M + 1), the parts of unit m are those from ``ends[m]`` to before ``ends[m + 1]``; None where
    no list is split."""
    length: int
    """C"""
    longest: int
    """Entries of a part."""

    @property
    def split(self) -> bool:
        return self.ends is not None

    def places(self, x: Tensor, span: int) -> Tensor:
        """Where the parts of ``x`` (B, heads, M span at most, ...) are written: float32 (B, heads,
        C span, ...), or ``x`` itself."""
        if self.ends is None:
            return x
        shape = *x.shape[:2], self.length * span, *x.shape[3:]
        return x.new_empty(shape, dtype=torch.float32)

    def add(self, parts: Tensor, x: Tensor) -> None:
        """Write the sums of the ``parts``, in their order, to ``x``."""
        if self.ends is None:
            return
        lines = x.shape[0] * x.shape[1]
        ends = self.ends.repeat_interleave(lines // len(self.ends), 0)
        parts = parts.view(lines, self.length, -1)
        sums = torch.segment_reduce(parts, "sum", offsets=ends, axis=1, unsafe=True)
        x.copy_(sums.view(*x.shape[:2], -1, *x.shape[3:])[:, :, : x.shape[2]])


def split_lists(
    pointer: Tensor, entries: int, lines: tuple[int, int], rows: int, q_block: int
) -> Parts:
    """The parts of transposed lists, without a transfer from the device.

    Args:
        pointer: (B or 1, 1 or Hk or H, M + 1), as :func:`transpose_index` gives it. The query heads of a
            key head read as many parts of their lists as the longest of these has.
        entries: of the lists of one of these heads together.
        lines: B and Hk.
        rows: query blocks, the most entries of a list.
        q_block: queries of a block.
    """
    units, lists = pointer.shape[2] - 1, max(1, pointer.shape[1] // lines[1])
    longest = max(1, LONGEST // q_block, 2 * lists * entries // units)
    if rows <= longest:
        return Parts(pointer, pointer, None, units, longest)
    counts = pointer.diff(dim=2)
    if lists > 1:
        counts = counts.unflatten(1, (lines[1], lists)).amax(2)
    parts = (counts + longest - 1).div(longest, rounding_mode="floor").clamp_min(1)
    ends = F.pad(parts.expand(*lines, -1).flatten(0, 1).cumsum(-1), (1, 0))
    number = torch.arange(units + lists * entries // longest, device=pointer.device)
    number = number.expand(len(ends), -1).contiguous()
    unit = torch.searchsorted(ends[:, 1:].contiguous(), number, right=True).clamp_max(units - 1)
    part = number - ends.gather(1, unit)  # parts beyond the last of all are empty
    return Parts(unit.int(), part.int(), ends, number.shape[1], longest)
