"""Confident learning: against its definition in loops, and on labels that were swapped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from xattn.eval.report.data_issues.label_errors import find_label_errors, labelled_photos
from xattn.eval.report.data_issues.last_layer import held_out_probabilities


def noisy(seed=0, n=400, classes=4, share=0.05):
    """Features of classes that overlap a little, given labels, and which of them were swapped."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, n)
    features = 2.5 * rng.normal(size=(classes, 12))[true] + rng.normal(size=(n, 12))
    swapped = rng.permutation(n) < share * n
    return (
        features,
        np.where(swapped, (true + rng.integers(1, classes, n)) % classes, true),
        swapped,
    )


def area(score, positive):
    """The probability that a positive scores above a negative, ties counting half."""
    above = score[positive][:, None] - score[~positive][None]
    return float((above > 0).mean() + (above == 0).mean() / 2)


@pytest.mark.parametrize("seed, classes", [(0, 2), (1, 3), (2, 7)])
def test_thresholds_counts_and_joint_are_those_of_the_paper(seed, classes):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), 63)
    labels = rng.integers(0, classes, 63)
    found = find_label_errors(p, labels)
    t = [p[labels == j, j].mean() for j in range(classes)]
    counts = np.zeros((classes, classes))
    suspected = set()
    for x, (row, i) in enumerate(zip(p, labels, strict=True)):
        reached = [k for k in range(classes) if row[k] >= t[k]]
        if reached:
            j = max(reached, key=lambda k: row[k])
            counts[i, j] += 1
            if i != j:
                suspected.add(x)
    sizes = np.bincount(labels)
    joint = np.array([counts[i] / counts[i].sum() * sizes[i] for i in range(classes)])
    np.testing.assert_allclose(found.thresholds, t)
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_allclose(found.joint, joint / joint.sum())
    assert set(found.rows.tolist()) == suspected
    margin = [row[i] - np.delete(row, i).max() for row, i in zip(p, labels, strict=True)]
    np.testing.assert_allclose(found.score, margin)
    assert (np.diff(found.score[found.rows]) >= 0).all()
    own = find_label_errors(p, labels, "self_confidence").score
    np.testing.assert_array_equal(own, p[np.arange(63), labels])


def test_labels_that_agree_with_sure_predictions_are_not_suspected():
    labels = np.arange(30) % 3
    found = find_label_errors(np.eye(3)[labels], labels)
    assert not len(found.rows) and np.trace(found.joint) == 1


def test_swapped_labels_come_first_by_probabilities_of_photos_that_were_not_fitted():
    features, labels, swapped = noisy()
    found = find_label_errors(held_out_probabilities(features, labels, 4), labels)
    assert area(-found.score, swapped) > 0.97
    assert swapped[found.rows[: swapped.sum()]].mean() > 0.9
    assert 1 - np.trace(found.joint) == pytest.approx(0.05, abs=0.02)


def test_probabilities_that_know_nothing_find_nothing():
    rng = np.random.default_rng(3)
    _, labels, swapped = noisy()
    found = find_label_errors(rng.dirichlet(np.ones(4), len(labels)), labels)
    assert abs(area(-found.score, swapped) - 0.5) < 0.15


def test_a_class_without_photos_is_never_suggested():
    found = find_label_errors(np.array([[0.1, 0.2, 0.7], [0.2, 0.7, 0.1]]), np.array([0, 1]))
    assert np.isnan(found.thresholds[2]) and not found.counts[:, 2].any()


@pytest.mark.parametrize(
    "p, labels, ranking, names",
    [
        (np.ones((2, 3, 1)), np.zeros(2, int), "margin", "shape"),
        (np.ones((2, 3)), np.zeros(3, int), "margin", "shape"),
        (np.full((2, 3), 1.5), np.zeros(2, int), "margin", "not in"),
        (np.full((2, 3), np.nan), np.zeros(2, int), "margin", "not in"),
        (np.ones((2, 3)), np.array([0, 3]), "margin", "labels"),
        (np.ones((2, 3)), np.array([0.0, 1.0]), "margin", "labels"),
        (np.ones((2, 3)), np.zeros(2, int), "surprise", "ranking"),
    ],
)
def test_what_cannot_be_used_is_refused(p, labels, ranking, names):
    with pytest.raises(ValueError, match=names):
        find_label_errors(p, labels, ranking)


def test_a_pack_gives_what_it_stores_and_a_bound_for_other_labels(tmp_path):
    pytest.importorskip("pandas")
    from synthetic_packs import explanation

    from xattn.packs.explanation import ImageFacts
    from xattn.packs.reader import Pack
    from xattn.packs.writer import save_pack

    def photo(number, label, top):
        facts = ImageFacts(top, label, None if label is None else f"c{label}")
        one = explanation(number, target=top[0][0])
        return replace(one, facts=facts, probability=top[0][2])

    top = ((1, "c1", 0.5), (4, "c4", 0.3))
    made = [photo(0, 1, top), photo(1, 7, top), photo(2, None, top), photo(3, 9, top)]
    other = replace(made[3], target=9, target_name="c9", probability=0.01)
    save_pack(tmp_path / "pack", [*made, other], overlays=False)
    found = labelled_photos(Pack(tmp_path / "pack"))
    assert found.rows.tolist() == [0, 1, 3] and found.classes.tolist() == [1, 4, 7, 9]
    assert found.names == {1: "c1", 4: "c4", 7: "c7", 9: "c9"}
    assert found.labels.tolist() == [0, 2, 3]
    np.testing.assert_allclose(
        found.probabilities, [[0.5, 0.3, 0, 0], [0.5, 0.3, 0.2, 0], [0.5, 0.3, 0, 0.01]]
    )
