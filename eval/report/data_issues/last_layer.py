"""Fits a new last layer on a network's features by multinomial logistic regression, with cross-validation.

    minimise  sum_x w(x) (-log softmax(W f(x) + b)_label) / sum_x w(x) + penalty |W|^2 / 2

f(x) are the features (d,), standardised with the mean and standard deviation of the training photos. If a
network relies on a shortcut, its features usually describe the object as well, and only the last layer
prefers the shortcut. Training this layer with weights w that have the same sum for each group of photos can
correct this (deep feature reweighting, Kirichenko et al., arXiv 2204.02937). All results are computed on
photos on which the layer was not trained.
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
    """A linear classifier with ``weight`` (K, d) and ``bias`` (K,), for features that are standardised with
    ``mean`` and ``std`` (d,)."""

    weight: Values
    bias: Values
    mean: Values
    std: Values

    def probabilities(self, features: NDArray[np.floating]) -> Values:
        """Features (n, d) -> probabilities (n, K)."""
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
    """Fit a last layer with L-BFGS.

    Args:
        features: (n, d), finite.
        labels: (n,) in 0..classes-1.
        classes: the number of classes.
        weights: (n,), the weights of the photos; by default, all weights are equal.
        penalty: the factor of |W|^2 / 2, see the module.

    Raises:
        ValueError: there is no photo, or ``penalty`` is negative.
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
    """The fold of each photo, (n,) in 0..folds-1. The photos with the same label are spread evenly over the
    folds.

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
    """Probabilities (n, K) of each photo, computed by a layer that was fitted on the photos of all other
    folds.

    Args:
        fold: (n,), the fold of each photo; by default, the result of :func:`folds_of`. Photos of the same
            person or video, and duplicates, should be in the same fold.

    For the other arguments, see :func:`fit`.
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
    """The accuracy on a group of photos before and after retraining; ``gain`` is after minus before,
    paired.
    """

    group: int
    photos: int
    before: Interval
    after: Interval
    gain: Interval


@dataclass(frozen=True)
class RetrainResult:
    """The effect of retraining the last layer with equal weight for each group.

    Attributes:
        groups: one row per group, ordered by the accuracy before, lowest first.
        predicted: (n,), the classes predicted afterwards, each by a layer that was not trained on the
            photo.
        mean: the accuracy on all photos, as a row with the group number -1.
    """

    groups: list[GroupRow]
    predicted: Numbers
    mean: GroupRow

    @property
    def worst(self) -> tuple[float, float]:
        """The lowest accuracy of any group, before and after; these can be two different groups."""
        return (
            min(row.before.mean for row in self.groups),
            min(row.after.mean for row in self.groups),
        )


def balancing_weights(groups: NDArray[np.integer]) -> Values:
    """Weights (n,) whose sum is the same for all groups and whose mean is 1.

    >>> balancing_weights(np.array([0, 0, 0, 0, 1, 1])).tolist()
    [0.75, 0.75, 0.75, 0.75, 1.5, 1.5]
    """
    each, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return np.asarray(len(groups) / (len(each) * sizes)[inverse], np.float64)


def split_by(labels: NDArray[np.integer], inside: NDArray[np.bool_]) -> Numbers:
    """Groups (n,) for :func:`retrain`: 2 * label + 1 for photos that are ``inside`` a set, else 2 * label.

    If fewer than ``FOLDS`` photos of a class are inside, or fewer than ``FOLDS`` are outside, the class is
    not split, and all its photos have the group 2 * label.

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
    """Retrain the last layer with equal total weight for every group, and compare it with the earlier one.

    Args:
        features: (n, d), the network's features.
        labels: (n,), the true classes, counted from 0.
        groups: (n,), group numbers. For example, the photos of a class with and without a watermark can be
            two groups, see :func:`split_by`.
        before: (n,), the predictions to compare with. By default, a last layer is fitted on the same folds
            without weights, and its predictions are used.

    Raises:
        ValueError: a group has fewer photos than there are folds, so it cannot be tested.
    """
    given, parts = np.asarray(labels, np.int64), np.asarray(groups, np.int64)
    numbers, sizes = np.unique(parts, return_counts=True)
    if not len(sizes) or sizes.min() < FOLDS:
        raise ValueError(
            f"groups: the smallest group has {sizes.min() if len(sizes) else 0} photos; give at least "
            f"{FOLDS}"
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
