"""Fits a new last layer on a network's features: multinomial logistic regression, cross-validated.

    minimise  sum_x w(x) (-log softmax(W f(x) + b)_label) / sum_x w(x) + penalty |W|^2 / 2

f(x) are the features (d,), standardised by the photos that are fitted. Weights w that give each group of
photos the same total retrain a layer that relied on a shortcut (deep feature reweighting, Kirichenko et
al., arXiv 2204.02937): the features usually hold the object too, and only the last layer prefers the
shortcut.
All results are of photos that the layer did not see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from xattn.eval.bootstrap import Interval, paired_difference
from xattn.eval.report.mistakes import accuracy

FOLDS, PENALTY, STEPS = 5, 1e-2, 100

Values = NDArray[np.float64]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class LastLayer:
    """A linear classifier of standardised features: ``weight`` (K, d), ``bias`` (K,), ``mean`` and ``std``
    (d,)."""

    weight: Values
    bias: Values
    mean: Values
    std: Values

    def probabilities(self, features: NDArray[np.floating]) -> Values:
        """(n, d) features -> (n, K)."""
        logits = (np.asarray(features, np.float64) - self.mean) / self.std @ self.weight.T
        logits = logits + self.bias
        raised = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(raised / raised.sum(1, keepdims=True))


def fit(
    features: NDArray[np.floating],
    labels: NDArray[np.integer],
    classes: int,
    weights: NDArray[np.floating] | None = None,
    penalty: float = PENALTY,
) -> LastLayer:
    """Fit a last layer by L-BFGS.

    Args:
        features: (n, d), finite.
        labels: (n,) in 0..classes-1.
        weights: (n,) of the photos, by default equal.
        penalty: factor of half the squared length of the weight matrix.

    Raises:
        ValueError: there is no photo, or a negative penalty.
    """
    if not len(features):
        raise ValueError("features: got none; give the features of some photos")
    if penalty < 0:
        raise ValueError(f"penalty: got {penalty}; give 0 or more")
    given = np.asarray(features, np.float64)
    mean, std = given.mean(0), given.std(0)
    std = np.where(std > 1e-8, std, 1.0)
    x = torch.from_numpy((given - mean) / std)
    y = torch.from_numpy(np.asarray(labels, np.int64))
    share = np.ones(len(given)) if weights is None else np.asarray(weights, np.float64)
    w = torch.from_numpy(share / share.sum())
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    search = "strong_wolfe"
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn=search)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = F.cross_entropy(F.linear(x, weight, bias), y, reduction="none")
        loss = (w * losses).sum() + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return LastLayer(weight.detach().numpy(), bias.detach().numpy(), mean, std)


def folds_of(labels: NDArray[np.integer], folds: int = FOLDS, seed: int = 0) -> Numbers:
    """The fold (n,) of each photo, in 0..folds-1; every label is spread evenly over the folds.

    >>> folds_of(np.array([0, 0, 1, 1]), 2).reshape(2, 2).sum(1).tolist()
    [1, 1]
    """
    if folds < 2:
        raise ValueError(f"folds: got {folds}; give 2 or more")
    rng = np.random.default_rng(seed)
    found = np.empty(len(labels), np.int64)
    start = 0
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        found[own] = (start + np.arange(len(own))) % folds
        start += len(own)
    return found


def held_out_probabilities(
    features: NDArray[np.floating],
    labels: NDArray[np.integer],
    classes: int,
    weights: NDArray[np.floating] | None = None,
    fold: NDArray[np.integer] | None = None,
    penalty: float = PENALTY,
) -> Values:
    """Probabilities (n, K) of each photo by a layer fitted on the photos of all other folds.

    Args:
        fold: (n,) the fold of each photo, by default :func:`folds_of`. Photos of one person, video or group
            of duplicates belong into one fold.

    For the other arguments see :func:`fit`.
    """
    x = np.asarray(features, np.float64)
    given = np.asarray(labels)
    own = folds_of(given) if fold is None else np.asarray(fold)
    found = np.zeros((len(x), classes))
    for number in np.unique(own):
        out = own == number
        share = None if weights is None else np.asarray(weights)[~out]
        found[out] = fit(x[~out], given[~out], classes, share, penalty).probabilities(x[out])
    return found


@dataclass(frozen=True)
class GroupRow:
    """The accuracy of a group of photos before and after, and the paired difference, after minus before."""

    group: int
    photos: int
    before: Interval
    after: Interval
    gain: Interval


@dataclass(frozen=True)
class RetrainResult:
    """Groups before and after the last layer was retrained with equal weight for each group.

    Attributes:
        groups: the worst before comes first.
        predicted: (n,) predictions after, each by a layer that did not see the photo.
        mean: the accuracy on all photos, as a row of group -1.
    """

    groups: list[GroupRow]
    predicted: Numbers
    mean: GroupRow

    @property
    def worst(self) -> tuple[float, float]:
        """The worst group's accuracy before and after; these may be two groups."""
        return (
            min(row.before.mean for row in self.groups),
            min(row.after.mean for row in self.groups),
        )


