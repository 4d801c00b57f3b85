"""Finds the images on which two methods differ most, by a metric or by the rank order of their maps.

by a metric: |a_i - b_i|,    by their maps: 1 - rho_i, Spearman's rank correlation on 28 x 28 cells
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xattn.correlation import disagreement


class ImageDifference(NamedTuple):
    """The two values of one image (NaN if maps are compared) and their difference; images are given by
    position."""

    position: int
    first: float
    second: float
    distance: float


def rank_by_metric(a: ArrayLike, b: ArrayLike) -> list[ImageDifference]:
    """Images in descending order of |a - b|, without those that lack a value; ties keep their order.

    >>> [image.position for image in rank_by_metric([1.0, 2.0, np.nan], [1.5, 0.0, 3.0])]
    [1, 0]

    Raises:
        ValueError: a method does not have one value per image.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape or left.ndim != 1:
        raise ValueError(f"a, b: got shapes {left.shape} and {right.shape}; give two of shape (n,)")
    distance = np.abs(left - right)
    found = [
        ImageDifference(i, float(left[i]), float(right[i]), float(distance[i]))
        for i in np.flatnonzero(np.isfinite(distance)).tolist()
    ]
    return sorted(found, key=lambda image: -image.distance)


def rank_by_maps(pairs: Iterable[Sequence[NDArray[np.float32]]]) -> list[ImageDifference]:
    """Images in descending order of 1 - rho of their two maps (h, w), which may differ in size; images
    with a constant map are left out."""
    distances = [disagreement(pair) for pair in pairs]
    found = [
        ImageDifference(i, np.nan, np.nan, d) for i, d in enumerate(distances) if np.isfinite(d)
    ]
    return sorted(found, key=lambda image: -image.distance)
