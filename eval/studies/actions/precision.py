"""Temporal average precision: segments found in time against segments that are there.

    tIoU(a, b) = |a n b| / |a u b|,     AP = sum_i (recall_i - recall_(i - 1)) max_(j >= i) precision_j

A segment found is right if its tIoU with one of its class that is there, and not yet taken by a segment of
higher score, is at least the threshold; of several it takes the one with the largest tIoU. The mean is over
the classes that are there. As in the evaluation of ActivityNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xattn.eval.studies.actions.sequences import Action


class Found(NamedTuple):
    """Frames ``start`` to ``end``, the class, and how sure the detector is."""

    start: float
    end: float
    kind: int
    score: float


class Matches(NamedTuple):
    """One row for each segment found, best first: the sequence, its class, whether it is right; and how
    many of each class are there in each sequence, (n, K)."""

    sequence: NDArray[np.int64]
    kind: NDArray[np.int64]
    right: NDArray[np.bool_]
    there: NDArray[np.int64]


def tiou(a: Action | Found, b: Action | Found) -> float:
    """Shared time over time in either."""
    shared = min(a.end, b.end) - max(a.start, b.start)
    return max(shared, 0.0) / (max(a.end, b.end) - min(a.start, b.start)) if shared > 0 else 0.0


def match(
    found: Sequence[Sequence[Found]],
    there: Sequence[Sequence[Action]],
    classes: int,
    threshold: float = 0.5,
) -> Matches:
    """Segments found in each sequence, best first, against those that are there.

    Raises:
        ValueError: not as many sequences in both, or a threshold outside (0, 1].
    """
    if len(found) != len(there):
        raise ValueError(f"found: got {len(found)} sequences; give {len(there)}, as in there")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: got {threshold}; give a tIoU above 0, at most 1")
    rows, counts = [], np.zeros((len(there), classes), np.int64)
    for i, (some, truth) in enumerate(zip(found, there, strict=True)):
        np.add.at(counts[i], [action.kind for action in truth], 1)
        left = list(truth)
        for segment in sorted(some, key=lambda s: -s.score):
            same = [action for action in left if action.kind == segment.kind]
            best = max(same, key=lambda action: tiou(segment, action), default=None)
            right = best is not None and tiou(segment, best) >= threshold
            if best is not None and right:
                left.remove(best)
            rows.append((segment.score, i, segment.kind, right))
    rows.sort(key=lambda row: -row[0])
    columns = np.array([row[1:] for row in rows], np.int64).reshape(-1, 3).T
    return Matches(columns[0], columns[1], columns[2].astype(bool), counts)


def mean_average_precision(matches: Matches, weights: ArrayLike | None = None) -> float:
    """Mean of AP over the classes that are there; ``weights`` (n,) say how often each sequence counts,
    for resampling. NaN where nothing is there."""
    times = np.ones(len(matches.there)) if weights is None else np.asarray(weights, np.float64)
    values = []
    for kind, total in enumerate(times @ matches.there):
        rows = matches.kind == kind
        counted = times[matches.sequence[rows]]
        hits = np.cumsum(counted * matches.right[rows])
        precision = hits / np.maximum(np.cumsum(counted), 1e-12)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        if total > 0:
            values.append(float((np.diff(hits, prepend=0.0) * envelope).sum() / total))
    return float(np.mean(values)) if values else float("nan")