def balancing_weights(groups: NDArray[np.integer]) -> Values:
    """Weights (n,), 1 on average, with which all groups count the same in sum.

    >>> balancing_weights(np.array([0, 0, 0, 0, 1, 1])).tolist()
    [0.75, 0.75, 0.75, 0.75, 1.5, 1.5]
    """
    each, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return np.asarray(len(groups) / (len(each) * sizes)[inverse], np.float64)


def split_by(labels: NDArray[np.integer], inside: NDArray[np.bool_]) -> Numbers:
    """Groups (n,) for :func:`retrain`: 2 label + 1 for photos ``inside`` (n,) a set, 2 label for others.

    Photos of a class of which fewer than ``FOLDS`` photos are inside, or outside, form one group, 2 label.

    >>> split_by(np.array([0] * 10 + [1] * 6), np.arange(16) % 2 == 0)
    array([1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 2, 2, 2, 2, 2, 2])
    """
    given, chosen = np.asarray(labels, np.int64), np.asarray(inside, bool)
    found = 2 * given + chosen
    for label in np.unique(given):
        own = given == label
        if min((own & chosen).sum(), (own & ~chosen).sum()) < FOLDS:
            found[own] = 2 * label
    return np.asarray(found, np.int64)


def retrain(
    features: NDArray[np.floating],
    labels: NDArray[np.integer],
    groups: NDArray[np.integer],
    before: NDArray[np.integer] | None = None,
    seed: int = 0,
) -> RetrainResult:
    """Retrain the last layer so that every group counts the same, and compare it with the one before.

    Args:
        features: (n, d) of the network. labels: (n,) the true classes, from 0.
        groups: (n,) numbers, such as the class times whether the photo has the mark.
        before: (n,) the predictions to compare with; by default those of a last layer fitted in the same
            way, on the same folds, without weights.

    Raises:
        ValueError: a group has fewer photos than there are folds, so that it cannot be tested.
    """
    given, parts = np.asarray(labels, np.int64), np.asarray(groups, np.int64)
    numbers, sizes = np.unique(parts, return_counts=True)
    if not len(sizes) or sizes.min() < FOLDS:
        raise ValueError(
            f"groups: the smallest has {sizes.min() if len(sizes) else 0} photos; give {FOLDS} or more"
        )
    count, fold = int(given.max()) + 1, folds_of(parts, seed=seed)
    if before is None:
        before = held_out_probabilities(features, given, count, fold=fold).argmax(1)
    after = held_out_probabilities(features, given, count, balancing_weights(parts), fold).argmax(1)
    rights = [np.asarray(p == given, np.float64) for p in (before, after)]

    def row(number: int, own: NDArray[np.bool_]) -> GroupRow:
        first, second = (right[own] for right in rights)
        gain = paired_difference(second, first)
        return GroupRow(number, int(own.sum()), accuracy(first), accuracy(second), gain)

    rows = [row(int(number), parts == number) for number in numbers]
    rows.sort(key=lambda one: (one.before.mean, one.group))
    return RetrainResult(rows, after, row(-1, np.ones(len(given), bool)))
