"""Rank sets: limit cases of the definition, and that all true ranks lie in them together."""

import numpy as np
import pytest

from xattn.eval.report.rank_sets import rank_sets, rank_sets_of_draws


def by_the_definition(values, level, resamples, seed):
    """Pair by pair, with the draws of the bootstrap; larger is better, no value is missing."""
    count, photos = values.shape
    drawn = np.random.default_rng(seed).integers(0, photos, (resamples, photos))
    ratios, apart = np.zeros(resamples), {}
    for m in range(count):
        for n in range(count):
            pair = values[m] - values[n]
            se = pair.std(ddof=1) / np.sqrt(photos)
            if m != n:
                apart[m, n] = pair.mean(), se
                ratios = np.maximum(ratios, np.abs(pair[drawn].mean(1) - pair.mean()) / se)
    c = np.quantile(ratios, level)
    better = {pair for pair, (d, se) in apart.items() if d > c * se}
    return [
        (1 + sum((n, m) in better for n in range(count)), count - sum((m, n) in better for n in range(count)))
        for m in range(count)
    ]  # fmt: skip


def noisy(goodness, photos=50, seed=0):
    rng = np.random.default_rng(seed)
    return np.array(goodness)[:, None] + rng.normal(size=(len(goodness), photos))


def test_sets_are_those_of_the_definition():
    values = noisy([0.0, 0.3, 0.8, 1.5, 1.6], seed=2)
    expected = by_the_definition(values, 0.95, 2000, 3)
    assert rank_sets(values, n_resamples=2000, seed=3) == expected
    assert len(set(expected)) > 2


def test_identical_methods_may_have_any_place():
    values = np.tile(noisy([0.0]), (4, 1))
    assert rank_sets(values) == [(1, 4)] * 4
    assert rank_sets(np.tile(np.full(50, 0.3), (3, 1))) == [(1, 3)] * 3


def test_a_constant_lead_is_a_place_of_its_own_and_lower_turns_the_order():
    values = np.stack([noisy([0.0])[0]] * 2)
    values[1] += 1
    assert rank_sets(values) == [(2, 2), (1, 1)]
    assert rank_sets(values, higher=False) == [(1, 1), (2, 2)]


def test_missing_values_do_not_count_and_a_gap_changes_nothing_else():
    values = noisy([0.0, 2.0, 4.0])
    whole = rank_sets(values)
    values[1, :5] = np.nan
    assert rank_sets(values) == whole == [(3, 3), (2, 2), (1, 1)]
    values[1] = np.nan
    assert rank_sets(values) == [(2, 3), (1, 3), (1, 2)]


def test_a_photo_takes_its_values_on_all_networks_along():
    values = noisy([0.0, 0.5, 1.0], photos=30, seed=1)
    twice = np.stack([values, values], 1)  # the same values on two networks tell nothing new
    assert rank_sets(twice) == rank_sets(values)
    more = np.concatenate([values] * 4, 1)  # as many new photos would
    assert rank_sets(more) == [(3, 3), (2, 2), (1, 1)] != rank_sets(values)


def test_all_true_ranks_lie_in_the_sets_together():
    goodness = [0.0, 0.2, 0.4, 0.6, 0.8]
    held = 0
    for seed in range(60):
        sets = rank_sets(noisy(goodness, 40, seed), n_resamples=500)
        held += all(lo <= 5 - m <= hi for m, (lo, hi) in enumerate(sets))
    assert held >= 52  # 57 expected


def test_sets_of_draws_hold_the_ranks_of_the_numbers():
    rng = np.random.default_rng(0)
    values = np.array([0.0, 5.0, 5.1])
    sets = rank_sets_of_draws(values, values + rng.normal(size=(500, 3)))
    assert sets == [(3, 3), (1, 2), (1, 2)]


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"values: got \(3,\); give \(methods, photos\)"):
        rank_sets([1.0, 2.0, 3.0])
