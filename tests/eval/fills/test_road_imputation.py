"""ROAD's imputation against its definition and a direct solver; the metric on known scores."""

import math
import warnings

import numpy as np
import pytest
import torch
from eval_fakes import impute_direct
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data
from torch.nn import functional as F

from xattn.eval.fills.imputation import impute
from xattn.eval.metrics import Column, measure
from xattn.eval.metrics.road import (
    LEVELS,
    RoadCombined,
    RoadLeRF,
    RoadMetric,
    RoadMoRF,
    removed_pixels,
    road_combined_values,
    road_values,
)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth_map(h, w, cells=5, seed=1):
    return F.interpolate(rand(1, 1, cells, cells, seed=seed), (h, w), mode="bilinear")


def holes(h, w, levels=LEVELS, scattered=False, seed=1):
    """(L, 1, H, W)"""
    grey = rand(1, 1, h, w, seed=seed) if scattered else smooth_map(h, w, seed=seed)
    return removed_pixels(grey, levels).transpose(0, 1)


# ---------------------------------------------------------------- the imputation


@pytest.mark.parametrize("scattered", [False, True])
def test_a_constant_image_stays_constant(scattered):
    image = torch.tensor([0.2, 0.5, 0.9])[:, None, None].expand(3, 21, 30)
    filled = impute(image[None], holes(21, 30, scattered=scattered), noise=0)
    assert torch.allclose(filled, image.expand_as(filled), atol=1e-6)


def test_a_hole_in_a_ramp_gets_the_ramp_back():
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 48), indexing="ij")
    image = torch.stack([y, x, (x + 2 * y) / 3])[None]
    removed = torch.zeros(1, 1, 64, 48, dtype=torch.bool)
    removed[..., 5:50, 3:40] = True
    damaged = torch.where(removed, torch.nan, image)
    assert (impute(damaged, removed, noise=0, tolerance=1e-4) - image).abs().max() < 1e-4


@pytest.mark.parametrize("size", [(2, 2), (2, 9), (3, 3), (7, 5), (33, 64), (50, 51), (97, 31)])
@pytest.mark.parametrize("scattered", [False, True])
def test_equals_the_direct_solver_at_odd_sizes(size, scattered):
    image, removed = rand(3, *size), holes(*size, (0.3, 0.6, 0.9), scattered)
    removed = removed & ~removed.flatten(1).all(1)[:, None, None, None]
    for dtype, tolerance, error in ((torch.float64, 1e-9, 1e-8), (torch.float32, 1e-3, 1e-3)):
        filled = impute(image[None].to(dtype), removed, noise=0, tolerance=tolerance)
        assert filled.dtype == dtype
        for mask, got in zip(removed, filled, strict=True):
            assert (got - impute_direct(image.to(dtype), mask)).abs().max() < error


def test_the_direct_solver_satisfies_the_definition():
    h, w = 6, 7
    image, removed = rand(3, h, w).double(), holes(h, w, (0.6,), scattered=True)[0]
    filled = impute_direct(image, removed)
    for r, c in removed[0].nonzero().tolist():
        total, weights = torch.zeros(3, dtype=torch.float64), 0.0
        for dr in (-1, 0, 1):
            for dc in (-1, 0, 1):
                if (dr, dc) != (0, 0) and 0 <= r + dr < h and 0 <= c + dc < w:
                    k = 1 / 12 if dr and dc else 1 / 6
                    total += k * filled[:, r + dr, c + dc]
                    weights += k
        assert torch.allclose(filled[:, r, c], total / weights, atol=1e-12)
    assert torch.equal(filled[:, ~removed[0]], image[:, ~removed[0]])


@settings(max_examples=25)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 2**31), st.floats(0.05, 0.95))
def test_any_mask_is_solved_and_stays_within_the_kept_values(h, w, seed, fraction):
    image, removed = rand(3, h, w, seed=seed).double(), rand(1, h, w, seed=seed + 1) < fraction
    assume(not bool(removed.all()))
    filled = impute(image[None], removed[None], noise=0, tolerance=1e-8)[0]
    assert torch.allclose(filled, impute_direct(image, removed), atol=1e-7)
    kept = image.masked_fill(removed, torch.nan).flatten(1).numpy()
    low, high = (torch.from_numpy(f(kept, 1)) for f in (np.nanmin, np.nanmax))
    assert (filled >= low[:, None, None] - 1e-7).all()
    assert (filled <= high[:, None, None] + 1e-7).all()


