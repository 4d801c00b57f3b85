"""Describes where a network looks on each photo by 64 numbers, the means of the map on 8 x 8 cells.

    u_i = (m_i - mean(m_i)) / |m_i - mean(m_i)|,    distance(i, j) = 1 - u_i . u_j  in [0, 2]

m_i are the 64 means of the map after scaling it to [0, 1]. The same grid over the network's input is used
for maps of all sizes, so a cell is the same place of the input in all maps. A constant map has no
direction, so u_i = 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from xattn.packs.reader import Pack

SIDE = 8  # cells per side
MOST_PHOTOS = 20_000  # if there are more photos, a random sample of this size is read

Values = NDArray[np.float32]


def sample(photos: int, most: int = MOST_PHOTOS, seed: int = 0) -> NDArray[np.int64]:
    """The sorted indices of the photos to read, out of ``photos`` photos: all, or ``most`` drawn at random
    if there are more.

    >>> sample(3).tolist(), len(sample(30, most=5))
    ([0, 1, 2], 5)
    """
    if photos <= most:
        return np.arange(photos)
    return np.sort(np.random.default_rng(seed).choice(photos, most, replace=False))


def read(pack: Pack, entry_ids: Sequence[str]) -> Values:
    """Read maps as (n, 64), see :func:`pool_map`.

    Raises:
        PackError: a map is damaged.
    """
    found = np.empty((len(entry_ids), SIDE * SIDE), np.float32)
    for i, entry_id in enumerate(entry_ids):
        found[i] = pool_map(pack.explanation(entry_id).normalized())
    return found


def pool_map(values: NDArray[np.float32]) -> Values:
    """A map (h, w) -> (64,), its means over 8 x 8 cells; for a coarser map, cells can share a value."""
    found = F.adaptive_avg_pool2d(torch.from_numpy(np.array(values, np.float32))[None], SIDE)
    return found.flatten().numpy()


def standardise_rows(values: NDArray[np.floating]) -> Values:
    """(n, d) -> (n, d) float32; the mean of each row is subtracted, and the row is scaled to length 1.

    A constant row becomes 0.
    """
    values = np.asarray(values, np.float32)
    return normalise_rows(values - values.mean(1, keepdims=True), least=1e-4)


def normalise_rows(values: NDArray[np.floating], least: float = 0.0) -> Values:
    """(n, d) -> (n, d) float32; scales rows to length 1, and sets rows of length ``least`` or less to 0."""
    values = np.asarray(values, np.float32)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return np.divide(values, length, out=np.zeros_like(values), where=length > least)


def nearest(
    toward: Values, one: Values, count: int = 24
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The indices of the rows nearest to ``one``, nearest first, and their distances.

    Args:
        toward: (n, d), rows of length 1 or 0. Rows of length 0 are never returned.
        one: (d,), of length 1 or 0. If its length is 0, no row is returned.

    Returns:
        Up to ``count`` indices, and the distances 1 - cosine in [0, 2].
    """
    usable = np.flatnonzero(np.any(toward != 0, axis=1) & bool(np.any(one != 0)))
    distance = np.clip(1 - toward[usable] @ one, 0, 2).astype(np.float32)
    order = np.argsort(distance, kind="stable")[:count]
    return usable[order], distance[order]


def describe_place(cells: Sequence[float] | NDArray[np.floating]) -> str:
    """The place where a map (64,) is strongest, in words.

    This is the weighted centre of the cells above the middle of the map's range. If more than two fifths of
    all cells are above it, the result is "the whole photo".

    >>> corner = np.zeros((8, 8)); corner[6:, 6:] = 1
    >>> describe_place(corner.ravel()), describe_place(np.ones(64))
    ('bottom right corner', 'the whole photo')
    """
    grid = np.asarray(cells, np.float64).reshape(SIDE, SIDE)
    low, high = grid.min(), grid.max()
    strong = grid > (low + high) / 2
    if high == low or strong.mean() > 0.4:
        return "the whole photo"
    weights = np.where(strong, grid - low, 0)
    middle = (np.arange(SIDE) + 0.5) / SIDE
    down = float((weights.sum(1) * middle).sum() / weights.sum())
    across = float((weights.sum(0) * middle).sum() / weights.sum())
    vertical = "top" if down < 1 / 3 else "bottom" if down > 2 / 3 else ""
    horizontal = "left" if across < 1 / 3 else "right" if across > 2 / 3 else ""
    if vertical and horizontal:
        return f"{vertical} {horizontal} corner"
    return f"{vertical or horizontal} edge" if vertical or horizontal else "the middle"
