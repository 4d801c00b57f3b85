"""Overlapping windows of keys, by whose means queries choose among blocks of tokens.

In a row or on a grid, a window is ``kernel`` tokens long and starts every ``stride`` tokens, along each
side; a block takes the best score of the windows that overlap it (InfLLM-V2, arXiv 2509.24663). The last
window of a side may be cut off. Prefix tokens belong to no window and no block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.inputs import Inputs
from xattn.attention.lowering import attend
from xattn.attention.order import Order, blocks_to_tokens, tile_order
from xattn.attention.segments import Blocks, Rule, Segment
from xattn.kernels.block_sparse.box import causal as causal_rule
from xattn.kernels.softmax.reference import widen


@dataclass(frozen=True, eq=False)
class KeyWindows:
    """The C windows and M blocks of the tokens behind the prefix."""

    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    order: Order | None
    """Puts the tokens of a block side by side; None leaves them as they are."""
    q_block: int
    k_block: int
    table: Tensor
    """int32 (M, f), the windows that overlap each block, -1 = none."""
    forced: Tensor
    """int32 (1, 1, query blocks, f), the blocks that are always read."""
    visible: Tensor | None = None
    """Causal: int32 (N,), how many windows have ended."""
    rule: Rule | None = None
    """Causal: which tokens are seen."""

    def means(self, inputs: Inputs, factor: int = 1) -> Tensor:
        """Mean key of each window, (B, Hk, C, D); ``factor`` times as long and far apart."""
        flat = (1,) * (2 - len(self.grid))
        longer = [min(n, factor * k) for n, k in zip(self.grid, self.kernel, strict=True)]
        kernel, stride = [*flat, *longer], [*flat, *(factor * s for s in self.stride)]
        keys = widen(inputs.k.detach()[:, :, inputs.prefix :])
        keys = keys.flatten(0, 1).unflatten(1, flat + self.grid).movedim(-1, 1)
        keys = F.avg_pool2d(keys, kernel, stride, ceil_mode=True, count_include_pad=False)
        keys = keys.movedim(1, -1).reshape(*inputs.k.shape[:2], -1, inputs.k.shape[3])
        return keys.to(inputs.q.dtype)

    @torch.no_grad()
    def coarse_lse(self, q: Tensor, inputs: Inputs, backend: str) -> tuple[Tensor, int]:
        """Log-sum-exp of queries over the coarser windows (B, H, N), and their number."""
        factor = 4 if len(self.grid) == 1 else 2
        keys, rule = self.means(inputs, factor), None
        if self.visible is not None:
            line = torch.arange(keys.shape[2], dtype=torch.int32, device=q.device)
            end = factor * (line * self.stride[0] + self.kernel[0])
            now = torch.arange(1, q.shape[2] + 1, dtype=torch.int32, device=q.device)[:, None]
            rule = Rule(torch.zeros_like(now), now, end[:, None], (1,))
        segment = Segment(keys, keys, rule=rule)
        return attend(q, [segment], scale=inputs.scale, backend=backend)[1], keys.shape[2]

    def frequency(self, blocks: Blocks) -> Tensor:
        """Share of the lists that hold the block of each token, (B, Hk, N) in [0, 1]."""
        share = blocks.shares(len(self.table))
        return blocks_to_tokens(share, self.k_block, self.order, self.grid[0])

    def on_tokens(self, x: Tensor) -> Tensor:
        """Values of windows (..., C) as those of tokens (..., h, w): means over the windows that hold
        each."""
        sides = []
        for length, kernel, stride in zip(self.grid, self.kernel, self.stride, strict=True):
            at = torch.arange(length, device=x.device)[:, None]
            start = torch.arange(_count(length, kernel, stride), device=x.device) * stride
            inside = ((start <= at) & (at < start + kernel)).to(x.dtype)
            sides.append(inside / inside.sum(1, keepdim=True))
        rows, columns = sides
        return rows @ x.unflatten(-1, (rows.shape[1], -1)) @ columns.T


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # cached tensors may serve training later
def key_windows(
    grid: tuple[int, ...],
    block: int,
    stride: int,
    kernel: int,
    local: int = 1,
    first: int = 1,
    causal: bool = False,
    device: torch.device | str = "cpu",
) -> KeyWindows:
    """Windows and blocks of a grid, or of a row of tokens; cached.

    Args:
        grid: lengths, one or two; a causal call needs a row.
        block, stride, kernel: in tokens, along each side; those longer than a side take all of it.
        local: blocks on each side of a query's own that are always read; causal, before it.
        first: causal, blocks at the start that are always read.
    """
    tile = tuple(min(block, length) for length in grid)
    kernels, strides = tuple(min(kernel, length) for length in grid), (stride,) * len(grid)
    counts = [_count(*side) for side in zip(grid, kernels, strides, strict=True)]
    tiles = [-(-length // t) for length, t in zip(grid, tile, strict=True)]
    members, near = [], []  # for each side and each of its tiles
    for t, k, windows, number in zip(tile, kernels, counts, tiles, strict=True):
        spans = [(c, c * stride, c * stride + k) for c in range(windows)]
        members.append([
            [c for c, start, end in spans if start < (i + 1) * t and end > i * t]
            for i in range(number)
        ])  # fmt: skip
        near.append([
            [j for j in range(i - local, i + local + 1) if 0 <= j < number] for i in range(number)
        ])  # fmt: skip
    size = math.prod(tile)
    order = None if len(grid) == 1 else tile_order(grid, tile).to(device)
    table, forced = _numbers(members, counts, device), _numbers(near, tiles, device)
    made = KeyWindows(grid, kernels, strides, order, size, size, table, forced[None, None])
    if not causal:
        return made
    line = torch.arange(grid[0], dtype=torch.int32, device=device)
    before = line[:, None] // size - torch.arange(local + 1, dtype=torch.int32, device=device)
    start = torch.arange(first, dtype=torch.int32, device=device).expand(len(line), -1)
    start = torch.where(start <= before[:, :1], start, -1)
    ended = (line + 1 - kernels[0]).div(stride, rounding_mode="floor") + 1
    return replace(
        made,
        q_block=1,
        forced=torch.cat([before, start], 1).clamp(min=-1)[None, None],
        visible=ended.clamp(min=0),
        rule=causal_rule(grid[0]).to(device),
    )


def _count(length: int, kernel: int, stride: int) -> int:
    """Number of windows along a side."""
    return -(-max(0, length - kernel) // stride) + 1


def _numbers(
    sides: Sequence[Sequence[Sequence[int]]], counts: Sequence[int], device: torch.device | str
) -> Tensor:
    """For each place of the grid, the numbers of what each side lists there: int32, -1 = none."""
    lists = []
    for place in product(*sides):
        found = [0]
        for numbers, count in zip(place, counts, strict=True):
            found = [before * count + c for before in found for c in numbers]
        lists.append(found)
    most = max(map(len, lists))
    filled = [x + [-1] * (most - len(x)) for x in lists]
    return torch.tensor(filled, dtype=torch.int32, device=device)
