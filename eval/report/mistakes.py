"""Describes a classifier's mistakes in a pack: confusion matrix, figures per class and slice, and mean
maps.

Only photos whose true class and prediction are both known are used. Accuracy has Wilson's 95 % interval,
which is also valid for few photos; everything else has a bootstrap interval over photos. A calibration
error is not informative for few photos. Therefore, only slices have an expected calibration error (arXiv
1706.04599), while classes have the difference between their mean confidence and their accuracy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from xattn.correlation import GRID, to_grid
from xattn.eval.bootstrap import Interval, mean_interval, mean_intervals, paired_difference
from xattn.packs.reader import Pack

if TYPE_CHECKING:
    import pandas as pd

OTHERS = "other classes"
MOST_CLASSES, MOST_MAPS, BINS = 10, 200, 15


@dataclass(frozen=True)
class Confusion:
    """How often photos of one class (row) are predicted as another class (column).

    Attributes:
        classes: (number, name) of the classes with the most photos. All other classes are merged into the
            last entry, (None, ``OTHERS``).
        counts: (C, C), numbers of photos. The cell of "other classes" with itself contains both right and
            wrong predictions.
        photos: the ids of the photos in each cell.
        unknown: number of photos whose true class or prediction is unknown.
    """

    classes: tuple[tuple[int | None, str], ...]
    counts: NDArray[np.int64]
    photos: Mapping[tuple[int, int], tuple[str, ...]]
    unknown: int


@dataclass(frozen=True)
class ClassRow:
    """The photos of one true class, and how well they are classified and explained.

    ``photos`` are their ids. ``overconfidence`` is the mean confidence minus the accuracy; if it is above
    0, the network is more confident than accurate. ``metrics`` maps each metric to its mean over the maps
    of these photos.
    """

    number: int
    name: str
    photos: tuple[str, ...]
    accuracy: Interval
    confidence: Interval
    overconfidence: Interval
    metrics: Mapping[str, Interval]


@dataclass(frozen=True)
class SliceRow:
    """A named set of photos, and how well they are classified and explained.

    ``photos`` is their number, and ``known`` the number of photos whose true class and prediction are
    known. ``accuracy`` and ``ece``, the expected calibration error, are computed only from these known
    photos.
    """

    name: str
    photos: int
    known: int
    accuracy: Interval
    ece: float
    metrics: Mapping[str, Interval]


def confusion(pack: Pack, most: int = MOST_CLASSES) -> Confusion:
    """The confusion matrix of a pack.

    Args:
        most: the number of classes with rows of their own. These are the classes that are the true or the
            predicted class of the most photos; ties are broken by the number of mistakes.

    Raises:
        ValueError: ``most`` is below 1.
    """
    if most < 1:
        raise ValueError(f"most: got {most}; give 1 or more classes")
    images = pack.images
    known = _known(images)
    pairs = [*zip(known["label"].astype(int), known["predicted"].astype(int), strict=True)]
    names = dict(zip(known["label"].astype(int), known["label_name"], strict=True))
    for number, name in zip(known["predicted"].astype(int), known["predicted_name"], strict=True):
        names.setdefault(number, name)
    count = Counter(number for pair in pairs for number in set(pair))
    wrong = Counter(number for pair in pairs if pair[0] != pair[1] for number in pair)
    ranked = sorted(count, key=lambda number: (-count[number], -wrong[number], number))
    classes: list[tuple[int | None, str]] = [(number, names[number]) for number in ranked[:most]]
    if len(ranked) > most:
        classes.append((None, OTHERS))
    place = {number: i for i, number in enumerate(ranked[:most])}
    counts = np.zeros((len(classes), len(classes)), np.int64)
    photos: dict[tuple[int, int], list[str]] = {}
    for image_id, (true, predicted) in zip(known.index, pairs, strict=True):
        cell = place.get(true, most), place.get(predicted, most)
        counts[cell] += 1
        photos.setdefault(cell, []).append(str(image_id))
    cells = {cell: tuple(ids) for cell, ids in photos.items()}
    return Confusion(tuple(classes), counts, cells, len(images) - len(known))


def class_rows(pack: Pack, method: str | None = None) -> list[ClassRow]:
    """One row per true class, ordered by the number of photos, largest first, and then by accuracy, lowest
    first.

    Args:
        method: the method from whose maps the metrics are taken; by default, any method. For each photo,
            the map of the most probable class is used.
    """
    known = _known(pack.images)
    measured = _metrics(pack, method)
    rows = []
    for number, group in known.groupby("label", sort=True):
        right = group["right"].astype(float).to_numpy()
        confidence = group["confidence"].to_numpy()
        rows.append(
            ClassRow(
                int(number),
                str(group["label_name"].iloc[0]),
                tuple(map(str, group.index)),
                accuracy(right),
                mean_interval(confidence),
                paired_difference(confidence, right),
                _intervals(measured, group.index),
            )
        )
    return sorted(rows, key=lambda row: (-len(row.photos), row.accuracy.mean, row.number))


def slice_row(
    pack: Pack, name: str, photos: Collection[str], method: str | None = None
) -> SliceRow:
    """The row of the slice ``name``, which consists of the photos with the ids ``photos``.

    Raises:
        ValueError: the set is empty, or a photo is not in the pack.
    """
    images = pack.images
    if not photos:
        raise ValueError(f"photos: the slice {name!r} is empty; choose some photos")
    strangers = [photo for photo in photos if photo not in images.index]
    if strangers:
        raise ValueError(
            f"photos: {strangers[0]!r} in the slice {name!r} is not in this pack; save the slice again"
        )
    own = images.loc[list(dict.fromkeys(photos))]
    known = _known(own)
    right = known["right"].astype(float).to_numpy()
    ece = calibration_error(known["confidence"].to_numpy(), right)
    metrics = _intervals(_metrics(pack, method), own.index)
    return SliceRow(name, len(own), len(known), accuracy(right), ece, metrics)


def accuracy(right: NDArray[np.float64]) -> Interval:
    """The share of ones among n zeros and ones, with Wilson's interval; NaN if n is 0.

    >>> accuracy(np.array([1.0])).text(2)
    '1.00 [0.21, 1.00]'
    """
    from scipy.stats import binomtest

    n = len(right)
    if not n:
        return Interval(math.nan, math.nan, math.nan, 0)
    lo, hi = binomtest(int(right.sum()), n).proportion_ci(method="wilson")
    return Interval(float(right.mean()), float(lo), float(hi), n)


def calibration_error(confidence: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """The expected calibration error in [0, 1]; NaN if there is no photo.

    This is the mean of |accuracy - confidence| over 15 bins of equal width, weighted by the numbers of
    photos in the bins.

    >>> calibration_error(np.array([1.0, 1.0]), np.array([1.0, 0.0]))
    0.5
    """
    from torchmetrics.functional.classification import binary_calibration_error

    if not len(right):
        return math.nan
    given = torch.tensor(confidence), torch.tensor(right)  # copies, since pandas owns the arrays
    return float(binary_calibration_error(*given, n_bins=BINS, norm="l1"))


def mean_map(pack: Pack, entry_ids: Iterable[str], most: int = MOST_MAPS) -> NDArray[np.float64]:
    """The mean (28, 28) of the first ``most`` maps, each of which is scaled to [0, 1] first.

    Raises:
        ValueError: there is no map.
    """
    grids = []
    for entry_id in list(entry_ids)[:most]:
        grids.append(to_grid(pack.explanation(entry_id).normalized()).numpy())
    if not grids:
        raise ValueError("entry_ids: got none; give the ids of some maps")
    return np.mean(grids, axis=0).reshape(GRID, GRID)


def _known(images: pd.DataFrame) -> pd.DataFrame:
    """The photos whose true class and prediction are known, with the names of both classes."""
    known = images[images["right"].notna()].copy()
    for key in ("label", "predicted"):
        names = known[f"{key}_name"]
        known[f"{key}_name"] = names.where(names.notna(), "class " + known[key].astype(str))
    return known


def _metrics(pack: Pack, method: str | None) -> pd.DataFrame:
    """The metrics of one map per photo, which is the method's map of the most probable class."""
    entries = pack.entries
    own = entries if method is None else entries[entries["method"] == method]
    first = own.sort_values("probability", ascending=False, kind="stable")
    keys = [m.key for m in pack.metrics]
    return first.drop_duplicates("image_id").set_index("image_id")[keys]


def _intervals(measured: pd.DataFrame, photos: Sequence[str] | pd.Index) -> dict[str, Interval]:
    """The mean of each metric over the ``photos`` that have a value."""
    own = measured.reindex(photos)
    found = zip(own, mean_intervals(own.to_numpy(float)), strict=True)
    return {key: interval for key, interval in found if interval.n}
