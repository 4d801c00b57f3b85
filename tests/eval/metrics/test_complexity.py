"""Gini index and entropy against their definitions and limit cases (heads.md 14)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xattn.eval.metrics import Column, Sample, create_metric, measure
from xattn.eval.metrics.complexity import entropy_values, gini_values

SEEDS = st.integers(0, 2**31)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_limit_cases_of_the_gini_index():
    uniform, one_hot = torch.full((1, 1, 7, 9), -0.3), torch.zeros(1, 1, 7, 9)
    one_hot[0, 0, 4, 2] = 5
    assert gini_values(uniform).item() == pytest.approx(0, abs=1e-12)
    assert gini_values(one_hot).item() == pytest.approx(62 / 63, abs=1e-12)


def test_limit_cases_of_the_entropy():
    uniform, one_hot = torch.full((1, 1, 7, 9), 0.3), torch.zeros(1, 1, 7, 9)
    one_hot[0, 0, 4, 2] = -5
    assert entropy_values(uniform).item() == pytest.approx(math.log(63), abs=1e-12)
    assert entropy_values(one_hot).item() == 0


@given(SEEDS)
@settings(max_examples=20)
def test_the_gini_index_is_half_the_relative_mean_difference(seed):
    maps = draw(2, 1, 3, 5, seed=seed)
    v = maps.double().abs().flatten(1)
    pairs = (v[:, :, None] - v[:, None, :]).abs().mean((1, 2))
    torch.testing.assert_close(gini_values(maps), pairs / (2 * v.mean(1)))


@given(SEEDS)
@settings(max_examples=20)
def test_the_entropy_is_that_of_the_normalised_magnitudes(seed):
    maps = draw(1, 1, 4, 6, seed=seed)
    p = np.abs(maps.double().numpy().ravel())
    p = p / p.sum()
    assert entropy_values(maps).item() == pytest.approx(-(p * np.log(p)).sum(), abs=1e-12)


@given(SEEDS, st.floats(1e-30, 1e30))
@settings(max_examples=20)
def test_neither_sign_nor_scale_nor_place_of_the_pixels_matters(seed, scale):
    maps = draw(1, 1, 5, 5, seed=seed)
    turned = maps.double().abs().flip(3).transpose(2, 3) * scale
    for values in (gini_values, entropy_values):
        torch.testing.assert_close(values(turned), values(maps))


@pytest.mark.parametrize("values", [gini_values, entropy_values])
def test_maps_of_zeros_or_with_nan_are_undefined_and_leave_the_others_alone(values):
    maps = draw(4, 1, 5, 6)
    maps[1], maps[2, 0, 0, 0], maps[3, 0, 1, 1] = 0, math.nan, math.inf
    got = values(maps)
    assert got[1:].isnan().all()
    torch.testing.assert_close(got[:1], values(maps[:1]), rtol=0, atol=0)


@pytest.mark.parametrize("values", [gini_values, entropy_values])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 5, 6), (2, 1, 0, 6)])
def test_other_shapes_are_refused(values, shape):
    with pytest.raises(ValueError, match="maps: got shape"):
        values(torch.ones(shape))


def test_the_probe_reads_the_raw_map_and_asks_for_no_pass():
    raw, grey = draw(1, 8, 8), draw(1, 8, 8, seed=1).abs()
    sample = Sample(image=torch.rand(3, 8, 8), grey=grey, raw=raw, target=0, score=0.5)
    generator = create_metric("complexity").measure(sample)
    with pytest.raises(StopIteration) as stop:
        next(generator)
    values = stop.value.value({})
    assert values[Column("Gini")] == gini_values(raw[None]).item()
    assert values[Column("entropy")] == entropy_values(raw[None]).item()
    assert set(values) == set(create_metric("complexity").columns)


def test_the_all_ones_mask_is_the_least_sparse_of_all():
    images = torch.rand(1, 3, 8, 8)
    options = {"max_forward_batch": 4, "is_mask": True}
    ones = torch.ones(1, 1, 2, 2)
    got = measure(create_metric("complexity"), lambda x: x.mean((2, 3)), images, ones, 0, **options)
    assert got[Column("Gini")].item() == pytest.approx(0, abs=1e-12)
    assert got[Column("entropy")].item() == pytest.approx(math.log(64), abs=1e-12)
