"""Finds photos whose label is probably wrong, by confident learning (Northcutt et al., arXiv 1911.00068).

    t_j = mean of p_j(x) over the photos x with label j
    C_ij = number of photos with label i whose j = argmax p_k(x) over the classes k with p_k(x) >= t_k
    Q_ij = C_ij n_i / sum_j C_ij, divided by its sum over all i and j

A photo that is counted off the diagonal of C is suspicious: of the classes that reach their mean
probability t_k, the most probable one is not the photo's label. Q estimates the joint distribution of given
and true labels. Photos are ranked by the normalised margin p_label(x) - max over k != label of p_k(x),
lowest first.

The network that computes the probabilities must not have been trained on these labels, since a network that
has memorised a wrong label does not contradict it. Use a network that was trained on other photos, or
cross-validation (:func:`~xattn.eval.report.data_issues.last_layer.held_out_probabilities`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

RANKINGS = ("margin", "self_confidence")

Values = NDArray[np.float64]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class LabelErrors:
    """The result of confident learning for n photos with labels from K classes.

    Attributes:
        rows: the indices of the suspicious photos, most suspicious first.
        suggested: (n,), the class j under which each photo is counted, or the photo's label if no class
            reaches its threshold.
        score: (n,), where lower is more suspicious: the margin in [-1, 1] (see the module) or, for the
            ranking "self_confidence", p_label(x) in [0, 1].
        thresholds: (K,), t_j; NaN for a class without photos.
        counts: (K, K), C, where rows are given labels.
        joint: (K, K), Q, which sums to 1.
    """

    rows: Numbers
    suggested: Numbers
    score: Values
    thresholds: Values
    counts: Numbers
    joint: Values


def find_label_errors(
    probabilities: NDArray[np.floating],
    labels: NDArray[np.integer],
    ranking: str = "margin",
) -> LabelErrors:
    """Find the photos whose label is probably wrong.

    Args:
        probabilities: (n, K) in [0, 1].
        labels: (n,) in 0..K-1.
        ranking: "margin" or "self_confidence".

    Raises:
        ValueError: the shapes do not match, a value is not a probability, a label is out of range, or the
            ranking is unknown.

    Example:
        >>> p = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.9, 0.1]])
        >>> find_label_errors(p, np.array([0, 0, 1, 1, 1])).rows
        array([4])
    """
    p, given = _checked(probabilities, labels, ranking)
    n, classes = p.shape
    photos = np.arange(n)
    own = p[photos, given]
    sizes = np.bincount(given, minlength=classes)
    thresholds = np.full(classes, np.nan)
    np.divide(np.bincount(given, own, minlength=classes), sizes, out=thresholds, where=sizes > 0)
    # The mean of equal probabilities can be rounded to a slightly larger number.
    reached = p >= np.nan_to_num(thresholds, nan=np.inf) - 1e-9
    confident = reached.any(1)
    suggested = np.where(confident, np.where(reached, p, -1.0).argmax(1), given)
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (given[confident], suggested[confident]), 1)
    others = p.copy()
    others[photos, given] = -np.inf
    margin = own - others.max(1) if classes > 1 else own
    score = margin if ranking == "margin" else own
    suspected = np.flatnonzero(suggested != given)
    rows = suspected[np.argsort(score[suspected], kind="stable")]
    return LabelErrors(rows, suggested, score, thresholds, counts, _joint(counts, sizes))


def _checked(
    probabilities: NDArray[np.floating], labels: NDArray[np.integer], ranking: str
) -> tuple[Values, Numbers]:
    p, given = np.asarray(probabilities, np.float64), np.asarray(labels)
    if p.ndim != 2 or not p.size or given.shape != p.shape[:1]:
        raise ValueError(
            f"probabilities: got shape {p.shape} with labels of shape {given.shape}; give (n, K) and (n,)"
        )
    if not (np.isfinite(p).all() and p.min() >= 0 and p.max() <= 1 + 1e-6):
        raise ValueError(
            "probabilities: some values are not in [0, 1]; give the network's probabilities"
        )
    if given.dtype.kind not in "iu" or given.min() < 0 or given.max() >= p.shape[1]:
        raise ValueError(
            f"labels: some are not integers from 0 to {p.shape[1] - 1}; give indices of classes"
        )
    if ranking not in RANKINGS:
        raise ValueError(f"ranking: got {ranking!r}; give one of {', '.join(RANKINGS)}")
    return p, given.astype(np.int64)


def _joint(counts: Numbers, sizes: Numbers) -> Values:
    """Q, which is C with each row scaled to the number of photos with this label, divided by the total."""
    total = counts.sum(1)
    scale = np.divide(sizes, total, out=np.zeros(len(sizes)), where=total > 0)
    # If no photo with a label is counted, all photos with this label are assumed to be labelled correctly.
    found = counts * scale[:, None] + np.diag(np.where(total > 0, 0, sizes))
    return np.asarray(found / found.sum(), np.float64)


@dataclass(frozen=True)
class LabelledPhotos:
    """The photos of a pack whose true class is known.

    Attributes:
        rows: (n,), the indices of the photos in the pack's ``image_ids``.
        classes: (K,), the pack's numbers of the classes, ascending.
        names: the class names by number.
        labels: (n,), indices into ``classes``.
        probabilities: (n, K); None if there is a photo for which the pack stores no probabilities.
    """

    rows: Numbers
    classes: Numbers
    names: dict[int, str]
    labels: Numbers
    probabilities: Values | None


def labelled_photos(pack: Pack, rows: NDArray[np.integer] | None = None) -> LabelledPhotos:
    """The labels and probabilities that are stored in a pack.

    A pack stores the probabilities of a photo's five most probable classes and of its explained classes.
    The probability of any other class is at most the smallest of the five, and at most 1 minus their sum.
    If the label is a class whose probability is not stored, the smaller of these two bounds is used as its
    probability; all other such classes get 0.

    Args:
        rows: the indices of the photos to read; by default, all photos are read.

    Raises:
        PackError: a file of the pack is damaged.
    """
    images = pack.images
    known = images["label"].notna().to_numpy()
    if rows is not None:
        known = known & np.isin(np.arange(len(images)), rows)
    rows = np.flatnonzero(known)
    numbers = images["label"].to_numpy()[rows].astype(np.int64)
    names = dict(zip(numbers.tolist(), images["label_name"].to_numpy()[rows], strict=True))
    tops = [pack.top(image_id) for image_id in images.index[rows]]
    for top in tops:
        for number, name, _ in top:
            names.setdefault(number, name)
    classes = np.array(sorted(names), np.int64)
    column = {number: i for i, number in enumerate(classes.tolist())}
    labels = np.array([column[number] for number in numbers.tolist()], np.int64)
    names = {number: name or f"class {number}" for number, name in names.items()}
    if not len(rows) or not all(tops):
        return LabelledPhotos(rows, classes, names, labels, None)
    explained = _explained(pack)
    p = np.zeros((len(rows), len(classes)))
    for i, (image_id, top) in enumerate(zip(images.index[rows], tops, strict=True)):
        stored = [value for _, _, value in top]
        p[i, labels[i]] = max(0.0, min(1 - sum(stored), *stored))
        for number, value in explained.get(image_id, {}).items():
            if number in column:
                p[i, column[number]] = value
        for number, _, value in top:
            p[i, column[number]] = value
    return LabelledPhotos(rows, classes, names, labels, np.clip(p, 0, 1))


def _explained(pack: Pack) -> dict[str, dict[int, float]]:
    """The probabilities of the explained classes of each photo, by photo and class."""
    found: dict[str, dict[int, float]] = {}
    entries = pack.entries
    own = entries[entries["probability"].notna() & ~entries["is_value"].astype(bool)]
    columns = (own[name] for name in ("image_id", "target", "probability"))
    for image_id, target, value in zip(*columns, strict=True):
        found.setdefault(image_id, {})[int(target)] = float(value)
    return found
