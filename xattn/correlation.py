"""The similarity of two maps, as Spearman's rank correlation of their cells, in float64.

    rho = Pearson(rank(a), rank(b)),    disagreement = 1 - mean rho over all pairs of maps

For constant or non-finite inputs, which cannot be ranked, the result is NaN.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

GRID = 28  # cells per side to which maps of different sizes are resampled


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of two (B, ...) tensors -> (B,) float64 in [-1, 1]; ties share their mean rank.

    >>> spearman(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 8.0, 9.0]])).item()
    1.0

    Raises:
        ValueError: the shapes differ.
    """
    return pearson(ranks(a), ranks(b))


def ranks(values: Tensor) -> Tensor:
    """(B, ...) -> (B, N) float64: ranks 1..N, where equal values share their mean rank; NaN for
    constant or non-finite rows."""
    if values.ndim < 2 or values.numel() == 0:
        raise ValueError(f"values: got shape {tuple(values.shape)}; give (B, ...)")
    flat = values.detach().double().flatten(1).contiguous()
    ordered = flat.sort(dim=1).values
    below = torch.searchsorted(ordered, flat)
    up_to = torch.searchsorted(ordered, flat, right=True)
    found = (below + up_to + 1).double() / 2
    return torch.where(varies(flat)[:, None], found, torch.nan)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of two (B, N) -> (B,) float64; NaN where one of them is constant."""
    check_same(a, b)
    a, b = a.double(), b.double()
    a, b = (v - v.mean(1, keepdim=True) for v in (a, b))
    return ((a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()).clamp(-1, 1)


def disagreement(maps: Sequence[NDArray[np.float32]]) -> float:
    """1 - the mean rank correlation over all pairs of maps (h, w) for one class and one view, in [0, 2].

    Maps are first resampled to 28 x 28 cells: finer maps by averaging, coarser ones bilinearly. The result
    is NaN if fewer than two maps vary.
    """
    cells = (
        torch.stack([to_grid(m) for m in maps])
        if len(maps)
        else torch.empty(0, GRID * GRID, device="cpu")
    )
    if len(cells) < 2:
        return math.nan
    order = ranks(cells)
    order = order[order.isfinite().all(1)]
    pairs = list(itertools.combinations(range(len(order)), 2))
    if not pairs:
        return math.nan
    first, second = (order[list(side)] for side in zip(*pairs, strict=True))
    return 1 - float(pearson(first, second).mean())


def to_grid(values: NDArray[np.float32]) -> Tensor:
    """A map (h, w) as 28 x 28 cells, (784,) float64: finer maps are averaged, others interpolated."""
    x = torch.from_numpy(np.array(values, dtype=np.float64))[None]
    for _ in range(2):  # the rows, then the columns
        x = x.transpose(1, 2)
        if x.shape[2] > GRID:
            x = F.adaptive_avg_pool1d(x, GRID)
        else:
            x = F.interpolate(x, GRID, mode="linear", align_corners=False)
    return x.flatten()


def varies(flat: Tensor) -> Tensor:
    """Which rows of (B, N) are finite and not constant, (B,) bool."""
    return flat.isfinite().all(1) & (flat.amin(1) < flat.amax(1))


def check_same(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"a, b: got shapes {tuple(a.shape)} and {tuple(b.shape)}; give equal ones")
