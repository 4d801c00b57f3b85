"""Generalized neighborhood attention: every token sees a window of its grid neighbours.

In each dimension, queries form groups of ``stride`` neighbours, and each query sees the ``kernel`` keys
around the leader of its group. With ``dilation``, a query sees only keys whose coordinate leaves the same
remainder as its own when divided by ``dilation``. A stride of 1 gives neighborhood attention (arXiv
2204.07143), a stride equal to the kernel gives blocked (window) attention, and a kernel as long as the grid
gives dense attention. Prefix tokens see all tokens and are seen by all. The method is from Hassani et al.,
arXiv 2504.16922.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from xattn.attention.base import Mechanism, Size, check_whole, register_attention
from xattn.attention.inputs import Inputs
from xattn.attention.operators.base import Operator
from xattn.attention.operators.patterns import Pattern, pattern_operator
from xattn.attention.order import residue_order
from xattn.attention.plans import cache_plan
from xattn.attention.selection import visible_blocks
from xattn.kernels.block_sparse.box import neighbourhood, permute
from xattn.kernels.softmax import softmax_attention

Lengths = int | tuple[int, ...]
TILES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}


@register_attention(
    "gna",
    paper="arXiv 2504.16922",
    complexity="N k^n D",
    grid=(1, 2, 3),
    causal=True,
    training_free=True,
    cases=(
        {"kernel": 3},
        {"kernel": 3, "backend": "cpu"},
        {"kernel": (3, 4), "stride": (2, 1), "backend": "cpu"},
        {"kernel": 2, "dilation": (2, 1), "backend": "cpu"},
    ),
    bench=({"kernel": 7},),
    size=Size(
        "kernel",
        "Neighbourhoods",
        "Window, patches a side",
        tuple(range(3, 32, 2)),
        7,
        "patches a side",
    ),
    studies={
        "swap": ({"options": {"kernel": 7}}, {"options": {"kernel": 7}, "share": 2 / 3}),
        "attention-maps": {"options": {"kernel": 7}},
    },
)
class GNA(Mechanism):
    """Generalized neighborhood attention on grids of 1 to 3 dimensions.

    ``kernel``, ``stride``, ``dilation`` and ``causal`` take one value, or one per dimension.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        kernel: the number of keys that a query sees in each dimension; at most the length of the grid.
        stride: the number of queries that share a window, from 1 to ``kernel``.
        dilation: the distance between the keys that a query sees.
        causal: whether every call hides the later keys of a dimension. If False, only calls with
            ``causal=True`` hide them.
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
                check_whole(name, length)
        self.window = (_hashable(kernel), _hashable(stride), _hashable(dilation))
        self.causal = _hashable(causal)

    def operator(self, inputs: Inputs) -> Operator:
        return pattern_operator(inputs, self._plan(inputs), backend=self.backend)

    def _plan(self, inputs: Inputs) -> Pattern:
        grid, device = inputs.grid, inputs.q.device
        assert grid is not None
        if inputs.causal and len(grid) > 1:
            raise ValueError(
                f"causal: got a grid of {len(grid)} dimensions, but a causal call needs tokens in a "
                f"row; for causal dimensions of a grid, create gna with causal=True"
            )
        causal = inputs.causal or self.causal
        return plan(grid, *self.window, causal, device.type == "cpu", device=device)

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``received``, the attention that each patch gets from all tokens, averaged over heads."""
        if inputs.grid is None or len(inputs.grid) != 2:
            return {}
        ones = operator.row_sums().new_ones(operator.shape[0], 1, operator.shape[2])
        received = operator.vecmat(ones, "mean")[..., inputs.prefix :]
        return {"received": received.unflatten(-1, inputs.grid)}

    def locality(self, q: Tensor, k: Tensor, grid: Sequence[int], prefix: int = 0) -> Tensor:
        """Compute the share of dense attention that falls inside the window or on the prefix, (B, H, N) in
        [0, 1].

        It is exp(lse of the window - lse of all keys), and shows where a trained softmax layer is already
        local.
        """
        asked = self.check_inputs(Inputs(q, k, k, None, tuple(grid), prefix))
        inside: Any = self.operator(asked)
        every = softmax_attention(asked.q, asked.k, asked.v, backend=self.backend)[1]
        return (inside.attend(asked.v)[1] - every).exp()


def window_pattern(inputs: Inputs, window: Lengths, option: str) -> Pattern:
    """Create the pattern of a window around each query; other mechanisms use it too.

    Args:
        window: the side lengths of the window in tokens, as one number for all dimensions of the grid or
            one for each. Without a grid, and in a causal call, ``window`` is a single number of
            neighbouring tokens; in a causal call, these are the last tokens up to the query. Where a window
            is longer than the grid, it covers the full length.
        option: the name of ``window`` in error messages.

    Raises:
        ValueError: if the number of lengths differs from the number of dimensions.
    """
    grid = inputs.grid
    if grid is None or inputs.causal:
        grid = (inputs.q.shape[2] - inputs.prefix,)
    device = inputs.q.device
    sides = (window,) * len(grid) if isinstance(window, int) else tuple(window)
    if len(sides) != len(grid):
        raise ValueError(
            f"{option}: got {sides} for a grid {grid}; give one number, or one for each of its "
            f"dimensions"
        )
    sides = tuple(min(side, length) for side, length in zip(sides, grid, strict=True))
    return plan(grid, sides, 1, 1, inputs.causal, device.type == "cpu", device=device)


@cache_plan
def plan(
    grid: tuple[int, ...],
    kernel: Lengths,
    stride: Lengths = 1,
    dilation: Lengths = 1,
    causal: bool | tuple[bool, ...] = False,
    single_keys: bool = True,
) -> Pattern:
    """Create the token order, block lists and element rule of a neighbourhood. The result is cached.

    Args:
        single_keys: whether to list single keys instead of the tiles of keys that kernels need. Single keys
            are faster if the keys are gathered.

    Raises:
        ValueError: if a window does not fit the grid, or a stride exceeds the kernel.
    """
    rule = neighbourhood(grid, kernel, stride, dilation, causal)
    tile = tuple(min(t, g) for t, g in zip(TILES[len(grid)], grid, strict=True))
    order = residue_order(grid, rule.dilation, tile)
    rule = permute(rule, order.index)
    size = math.prod(tile)
    blocks = visible_blocks(rule, size, 1 if single_keys else size)
    return Pattern(blocks, order, rule, fixed=True)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
