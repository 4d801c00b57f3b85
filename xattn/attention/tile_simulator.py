"""The tile simulator: how much of a neighbourhood's saving is left for kernels that work in tiles.

    bound = tiles of dense attention / tiles that query tiles have to visit

Our own definition: the simulator of Hassani et al., arXiv 2504.16922, is not public.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from xattn.kernels.block_sparse.box import neighbourhood


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
    """Count the key tiles that query tiles have to visit.

    A tile visits the union of its queries' windows; key tiles lie on a fixed grid, or with
    ``dynamic`` begin where the union does.

    Raises:
        ValueError: as for :class:`~xattn.attention.gna.GNA`.
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
