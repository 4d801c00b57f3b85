"""Finds possible shortcuts: groups of photos on which a network looks at a place that it ignores on others.

The groups and their suspicion are computed by :mod:`~xattn.eval.report.photo_map.clusters`. A permutation
test measures whether a group could be due to chance: the classes are shuffled among the photos, the maps
are left unchanged, and the groups are scored again.

    p = (1 + number of shuffles whose most suspicious group reaches this group's suspicion) / (1 + shuffles)

The comparison with the most suspicious group of each shuffle corrects for the number of groups (Westfall
and Young 1993). A low p means that, in this group, the place where the network looks depends on the class.
This place can still be the object itself, if objects of different classes are at different positions in the
photos. To be sure, look at the mean map, and test what happens if this place is painted over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xattn.eval.report.photo_map.clusters import Cluster, clusters, most_suspicious, partition
from xattn.eval.report.photo_map.pooled_maps import SIDE, Values

SHUFFLES = 199
MOST_TESTED = 5000  # if there are more photos, the test uses a random sample of this size

Names = Sequence[str | None]


@dataclass(frozen=True)
class Shortcut:
    """A group of photos that may reveal a shortcut, with its p-value and the share of its mean map near the
    edge.

    Attributes:
        group: the photos, their mean map, the place where the network looks, and the suspicion.
        p: the p-value in (0, 1], corrected for the number of groups; NaN without a test.
        edge: the share of the mean map, in [0, 1], that lies in the two outermost rings of its 8 x 8 cells.
            For a uniform map, it is 0.75.
    """

    group: Cluster
    p: float
    edge: float


def find_shortcuts(
    values: Values,
    classes: Names,
    right: Sequence[bool | None] | None = None,
    shuffles: int = SHUFFLES,
    seed: int = 0,
) -> list[Shortcut]:
    """Find groups of photos that may share a shortcut, most suspicious first.

    Args:
        values: (n, 64) pooled maps, see :mod:`~xattn.eval.report.photo_map.pooled_maps`.
        classes: the predicted class of each photo.
        right: whether each prediction is correct, or None if this is unknown; by default, all are unknown.
        shuffles: the number of shuffles, which limits how small p can be. With 0, there is no test, and p
            is NaN.

    Raises:
        ValueError: ``shuffles`` is negative.

    Example:
        >>> maps = np.full((40, 64), 0.2, np.float32)
        >>> maps[:, 27:29] = 1  # the middle
        >>> maps[:10] = np.eye(64, dtype=np.float32)[63]  # ten photos of cats: the bottom right corner
        >>> first = find_shortcuts(maps, ["cat", "cat"] * 10 + ["dog"] * 20)[0]
        >>> first.group.place, sorted(first.group.rows.tolist()) == list(range(10)), first.p < 0.05
        ('bottom right corner', True, True)
    """
    if shuffles < 0:
        raise ValueError(f"shuffles: got {shuffles}; give 0 or a positive number")
    known = [None] * len(classes) if right is None else right
    found = clusters(values, classes, known, seed=seed)
    if not found:
        return []
    null = chance_suspicion(values, classes, shuffles, seed)
    return [
        Shortcut(
            one,
            (1 + int((null >= one.suspicion).sum())) / (1 + shuffles) if shuffles else np.nan,
            edge_share(one.mean),
        )
        for one in found
    ]


def chance_suspicion(
    values: Values, classes: Names, shuffles: int = SHUFFLES, seed: int = 0
) -> NDArray[np.float64]:
    """For each shuffle of the classes, the suspicion of its most suspicious group, (shuffles,)."""
    rng = np.random.default_rng([seed, 1])
    names = np.array([name or "" for name in classes], object)
    if len(names) > MOST_TESTED:
        own = np.sort(rng.choice(len(names), MOST_TESTED, replace=False))
        values, names = values[own], names[own]
    parts = partition(values, seed=seed)
    return np.array(
        [most_suspicious(values, rng.permutation(names).tolist(), parts) for _ in range(shuffles)]
    )


def edge_share(mean: Values) -> float:
    """The share of a mean map (64,) that lies in the two outermost rings of its 8 x 8 cells.

    >>> edge_share(np.eye(64, dtype=np.float32)[63]), edge_share(np.ones(64, np.float32))
    (1.0, 0.75)
    """
    grid = np.asarray(mean, np.float64).reshape(SIDE, SIDE)
    total = grid.sum()
    inside = grid[2:-2, 2:-2].sum()
    return float(1 - inside / total) if total > 0 else 0.0
