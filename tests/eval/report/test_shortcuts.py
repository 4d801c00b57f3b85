"""Groups that share a place: their p-value, on maps with and without a planted place."""

from __future__ import annotations

import numpy as np
import pytest

from xattn.eval.report.data_issues.shortcuts import chance_suspicion, edge_share, find_shortcuts

CLASSES = ("disc", "square", "bar")


def maps(seed, planted, n=90):
    """Maps with one bump near the middle, and classes; ``planted`` discs look at the top left corner."""
    rng = np.random.default_rng(seed)
    classes = np.array(CLASSES)[np.arange(n) % 3]
    middles = rng.normal(3.5, 0.8, (n, 2))
    middles[np.flatnonzero(classes == "disc")[:planted]] = 0.5
    y, x = np.mgrid[:8, :8]
    away = (y - middles[:, 0, None, None]) ** 2 + (x - middles[:, 1, None, None]) ** 2
    values = np.exp(-away / 3) + 0.05 * rng.random((n, 8, 8))
    return values.reshape(n, 64).astype(np.float32), classes.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_a_place_of_one_class_is_first_and_more_than_chance(seed):
    values, classes = maps(seed, planted=12)
    first, *others = find_shortcuts(values, classes, shuffles=59)
    assert first.group.place == "top left corner" and first.group.class_name == "disc"
    assert first.p == 1 / 60 and first.edge > 0.85
    assert sorted(first.group.rows.tolist()) == list(range(0, 36, 3))
    assert all(one.p > 0.05 for one in others)


def test_without_a_shortcut_few_data_sets_have_a_low_p():
    low = [find_shortcuts(*maps(seed, 0), shuffles=19)[0].p <= 0.05 for seed in range(12)]
    assert sum(low) <= 3


def test_a_place_that_all_classes_share_is_no_more_than_chance():
    values, classes = maps(0, planted=12)
    shuffled = np.random.default_rng(5).permutation(classes).tolist()
    assert find_shortcuts(values, shuffled, shuffles=39)[0].p > 0.05


def test_a_large_set_is_tested_on_a_sample(monkeypatch):
    monkeypatch.setattr("xattn.eval.report.data_issues.shortcuts.MOST_TESTED", 30)
    values, classes = maps(0, planted=12)
    assert chance_suspicion(values, classes, 5).shape == (5,)


def test_edges_limits_and_bad_arguments():
    ring = np.ones((8, 8), np.float32)
    ring[2:6, 2:6] = 0
    assert edge_share(ring.ravel()) == 1 and edge_share(np.zeros(64, np.float32)) == 0
    values, classes = maps(0, 0)
    assert find_shortcuts(values[:2], classes[:2]) == []
    assert find_shortcuts(np.ones((9, 64), np.float32), classes[:9]) == []
    assert all(np.isnan(one.p) for one in find_shortcuts(values, classes, shuffles=0))
    with pytest.raises(ValueError, match="shuffles"):
        find_shortcuts(values, classes, shuffles=-1)