def test_two_runs_are_bit_identical_and_the_noise_is_a_function_of_the_seed():
    image, removed = rand(1, 3, 40, 40).requires_grad_(), holes(40, 40)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, two, other = (impute(image, removed, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, two)
    noise = (one - impute(image, removed, noise=0))[removed.expand_as(one)]
    assert noise.std() == pytest.approx(0.01, rel=0.1)
    kept = ~removed.expand_as(one)
    assert torch.equal(one[kept], other[kept]) and not torch.equal(one, other)
    assert torch.equal(one[kept], image.expand_as(one)[kept])


def test_a_batch_equals_a_loop():
    images = torch.cat([rand(3, 3, 45, 38), torch.full((1, 3, 45, 38), 0.5)])
    removed = torch.cat([holes(45, 38, (0.1, 0.9)), holes(45, 38, (0.5, 0.7), scattered=True)])
    batch = impute(images, removed)
    for n in range(4):
        alone = impute(images[n : n + 1], removed[n : n + 1])
        assert (batch[n] - alone[0]).abs().max() < 1e-5
    one = impute(images, removed[:1])
    assert (one[0] - batch[0]).abs().max() < 1e-5


def test_removed_values_are_not_read():
    image, removed = rand(1, 3, 20, 20), holes(20, 20, (0.5,))
    changed = torch.where(removed, torch.nan, image)
    assert torch.equal(impute(image, removed, seed=1), impute(changed, removed, seed=1))


def test_nothing_and_everything_removed_beside_an_ordinary_mask():
    image, ordinary = rand(1, 3, 18, 18), holes(18, 18, (0.5,))
    removed = torch.cat([torch.zeros_like(ordinary), torch.ones_like(ordinary), ordinary])
    filled = impute(image, removed, noise=0)
    assert torch.equal(filled[0], image[0])
    assert torch.allclose(filled[1], image[0].mean((1, 2), keepdim=True).expand(3, 18, 18))
    assert (filled[2] - impute(image, ordinary, noise=0)[0]).abs().max() < 1e-5
    for mask in removed[:2]:
        direct = impute_direct(image[0], mask)
        assert torch.allclose(direct, impute(image, mask[None], noise=0)[0])


@pytest.mark.parametrize("scattered", [False, True])
def test_few_iterations_suffice_at_any_fraction(scattered):
    """One that grows with the image, or with the hole, has wrong coarse operators."""
    removed = torch.cat([holes(130, 97, scattered=scattered), holes(130, 97, (0.99,), scattered)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        impute(rand(1, 3, 130, 97), removed, max_iterations=7)


def test_pixels_under_several_coarse_ones_do_not_slow_it_down():
    """With the plain diagonal in the coarse Jacobi steps five iterations are not enough."""
    removed = removed_pixels(smooth_map(24, 24, cells=7, seed=1)).transpose(0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        impute(rand(1, 3, 24, 24), removed, tolerance=1e-4, max_iterations=5)


def test_too_few_iterations_warn():
    image, removed = rand(1, 3, 60, 60), holes(60, 60, (0.9,))
    with pytest.warns(UserWarning, match="after 1 iterations"):
        impute(image, removed, max_iterations=1, tolerance=1e-6)


@pytest.mark.parametrize("scattered", [False, True])
def test_error_on_a_photo_is_below_a_thousandth(scattered):
    pixels = np.array(Image.fromarray(data.chelsea()).resize((224, 224)))
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    removed = holes(224, 224, scattered=scattered)
    filled = impute(image[None], removed, noise=0)
    for n in (0, 3, 6):
        assert (filled[n] - impute_direct(image, removed[n])).abs().max() < 1e-3, LEVELS[n]


# ---------------------------------------------------------------- the metric


def test_the_removed_pixels_are_those_above_numpys_percentile():
    maps = torch.cat([rand(1, 1, 9, 11), (rand(1, 1, 9, 11) * 4).round() / 4, smooth_map(9, 11)])
    removed = removed_pixels(maps)
    for n, row in enumerate(maps):
        for k, level in enumerate(LEVELS):
            threshold = np.percentile(row.numpy(), 100 * (1 - level))
            assert np.array_equal(removed[n, k].numpy(), row[0].numpy() >= threshold)


def brightest_left(images):
    """Two logits; the first is the sum of the left half's pixels."""
    left = images[..., : images.shape[-1] // 2].sum((1, 2, 3))
    return torch.stack([left, torch.zeros_like(left)], 1)


def test_the_probe_equals_its_definition():
    images, maps = rand(2, 3, 16, 18), torch.cat([smooth_map(16, 18), smooth_map(16, 18, seed=5)])
    probe = RoadMetric(levels=(0.2, 0.6), noise=0.0)
    values = measure(probe, brightest_left, images, maps, 0, score="logit")
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    grey = (maps - low) / (high - low)
    for n in range(2):
        means = {}
        for key, order in (("morf", grey[n, 0]), ("lerf", 1 - grey[n, 0])):
            scores = []
            for level in probe.levels:
                removed = order >= float(np.quantile(order.numpy(), 1 - level))
                filled = impute_direct(images[n], removed[None])
                scores.append(float(brightest_left(filled[None])[0, 0]))
            means[key] = sum(scores) / len(scores)
        assert float(values[Column("ROAD-MoRF")][n]) == pytest.approx(means["morf"], abs=0.02)
        assert float(values[Column("ROAD-LeRF")][n]) == pytest.approx(means["lerf"], abs=0.02)
        difference = values[Column("ROAD-LeRF")][n] - values[Column("ROAD-MoRF")][n]
        assert float(values[Column("ROAD")][n]) == pytest.approx(float(difference) / 2)


def test_a_map_that_knows_the_evidence_beats_its_opposite():
    image = torch.zeros(1, 3, 24, 24)
    image[..., 6:18, 3:9] = 1
    maps = image[:, :1] + 1e-3 * rand(1, 1, 24, 24)
    for sign in (1, -1):
        values = measure(RoadMetric(), brightest_left, image, sign * maps, 0, score="logit")
        assert sign * float(values[Column("ROAD")]) > 0


def test_a_constant_mask_is_undefined_and_scores_nothing():
    calls = []

    def model(images):
        calls.append(len(images))
        return brightest_left(images)

    ones = torch.ones(1, 1, 12, 12)
    values = measure(RoadMetric(), model, rand(1, 3, 12, 12), ones, 0, is_mask=True)
    assert set(values) == {Column("ROAD-MoRF"), Column("ROAD-LeRF"), Column("ROAD")}
    assert all(math.isnan(v) for v in values.values())
    assert len(calls) == 1  # the clean image


def test_values_and_torchmetrics():
    morf = torch.tensor([[0.5, 0.1], [0.2, math.nan]])
    lerf = torch.tensor([[0.9, 0.7], [0.5, 0.5]])
    assert road_values(morf)[0] == pytest.approx(0.3) and road_values(morf)[1].isnan()
    assert road_combined_values(lerf, morf)[0] == pytest.approx(0.25)
    for metric, arguments, expected in (
        (RoadMoRF(), (morf,), 0.3),
        (RoadLeRF(), (lerf,), 0.65),
        (RoadCombined(), (lerf, morf), 0.25),
    ):
        metric.update(*arguments)
        assert float(metric.compute()) == pytest.approx(expected)
        assert int(metric.n_invalid) == (0 if isinstance(metric, RoadLeRF) else 1)
    with pytest.raises(ValueError, match="lerf, morf"):
        road_combined_values(lerf, morf[:1])
    with pytest.raises(ValueError, match="scores"):
        road_values(morf[0])


def test_levels_may_be_a_list():
    given, kept = RoadMetric(levels=[0.2, 0.6]), RoadMetric(levels=(0.2, 0.6))
    assert given == kept and hash(given) == hash(kept)
