"""Groups photos on which a network looks at the same place, and sorts the groups by suspicion.

The directions of the pooled maps (:mod:`~xattn.eval.report.photo_map.pooled_maps`) are grouped by spherical
k-means. A shortcut, such as a watermark in a corner, produces a tight group of photos of one class on which
the network looks at a place that it ignores on the other photos of this class:

    suspicion = tightness * apart * share,    apart = max over cells c of mean_c * passed_c

tightness is the length of the mean direction, share is the fraction of the group that has the most common
class, and mean_c is the mean of the group's maps at cell c. passed_c is the fraction of the other photos of
this class on which the network does not look at cell c: their maps are below half of mean_c there and at
the eight neighbouring cells, so an object that is one cell further away is not regarded as different. Since
all photos of a class may have the watermark, the same fraction is also computed for the photos of other
classes. If half of this second fraction is larger than the first, this half is used as passed_c. Groups of
one class that differ at the same cell are merged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from xattn.eval.bootstrap import Interval
from xattn.eval.report.mistakes import accuracy
from xattn.eval.report.photo_map.pooled_maps import SIDE, Values, describe_place, standardise_rows

FEWEST = 3  # smallest size of a group, and of the rest of a class with which it is compared
STEPS = 50  # largest number of steps of k-means
PHOTOS, MOST = 10, 40  # photos per group at the start, and the largest number of groups
# Smallest "apart" for merging groups, and for naming them by where they differ.
JOINED, NAMED = 0.1, 0.2

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Cluster:
    """A group of photos.

    Attributes:
        rows: the indices of its maps, most typical first.
        mean: (64,), the mean of its maps.
        place: the place where the network looks, in words. If the group clearly differs from other photos,
            this is the place where the group differs.
        class_name: the most common predicted class; "" if it is unknown.
        share: the fraction of the group, in (0, 1], that has this class.
        accuracy: the accuracy on those photos of the group whose true class is known.
        tightness, apart, suspicion: numbers in [0, 1], see the module.
    """

    rows: Rows
    mean: Values
    place: str
    class_name: str
    share: float
    accuracy: Interval
    tightness: float
    apart: float
    suspicion: float


class _Group(NamedTuple):
    rows: Rows
    class_name: str
    share: float
    apart: Values  # (64,) by cell


def clusters(
    values: Values,
    classes: Sequence[str | None],
    right: Sequence[bool | None],
    count: int | None = None,
    seed: int = 0,
) -> list[Cluster]:
    """Group photos by their pooled maps, most suspicious group first; constant maps are in no group.

    Args:
        values: (n, 64), pooled maps.
        classes: the predicted class of each photo.
        right: whether each prediction is correct, or None if this is unknown.
        count: the number of groups at the start; by default one per ten photos, but at least 2 and at most
            40.

    Raises:
        ValueError: ``count`` is below 1.
    """
    usable, group = partition(values, count, seed)
    photos, groups = _grouped(values, classes, usable, group)
    found = [photos.cluster(g, right) for g in _joined(groups, photos) if len(g.rows) >= FEWEST]
    return sorted(found, key=lambda one: -one.suspicion)


def partition(values: Values, count: int | None = None, seed: int = 0) -> tuple[Rows, Rows]:
    """Group maps by where they look, without regard to classes.

    Returns:
        The indices of the maps that are not constant, and the group number of each of them. Both are empty
        unless at least three maps vary.

    For the arguments, see :func:`clusters`.
    """
    if count is not None and count < 1:
        raise ValueError(f"count: got {count}; give 1 or more groups")
    toward = standardise_rows(values)
    usable = np.flatnonzero(np.any(toward != 0, axis=1))
    if len(usable) < FEWEST:
        return usable[:0], usable[:0]
    start = count or min(max(len(usable) // PHOTOS, 2), MOST)
    return usable, k_means(toward[usable], start, seed)


def most_suspicious(
    values: Values, classes: Sequence[str | None], parts: tuple[Rows, Rows]
) -> float:
    """The highest suspicion of any group of a :func:`partition` for the given classes; 0 without a group.

    If the classes are shuffled, this shows how suspicious a group can be by chance.
    """
    photos, groups = _grouped(values, classes, *parts)
    joined = (g for g in _joined(groups, photos) if len(g.rows) >= FEWEST)
    return max(map(photos.suspicion, joined), default=0.0)


def _grouped(
    values: Values, classes: Sequence[str | None], usable: Rows, group: Rows
) -> tuple[_Photos, list[_Group]]:
    names = np.array([name or "" for name in classes], object)
    photos = _Photos(values, standardise_rows(values), usable, names)
    return photos, [photos.group(usable[group == number]) for number in np.unique(group)]


class _Photos:
    """All photos, and methods that compare a group of photos with the others."""

    def __init__(
        self, values: Values, toward: Values, usable: Rows, names: NDArray[np.object_]
    ) -> None:
        self.values, self.toward, self.usable, self.names = values, toward, usable, names
        grid = torch.from_numpy(values).reshape(-1, 1, SIDE, SIDE)
        self.around = F.max_pool2d(grid, 3, 1, 1).reshape(len(values), -1).numpy()

    def group(self, rows: Rows) -> _Group:
        """A group of photos, and how much it differs from the others at each cell."""
        name, most = Counter(sorted(self.names[rows])).most_common(1)[0]
        mean = self.values[rows].mean(0)
        others = np.setdiff1d(self.usable, rows)
        same = self.names[others] == name
        passed = 0.5 * self._passed(others[~same], mean)
        if same.sum() >= FEWEST:
            passed = np.maximum(passed, self._passed(others[same], mean))
        return _Group(rows, name, most / len(rows), mean * passed)

    def _passed(self, others: Rows, mean: Values) -> Values:
        """For each cell, the fraction of ``others`` on which the network does not look at it, (64,)."""
        if not len(others):
            return np.zeros_like(mean)
        return np.asarray((self.around[others] < mean / 2).mean(0), np.float32)

    def cluster(self, group: _Group, right: Sequence[bool | None]) -> Cluster:
        """The description of a group."""
        rows, apart = group.rows, float(group.apart.max())
        mean, middle = self.values[rows].mean(0), self.toward[rows].mean(0)
        order = np.argsort(-(self.toward[rows] @ middle), kind="stable")
        known = [float(bool(right[i])) for i in rows if right[i] is not None]
        return Cluster(
            rows=rows[order],
            mean=mean,
            place=describe_place(group.apart if apart >= NAMED else mean),
            class_name=group.class_name,
            share=group.share,
            accuracy=accuracy(np.array(known)),
            tightness=float(np.linalg.norm(middle)),
            apart=apart,
            suspicion=self.suspicion(group),
        )

    def suspicion(self, group: _Group) -> float:
        tightness = float(np.linalg.norm(self.toward[group.rows].mean(0)))
        return tightness * float(group.apart.max()) * group.share


def _joined(groups: list[_Group], photos: _Photos) -> list[_Group]:
    """Merge groups of the same class that differ from the others at the same or at neighbouring cells."""
    done: list[_Group] = []
    for group in sorted(groups, key=lambda one: -float(one.apart.max())):
        partner = next((i for i, one in enumerate(done) if _same_place(one, group)), None)
        if partner is None:
            done.append(group)
        else:
            done[partner] = photos.group(np.sort(np.r_[done[partner].rows, group.rows]))
    return done


def _same_place(one: _Group, two: _Group) -> bool:
    if one.class_name != two.class_name or min(one.apart.max(), two.apart.max()) < JOINED:
        return False
    cells = [divmod(int(group.apart.argmax()), SIDE) for group in (one, two)]
    return max(abs(a - b) for a, b in zip(*cells, strict=True)) <= 1


def k_means(toward: Values, count: int, seed: int = 0, tries: int = 4) -> NDArray[np.int64]:
    """Spherical k-means with k-means++ starts.

    Args:
        toward: (n, d), rows of length 1.
        count: the largest number of groups.
        tries: the number of starts; the best result is returned.

    Returns:
        (n,), the group number of each row; groups are numbered from 0 without gaps.
    """
    best, found = -np.inf, np.zeros(len(toward), np.int64)
    for start in range(tries):
        rng = np.random.default_rng([seed, start])
        centroids = toward[_spread(toward, count, rng)]
        group = np.full(len(toward), -1)
        for _ in range(STEPS):
            now = (toward @ centroids.T).argmax(1)
            if np.array_equal(now, group):
                break
            group = now
            centroids = _centroids(toward, group, len(centroids), centroids)
        likeness = float((toward * centroids[group]).sum())
        if likeness > best:
            best, found = likeness, group
    return np.unique(found, return_inverse=True)[1].reshape(-1)


def _spread(toward: Values, count: int, rng: np.random.Generator) -> list[int]:
    """The rows to start from. The probability of a row grows with its distance from those drawn earlier
    (k-means++)."""
    chosen = [int(rng.integers(len(toward)))]
    away = np.clip(1 - toward @ toward[chosen[0]], 0, None)
    while len(chosen) < count and away.sum() > 1e-6:
        chosen.append(int(rng.choice(len(toward), p=away / away.sum())))
        away = np.minimum(away, np.clip(1 - toward @ toward[chosen[-1]], 0, None))
    return chosen


def _centroids(toward: Values, group: Rows, count: int, before: Values) -> Values:
    """The mean direction of each group, (count, d), with length 1; for an empty group, the one in
    ``before``."""
    sums = (np.arange(count)[:, None] == group).astype(np.float32) @ toward
    length = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.divide(sums, length, out=before.copy(), where=length > 1e-6)
