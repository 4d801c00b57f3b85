"""Finds the images on which methods differ most, either in a metric or in the rank order of their maps.

The difference on an image is the largest minus the smallest value for a metric, and 1 - mean rho for maps,
where rho is Spearman's rank correlation of two maps on 28 x 28 cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xattn.correlation import disagreement


class ImageDifference(NamedTuple):
    """The difference between methods on the image with the index ``position``."""

    position: int
    distance: float


def rank_by_metric(values: ArrayLike) -> list[ImageDifference]:
    """Rank n images, largest difference first, by the largest minus the smallest of the ``values`` (M, n)
    that M methods have on them. Images that lack a value are left out, and ties keep their order.

    >>> [image.position for image in rank_by_metric([[1.0, 2.0, np.nan], [1.5, 0.0, 3.0]])]
    [1, 0]

    Raises:
        ValueError: the methods do not all have one value per image.
    """
    found = np.array(values, dtype=np.float64)
    if found.ndim != 2:
        raise ValueError(f"values: got shape {found.shape}; give (methods, images)")
    found[:, ~np.isfinite(found).all(0)] = np.nan
    return _sorted(np.ptp(found, axis=0))


def rank_by_maps(groups: Iterable[Sequence[NDArray[np.float32]]]) -> list[ImageDifference]:
    """Rank images by 1 - mean rho, largest first; each group has the maps (h, w) of one image, of any
    sizes.

    Images with fewer than two maps that vary are left out.
    """
    return _sorted([disagreement(maps) for maps in groups])


def _sorted(distances: Sequence[float] | NDArray[np.float64]) -> list[ImageDifference]:
    found = [ImageDifference(i, float(d)) for i, d in enumerate(distances) if np.isfinite(d)]
    return sorted(found, key=lambda image: -image.distance)
