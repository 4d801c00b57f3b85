"""Finds the images on which two methods differ most, either in a metric or in the rank order of their maps.

The difference on image i is |a_i - b_i| for a metric, and 1 - rho_i for maps, where rho_i is Spearman's
rank correlation on 28 x 28 cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xattn.correlation import disagreement


class ImageDifference(NamedTuple):
    """The difference between two methods on one image.

    ``position`` is the index of the image. ``first`` and ``second`` are the values of the metric; they are
    NaN if maps are compared.
    """

    position: int
    first: float
    second: float
    distance: float


def rank_by_metric(a: ArrayLike, b: ArrayLike) -> list[ImageDifference]:
    """Images in descending order of |a - b|; images without both values are left out, and ties keep their
    order.

    >>> [image.position for image in rank_by_metric([1.0, 2.0, np.nan], [1.5, 0.0, 3.0])]
    [1, 0]

    Raises:
        ValueError: ``a`` and ``b`` do not have the same shape (n,).
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape or left.ndim != 1:
        raise ValueError(
            f"a, b: got shapes {left.shape} and {right.shape}; give two arrays of the same shape (n,)"
        )
    distance = np.abs(left - right)
    found = [
        ImageDifference(i, float(left[i]), float(right[i]), float(distance[i]))
        for i in np.flatnonzero(np.isfinite(distance)).tolist()
    ]
    return sorted(found, key=lambda image: -image.distance)


def rank_by_maps(pairs: Iterable[Sequence[NDArray[np.float32]]]) -> list[ImageDifference]:
    """Images in descending order of 1 - rho, given as pairs of maps (h, w), which may differ in size.

    Images with a constant map are left out.
    """
    distances = [disagreement(pair) for pair in pairs]
    found = [
        ImageDifference(i, np.nan, np.nan, d) for i, d in enumerate(distances) if np.isfinite(d)
    ]
    return sorted(found, key=lambda image: -image.distance)
