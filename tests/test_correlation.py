"""Rank correlation and the disagreement of maps of different sizes."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from xattn.correlation import GRID, disagreement, pearson, spearman


def maps(n, shape=(GRID, GRID), seed=0):
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [9, 50])
def test_pearson_is_numpys_and_nan_for_a_constant(n, dtype):
    a, b = torch.randn(2, n, generator=torch.Generator().manual_seed(0), dtype=dtype).unbind()
    assert float(pearson(a[None], b[None])) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert np.isnan(float(pearson(a[None], torch.ones(1, n, dtype=dtype))))


def test_spearman_is_scipys_with_ties():
    a = np.round(maps(1)[0].ravel(), 1)
    b = np.round(a + maps(1, seed=1)[0].ravel(), 1)
    found = spearman(torch.tensor(a)[None], torch.tensor(b)[None]).item()
    assert found == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_disagreement_is_one_minus_the_mean_over_pairs():
    a, b, c = maps(3)
    pairs = [spearmanr(x.ravel(), y.ravel()).statistic for x, y in ((a, b), (a, c), (b, c))]
    assert disagreement([a, b, c]) == pytest.approx(1 - np.mean(pairs), abs=1e-12)


def test_equal_orders_agree_and_reversed_ones_do_not():
    a = maps(1)[0]
    assert disagreement([a, np.exp(a)]) == pytest.approx(0, abs=1e-12)
    assert disagreement([a, -a]) == pytest.approx(2, abs=1e-12)


@pytest.mark.parametrize("factor", [2, 8])
def test_a_finer_copy_of_a_map_agrees_with_it(factor):
    a = maps(1)[0]
    assert disagreement([a, np.kron(a, np.ones((factor, factor)))]) == pytest.approx(0, abs=1e-9)


def test_rows_and_columns_are_not_mixed_up():
    slope = np.linspace(0, 1, 14)[:, None] + np.zeros((14, 63))
    fine = np.linspace(0, 1, 111)[:, None] + np.zeros((111, 9))
    assert disagreement([slope, fine]) < 0.01
    assert disagreement([slope, fine.T]) == pytest.approx(1, abs=0.01)


def test_constant_maps_have_no_order():
    a, b = maps(2)
    flat = np.ones((7, 7))
    assert math.isnan(disagreement([])) and math.isnan(disagreement([a]))
    assert math.isnan(disagreement([a, flat]))
    assert disagreement([a, flat, b]) == disagreement([a, b])
