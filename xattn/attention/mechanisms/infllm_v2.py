"""InfLLM v2: queries score overlapping windows of keys, and read all tokens of the best blocks.

    A = softmax over the tokens of the chosen blocks of (q k^T / sqrt(D))
    r_c = sum_i softmax_c(q_i . m_c / sqrt(D)),   score of a block = max of r_c over overlapping windows c

m_c is the mean key of window c. A window is ``kernel`` tokens long, and a new one starts every ``stride``
tokens; on a grid, this holds along each side. The last window of a side may be cut off. The sum runs over
the queries i of one block (in a causal call, over one query) in all heads that share a key head.

The blocks around the query's own are always read. There is only one softmax, and nothing is learned, so
short inputs can use dense attention: with fewer than ``dense_below`` patches, A is exactly softmax
attention. Prefix tokens belong to no window and no block; they see all tokens and are read by all. No
gradient flows through the choice of blocks. The method is from MiniCPM4, arXiv 2506.07900, and InfLLM-V2,
arXiv 2509.24663.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.base import Mechanism, Size, check_whole, register_attention
from xattn.attention.inputs import Inputs
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.operators.lowering import attend
from xattn.attention.operators.patterns import Pattern, pattern_operator
from xattn.attention.order import Order, blocks_to_tokens, tile_order
from xattn.attention.plans import cache_plan
from xattn.attention.recall import Choice
from xattn.attention.selection import Blocks, Rule, Segment, select
from xattn.kernels.block_sparse.box import causal as causal_rule
from xattn.kernels.softmax.reference import widen


@dataclass(frozen=True, eq=False)
class KeyWindows:
    """The C windows and M blocks of the tokens after the prefix."""

    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    order: Order | None
    """The order that makes each block's tokens consecutive; None keeps the given order."""
    q_block: int
    k_block: int
    table: Tensor
    """int32 (M, f), the windows that overlap each block; -1 = none."""
    forced: Tensor
    """int32 (1, 1, query blocks, f), the blocks that are always read."""
    visible: Tensor | None = None
    """In causal calls, int32 (N,), the number of windows that have ended by each token."""
    rule: Rule | None = None
    """In causal calls, the rule for which tokens a query sees."""

    def means(self, inputs: Inputs, factor: int = 1) -> Tensor:
        """Compute the mean key of each window, (B, Hk, C, D). The length and stride of the windows are
        multiplied by ``factor``."""
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
        """Return the log-sum-exp of each query's scores over coarser windows, (B, H, N), and the number of
        these windows."""
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
        """Return the share of the lists that contain each token's block, (B, Hk, N) in [0, 1]."""
        share = blocks.shares(len(self.table))
        return blocks_to_tokens(share, self.k_block, self.order, self.grid[0])

    def on_tokens(self, x: Tensor) -> Tensor:
        """Convert values of windows (..., C) to values of tokens (..., h, w): each token gets the mean over
        the windows that contain it."""
        sides = []
        for length, kernel, stride in zip(self.grid, self.kernel, self.stride, strict=True):
            at = torch.arange(length, device=x.device)[:, None]
            start = torch.arange(_count(length, kernel, stride), device=x.device) * stride
            inside = ((start <= at) & (at < start + kernel)).to(x.dtype)
            sides.append(inside / inside.sum(1, keepdim=True))
        rows, columns = sides
        return rows @ x.unflatten(-1, (rows.shape[1], -1)) @ columns.T


