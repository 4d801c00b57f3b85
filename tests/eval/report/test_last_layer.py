"""The new last layer: against scikit-learn, held out, and a shortcut that balanced groups mend."""

from __future__ import annotations

import numpy as np
import pytest

from xattn.eval.report.data_issues.last_layer import (
    balancing_weights,
    fit,
    folds_of,
    held_out_probabilities,
    retrain,
)


def points(seed=0, n=150, classes=3, width=5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return rng.normal(size=(classes, width))[labels] + rng.normal(size=(n, width)), labels


@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_minimum_that_scikit_learn_finds(weighted):
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = points()
    w = np.random.default_rng(1).uniform(0.1, 2, len(x)) if weighted else np.ones(len(x))
    ours = fit(x, y, 3, w, penalty=0.01)
    scaled = (x - ours.mean) / ours.std
    theirs = linear.LogisticRegression(C=1 / (0.01 * w.sum()), tol=1e-10, max_iter=1000)
    theirs.fit(scaled, y, w)
    np.testing.assert_allclose(ours.probabilities(x), theirs.predict_proba(scaled), atol=2e-4)


def test_a_photo_is_judged_by_a_layer_that_did_not_see_it():
    x, y = points()
    fold = folds_of(y, 3)
    found = held_out_probabilities(x, y, 3, fold=fold)
    own = fold == 1
    np.testing.assert_allclose(found[own], fit(x[~own], y[~own], 3).probabilities(x[own]))
    changed = np.where(np.arange(len(x)) == np.flatnonzero(own)[0], (y + 1) % 3, y)
    np.testing.assert_allclose(held_out_probabilities(x, changed, 3, fold=fold)[own], found[own])


def test_folds_hold_equal_numbers_of_every_label():
    labels = np.repeat([0, 1, 2], [10, 5, 3])
    fold = folds_of(labels, 5)
    assert set(np.bincount(fold)) <= {3, 4}
    counts = [np.bincount(fold[labels == label], minlength=5) for label in range(3)]
    assert all(c.max() - c.min() <= 1 for c in counts)
    with pytest.raises(ValueError, match="folds"):
        folds_of(labels, 1)


def shortcut(seed, strength):
    """Features of which one column is the object, weak, and one is a mark, clear; the mark goes with the
    class in 95 % of photos if ``strength`` is 1, and with none if it is 0."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, 600)
    mark = np.where(rng.random(600) < 0.5 + 0.45 * strength, y, 1 - y)
    x = np.stack([2 * y + rng.normal(size=600), 6 * mark + rng.normal(size=600)], 1)
    return x, y, 2 * y + mark


@pytest.mark.parametrize("seed", range(3))
def test_equal_weight_for_each_group_raises_the_worst_groups_accuracy(seed):
    x, y, groups = shortcut(seed, 1)
    found = retrain(x, y, groups)
    before, after = found.worst
    assert after > before + 0.3
    assert found.groups[0].before.mean == before and found.groups[0].gain.lo > 0
    assert sum(row.photos for row in found.groups) == found.mean.photos == 600


def test_where_there_is_no_shortcut_nothing_changes():
    found = retrain(*shortcut(0, 0))
    assert abs(found.worst[1] - found.worst[0]) < 0.06
    assert abs(found.mean.gain.mean) < 0.03


def test_the_predictions_to_compare_with_can_be_given():
    x, y, groups = shortcut(0, 1)
    found = retrain(x, y, groups, before=y)
    assert found.worst[0] == 1 and found.mean.gain.mean < 0


def test_groups_have_equal_sums_and_bad_arguments_are_refused():
    weights = balancing_weights(np.array([0, 3, 3, 3, 7, 7]))
    assert np.allclose([weights[:1].sum(), weights[1:4].sum(), weights[4:].sum()], 2)
    x, y, _ = shortcut(0, 1)
    with pytest.raises(ValueError, match="groups"):
        retrain(x, y, np.arange(600) < 3)
    with pytest.raises(ValueError, match="features"):
        fit(x[:0], y[:0], 2)
    with pytest.raises(ValueError, match="penalty"):
        fit(x, y, 2, penalty=-1)
