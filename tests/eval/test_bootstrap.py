"""Bootstrap intervals: coverage, determinism, pairing, invalid images."""

import math

import numpy as np
import pytest

from xattn.eval import bootstrap
from xattn.eval.bootstrap import mean_interval, mean_intervals, paired_difference


def test_95_percent_intervals_cover_the_mean_about_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        _, lo, hi, _ = mean_interval(rng.exponential(1.0, 60), n_resamples=500, seed=trial)
        hits += lo <= 1.0 <= hi
    assert 175 <= hits <= 198


def test_width_matches_the_standard_error():
    values = np.random.default_rng(1).normal(3, 2, 400)
    mean, lo, hi, n = mean_interval(values)
    assert n == 400 and mean == pytest.approx(values.mean(), abs=1e-12)
    assert (hi - lo) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.05)


def test_same_seed_same_interval_and_columns_share_the_draws():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=50), rng.normal(size=50)
    assert mean_interval(a, seed=5) == mean_interval(a, seed=5)
    assert mean_interval(a, seed=5) != mean_interval(a, seed=6)
    both = mean_intervals(np.stack([a, b], 1), seed=5)
    np.testing.assert_allclose(both[0], mean_interval(a, seed=5), rtol=1e-12)
    np.testing.assert_allclose(both[1], mean_interval(b, seed=5), rtol=1e-12)


def test_blocks_do_not_change_the_draws(monkeypatch):
    values = np.random.default_rng(3).normal(size=30)
    whole = mean_interval(values, n_resamples=1000)
    monkeypatch.setattr(bootstrap, "_BLOCK_ELEMENTS", 30 * 7)
    np.testing.assert_allclose(mean_interval(values, n_resamples=1000), whole, rtol=1e-12)


def test_pairing_sees_a_small_constant_shift_and_is_antisymmetric():
    rng = np.random.default_rng(4)
    hard = rng.normal(50, 20, 80)
    a, b = hard + rng.normal(1, 0.5, 80), hard
    diff, lo, hi, n = paired_difference(a, b)
    assert 0.8 < lo < diff < hi < 1.2 and n == 80
    np.testing.assert_allclose(paired_difference(b, a)[:3], (-diff, -hi, -lo), rtol=1e-9)
    assert paired_difference(a, a)[:3] == (0, 0, 0)


def test_invalid_images_drop_out():
    values = np.array([1.0, math.nan, 3.0, math.nan])
    mean, lo, hi, n = mean_interval(values)
    assert (mean, lo, hi, n) == (2, 1, 3, 2)
    assert paired_difference(values, [math.nan, 1, 1, 1])[::3] == (2, 1)
    assert mean_interval([5.0])[:3] == (5, 5, 5)
    for empty in ([], [math.nan]):
        assert all(math.isnan(v) for v in mean_interval(empty)[:3])


def test_the_mean_does_not_depend_on_the_order():
    values = np.random.default_rng(5).normal(size=1000) * 10.0 ** np.arange(-8, 8).repeat(63)[:1000]
    assert bootstrap.mean(values) == bootstrap.mean(values[::-1]) == bootstrap.mean(sorted(values))


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_intervals([1.0]),
        lambda: mean_interval([1.0], level=1.0),
        lambda: paired_difference([1.0], [1.0, 2.0]),
    ],
)
def test_wrong_arguments_are_named(call):
    with pytest.raises(ValueError, match="got"):
        call()