@cache_plan
def key_windows(
    grid: tuple[int, ...],
    block: int,
    stride: int,
    kernel: int,
    local: int = 1,
    first: int = 1,
    causal: bool = False,
) -> KeyWindows:
    """Create the windows and blocks of a grid or of a row of tokens. The result is cached.

    Args:
        grid: the two side lengths of a grid, or the length of a row; causal calls need a row.
        block, stride, kernel: lengths in tokens along each side. A block or window longer than a side
            covers all of it.
        local: number of blocks always read on each side of the query's own block, or only before it if
            causal.
        first: if causal, number of blocks at the start of the row that are always read.
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
    order = None if len(grid) == 1 else tile_order(grid, tile)
    table, forced = _numbers(members, counts), _numbers(near, tiles)
    made = KeyWindows(grid, kernels, strides, order, size, size, table, forced[None, None])
    if not causal:
        return made
    line = torch.arange(grid[0], dtype=torch.int32)
    before = line[:, None] // size - torch.arange(local + 1, dtype=torch.int32)
    start = torch.arange(first, dtype=torch.int32).expand(len(line), -1)
    start = torch.where(start <= before[:, :1], start, -1)
    ended = (line + 1 - kernels[0]).div(stride, rounding_mode="floor") + 1
    return replace(
        made,
        q_block=1,
        forced=torch.cat([before, start], 1).clamp(min=-1)[None, None],
        visible=ended.clamp(min=0),
        rule=causal_rule(grid[0]),
    )


def _count(length: int, kernel: int, stride: int) -> int:
    """Return the number of windows along a side."""
    return -(-max(0, length - kernel) // stride) + 1


def _numbers(sides: Sequence[Sequence[Sequence[int]]], counts: Sequence[int]) -> Tensor:
    """Combine lists of numbers along the sides of a grid into one list for each place of the grid.

    ``sides`` gives a list for each position along each side. The list of a place contains all combinations
    of the numbers in its lists, each as one number in raster order: int32; -1 = none.
    """
    lists = []
    for place in product(*sides):
        found = [0]
        for numbers, count in zip(place, counts, strict=True):
            found = [before * count + c for before in found for c in numbers]
        lists.append(found)
    most = max(map(len, lists))
    filled = [x + [-1] * (most - len(x)) for x in lists]
    return torch.tensor(filled, dtype=torch.int32)


SMALL = {"block": 2, "stride": 1, "dense_below": 0}


@register_attention(
    "infllm_v2",
    paper="arXiv 2509.24663",
    complexity="N (N / stride + k block) D",
    grid=(0, 1, 2),
    causal=True,
    grouped=True,
    training_free=True,
    cases=(
        {**SMALL, "selected": 3, "local": 0},
        {**SMALL, "selected": 10, "kernel": 3, "normaliser": "coarse", "backend": "cpu"},
        {},
    ),
    bench=({},),
    size=Size(
        "selected", "Blocks", "Blocks that are read, including the near ones", (10, 11, 13, 17, 25), 13,
        options={**SMALL},
    ),
    studies={
        "swap": ({}, {"options": {"block": 2, "stride": 1, "dense_below": 0}}),
        "attention-maps": {"options": {"selected": 13, "block": 4, "dense_below": 0}},
    },
)  # fmt: skip
class InfLLMv2(Mechanism):
    """Blocks chosen by overlapping windows, on a grid or in a row of tokens; causal in token order.

    Lengths are in tokens, along a row or along each side of the grid. A length greater than that of the row
    or side covers all of it.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        selected: k, the number of blocks that are read, including those that are always read; by default, 8
            more than are always read.
        block: the length of a block; by default 64 in a row and 8 on a grid.
        stride: the distance between the starts of windows; by default a quarter of the block in a row and
            half of it on a grid.
        kernel: the length of a window; by default twice the stride.
        local: number of blocks always read on each side of the query's own block, or only before it if
            causal.
        first: number of blocks at the start of the row that are always read in a causal call.
        dense_below: if there are fewer tokens than this after the prefix, attention is dense.
        normaliser: "exact", or "coarse" to use the log-sum-exp over windows that are four times as long and
            four times as far apart (on a grid, twice along each side). With "coarse", scores are not
            probabilities, and queries before the end of the first coarse window are not normalised.

    Raises:
        ValueError: if a length or count is invalid, or ``normaliser`` is unknown. Calling the mechanism
            also raises a ``ValueError`` if ``selected`` is smaller than the number of blocks that are
            always read, or ``kernel`` is smaller than the stride.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        selected: int | None = None,
        block: int | None = None,
        stride: int | None = None,
        kernel: int | None = None,
        local: int = 1,
        first: int = 1,
        dense_below: int = 2048,
        normaliser: str = "exact",
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        lengths = {"block": block, "stride": stride, "kernel": kernel}
        self.lengths = tuple(
            x if x is None else check_whole(name, x) for name, x in lengths.items()
        )
        self.selected = None if selected is None else check_whole("selected", selected)
        counts = {"local": local, "first": first, "dense_below": dense_below}
        for name, value in counts.items():
            if value < 0:
                raise ValueError(f"{name}: got {value}; give 0 or more")
        self.always, self.dense_below = (local, first), dense_below
        if normaliser not in ("exact", "coarse"):
            raise ValueError(f"normaliser: got {normaliser!r}; give 'exact' or 'coarse'")
        self.normaliser = normaliser

    def operator(self, inputs: Inputs) -> Operator:
        if self._is_dense(inputs):
            return SoftmaxOperator(
                inputs.q, inputs.k, inputs.scale, backend=self.backend, causal=inputs.causal
            )
        windows = self._windows(inputs)
        blocks, work = self._choose(inputs, windows)
        pattern = Pattern(blocks, windows.order, windows.rule)
        operator = pattern_operator(inputs, pattern, backend=self.backend)
        operator.context, operator.selection = blocks, work
        return operator

    def choice(self, inputs: Inputs) -> Choice | None:
        if self._is_dense(inputs):
            return None
        windows = self._windows(inputs)
        return Choice(self._choose(inputs, windows)[0], windows.order, windows.forced)

    def _is_dense(self, inputs: Inputs) -> bool:
        return inputs.q.shape[2] - inputs.prefix < max(self.dense_below, 1)

    def _choose(self, inputs: Inputs, windows: KeyWindows) -> tuple[Blocks, float]:
        """Return the blocks that are read, and the cost of choosing them."""
        patches = inputs.q[:, :, inputs.prefix :].detach()
        patches = patches if windows.order is None else windows.order.apply(patches)
        keys = windows.means(inputs)
        count, forced = len(windows.table), windows.forced
        always = forced.shape[3]
        s = always + 8 if self.selected is None else self.selected
        if s < always:
            raise ValueError(
                f"selected: got {s}; give at least {always}, the number of blocks always read"
            )
        s = min(s, count)
        lse, cost = None, keys.shape[2] / 2
        if self.normaliser == "coarse":
            lse, length = windows.coarse_lse(patches, inputs, self.backend)
            cost += length
        blocks, _ = select(
            patches,
            keys,
            s,
            q_block=windows.q_block,
            k_block=windows.k_block,
            softmax=True,
            spread=(windows.table, "max"),
            forced=forced,
            visible=windows.visible,
            lse=lse,
            scale=inputs.scale,
            backend=self.backend,
        )
        return blocks, patches.shape[2] * cost

    def _windows(self, inputs: Inputs) -> KeyWindows:
        q, grid = inputs.q, inputs.grid
        if grid is None or inputs.causal:
            grid = (q.shape[2] - inputs.prefix,)
        block, stride, kernel = self.lengths
        block = block or (64 if len(grid) == 1 else 8)
        stride = stride or max(1, block // 2 ** (3 - len(grid)))
        kernel = kernel or 2 * stride
        if kernel < stride:
            raise ValueError(f"kernel: got {kernel}; give at least {stride}, the stride")
        lengths = block, stride, kernel
        return key_windows(grid, *lengths, *self.always, inputs.causal, device=q.device)

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``importance``, the windows' softmax, averaged over heads and patches, where each patch
        gets the mean over the windows that contain it; ``class_importance``, the same for the first prefix
        token; and ``selected``, the share of the query blocks that read each block, per key head."""
        grid, prefix = inputs.grid, inputs.prefix
        if grid is None or len(grid) != 2:
            return {}
        found, windows = {}, self._windows(inputs)
        if not inputs.causal:
            read = SoftmaxOperator(inputs.q, windows.means(inputs), inputs.scale)
            patches = inputs.q.shape[2] - prefix
            r = torch.zeros(len(inputs.q), 2, prefix + patches, device=inputs.q.device)
            r[:, 0, prefix:], r[:, 1, 0] = 1 / patches, 1.0
            mass = windows.on_tokens(read.vecmat(r, "mean"))
            found["importance"] = mass[:, :1]
            if prefix:
                found["class_importance"] = mass[:, 1:]
        if operator.context is not None:
            found["selected"] = windows.frequency(operator.context).unflatten(-1, grid)
        return found
