"""Pixel flipping, IROF and monotonicity correlation against definitions and limit cases."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from xattn.eval.metrics import irof, measure
from xattn.eval.metrics.base import Column, Sample
from xattn.eval.metrics.curves import InsertionDeletionMetric, auc
from xattn.eval.metrics.flipping import (
    PixelFlippingMetric,
    aopc,
    grid,
    pixel_flipping_auc,
    rank_regions,
)
from xattn.eval.metrics.irof import IrofMetric, irof_area, irof_values, superpixels
from xattn.eval.metrics.monotonicity import (
    MonotonicityMetric,
    monotonicity_values,
)

AOPC, IROF_COLUMN, MONOTONICITY = Column("AOPC"), Column("IROF"), Column("monotonicity")
SIZE = (9, 11)
SEEDS = st.integers(0, 2**31)
T = torch.tensor


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample(image, raw, score=0.5, seed=0) -> Sample:
    return Sample(image=image, grey=raw.clamp(0, 1), raw=raw, target=0, score=score, seed=seed)


def linear(weight):
    """Logits (b, 2): the sum of weight (3, H, W) times the image, and its negative."""

    def f(images):
        sums = (images.double() * weight.double()).sum((1, 2, 3))
        return torch.stack([sums, -sums], 1)

    return f


def images_of(probe, given):
    """The images a probe asks for, copied as the engine does."""
    return [request.image.clone() for request in probe.measure(given)]


def quadrants(seed: int = 0) -> torch.Tensor:
    """(3, 16, 16): four flat colours, which SLIC finds again."""
    colours = draw(3, 2, 2, seed=seed)
    colours[0] = T([[0.0, 1.0], [1.0, 0.0]])
    return colours.repeat_interleave(8, 1).repeat_interleave(8, 2)


# ---------------------------------------------------------------- all three


# ---------------------------------------------------------------- pixel flipping


def test_aopc_is_the_mean_drop_from_the_clean_score():
    scores = draw(3, 2, 7).double()
    expected = np.mean([scores[..., 0] - scores[..., t] for t in range(7)], axis=0)
    assert np.allclose(aopc(scores), expected, atol=1e-12)


def test_quantus_number_is_trapezoids_of_unit_width_without_the_clean_score():
    scores = draw(3, 8).double()
    expected = np.trapezoid(scores[:, 1:].numpy(), axis=1)
    assert np.allclose(pixel_flipping_auc(scores), expected, atol=1e-12)
    assert pixel_flipping_auc(scores[:, :2]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("function", [auc, aopc, pixel_flipping_auc, irof_values, irof_area])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1)])
def test_a_curve_needs_two_scores(function, shape):
    with pytest.raises(ValueError, match="scores: got shape"):
        function(torch.zeros(shape))


def test_the_grid_covers_every_pixel_once_and_cuts_the_last_squares():
    labels = grid(5, 7, 3)
    assert labels.tolist() == 3 * [[0, 0, 0, 1, 1, 1, 2]] + 2 * [[3, 3, 3, 4, 4, 4, 5]]
    assert torch.equal(grid(5, 7, 1).flatten(), torch.arange(35))
    assert (grid(5, 7, 100) == 0).all()


def test_regions_rank_by_their_signed_mean_and_not_by_their_sum():
    values = torch.zeros(1, 3, 4)
    values[0, :, :3] = 0.5  # the largest sum
    values[0, :, 3] = 0.9
    parts = rank_regions(grid(3, 4, 3), values)
    assert parts[0].tolist() == [3, 7, 11]
    parts = rank_regions(grid(3, 4, 3), -values)
    assert parts[1].tolist() == [3, 7, 11]


@pytest.mark.parametrize("fill", ["black", "inpaint"])
@pytest.mark.parametrize(("per_step", "steps", "count"), [(1, None, 6), (4, None, 2), (2, 2, 2)])
def test_regions_vanish_most_relevant_first(fill, per_step, steps, count):
    image, labels = 0.1 + draw(3, 5, 7, seed=1), grid(5, 7, 3)
    relevance = T([0.3, -2.0, 5.0, 0.0, -0.1, 1.0])  # of the squares: 2, 5, 0, 3, 4, 1
    rank = T([2, 5, 0, 3, 4, 1])
    probe = PixelFlippingMetric(3, per_step, steps, fill)
    asked = images_of(probe, sample(image, relevance[labels][None]))
    assert len(asked) == count
    for t, perturbed in enumerate(asked, start=1):
        gone = (rank < t * per_step)[labels]
        assert torch.equal(perturbed[:, ~gone], image[:, ~gone])
        assert (perturbed[:, gone] != image[:, gone]).any(0).all()


def test_equal_contributions_give_half_of_the_whole_drop():
    image = torch.full((1, 3, 8, 8), 0.25)
    probe = PixelFlippingMetric(patch=2, steps=None)
    f = linear(torch.full((3, 8, 8), 0.1))
    got = measure(probe, f, image, normal(1, 1, 8, 8), 0, score="logit")
    assert got[AOPC].item() == pytest.approx(64 * 3 * 0.25 * 0.1 / 2, rel=1e-6)


def test_noise_is_drawn_once_an_image():
    image, raw = draw(3, *SIZE), normal(1, *SIZE)
    probe = PixelFlippingMetric(3, steps=None, fill="noise")
    ends = [
        images_of(probe, sample(image, m, seed=s))[-1] for m, s in ((raw, 1), (-raw, 1), (raw, 2))
    ]
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@settings(max_examples=25)
@given(SEEDS, st.sampled_from([1, 2, 4]), st.integers(1, 5))
def test_no_order_beats_the_contributions_of_an_additive_model(seed, patch, per_step):
    weight, image = normal(3, 8, 8, seed=seed), draw(1, 3, 8, 8, seed=seed + 1)
    contributions = (weight * image).sum(1, keepdim=True)
    maps = torch.cat([contributions, normal(1, 1, 8, 8, seed=seed), -contributions])
    probe = PixelFlippingMetric(patch, per_step, steps=None)
    got = measure(probe, linear(weight), image.expand(3, -1, -1, -1), maps, 0, score="logit")
    best, other, worst = got[AOPC].tolist()
    assert best + 1e-6 >= other >= worst - 1e-6


def test_single_pixels_are_those_of_deletion():
    image, raw = draw(3, *SIZE), draw(1, *SIZE, seed=3)
    flipped = images_of(PixelFlippingMetric(1, 8, None), sample(image, raw))
    deleted = images_of(InsertionDeletionMetric(8), sample(image, raw))[: len(flipped)]
    assert len(flipped) == 13
    assert all(torch.equal(a, b) for a, b in zip(flipped, deleted, strict=True))


# ---------------------------------------------------------------- IROF


def test_irof_is_the_area_over_the_relative_curve():
    scores = 0.1 + draw(3, 9).double()
    expected = 1 - np.trapezoid((scores / scores[:, :1]).numpy(), dx=1 / 8, axis=1)
    assert np.allclose(irof_values(scores), expected, atol=1e-12)
    relative = (scores[:, 1:] / scores[:, :1]).numpy()
    assert np.allclose(irof_area(scores), 8 - np.trapezoid(relative, axis=1), atol=1e-12)
    assert irof_values(torch.full((5,), 0.3)).item() == pytest.approx(0, abs=1e-12)
    assert irof_values(T([0.4, 0.0, 0.0])).item() == 0.75


@pytest.mark.parametrize("clean", [0.0, -1.0, math.nan])
def test_irof_needs_a_positive_clean_score(clean):
    assert irof_values(T([clean, 0.5, 0.2])).isnan()
    image, f = quadrants()[None], linear(torch.zeros(3, 16, 16))
    got = measure(IrofMetric(4), f, image, draw(1, 1, 2, 2), 0, score="logit")
    assert got[IROF_COLUMN].isnan().all()


def test_superpixels_vanish_most_relevant_first():
    image, means = quadrants(), T([[1.0, -3.0], [0.0, 2.0]])  # ranks 1, 3, 2, 0
    quarter = grid(16, 16, 8)
    assert torch.equal(superpixels(image, 4).long(), quarter)
    raw = means.flatten()[quarter][None] + 0.1 * normal(1, 16, 16)
    asked = images_of(IrofMetric(4), sample(image, raw))
    assert len(asked) == 4
    mean = image.double().mean((1, 2)).float()[:, None, None].expand_as(image)
    for t, perturbed in enumerate(asked, start=1):
        gone = (T([1, 3, 2, 0]) < t)[quarter]
        assert torch.equal(perturbed, torch.where(gone, mean, image))


def test_the_one_superpixel_that_counts_comes_first_or_last():
    image, weight = quadrants()[None], torch.zeros(3, 16, 16)
    weight[:, :8, 8:] = 1.0
    f, seen = linear(weight), weight[:1][None]
    probe = IrofMetric(4, fill="black")
    got = measure(probe, f, image.expand(2, -1, -1, -1), torch.cat([seen, -seen]), 0, score="logit")
    assert got[IROF_COLUMN].tolist() == pytest.approx([1 - 1 / 8, 1 / 8])


def test_an_image_of_one_superpixel_has_no_order():
    image, raw = torch.full((3, 4, 4), 0.5), normal(1, 4, 4)
    assert (superpixels(image, 2) == 0).all()
    assert not images_of(IrofMetric(2), sample(image, raw))
    f = linear(normal(3, 4, 4))
    assert measure(IrofMetric(2), f, image[None], raw[None], 0)[IROF_COLUMN].isnan().all()


def test_one_segmentation_serves_all_methods_and_old_ones_are_dropped(monkeypatch):
    import skimage.segmentation

    calls = []
    slic = skimage.segmentation.slic
    monkeypatch.setattr(
        skimage.segmentation, "slic", lambda *a, **k: calls.append(1) or slic(*a, **k)
    )
    monkeypatch.setattr(irof, "_segments", type(irof._segments)())
    monkeypatch.setattr(irof, "_KEPT", 2)
    image = quadrants(1)
    first = superpixels(image, 4)
    assert superpixels(image.clone(), 4) is first and len(calls) == 1
    image[:, :8, 4:] = 1.0  # another image in the same memory
    assert not torch.equal(superpixels(image, 4), first) and len(calls) == 2
    assert superpixels(quadrants(1), 4) is first
    superpixels(image, 9)  # drops the one not used for longest
    assert len(irof._segments) == 2 and len(calls) == 3
    assert superpixels(quadrants(1), 4) is first
    superpixels(image, 4)
    assert len(calls) == 4


# ---------------------------------------------------------------- monotonicity


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-5, 5)), min_size=3, max_size=12))
def test_correlation_is_scipys(pairs):
    a, b = torch.tensor(pairs, dtype=torch.float64).T
    (value,) = monotonicity_values(a[None], b[None]).tolist()
    if len(a.unique()) == 1 or len(b.unique()) == 1:
        assert math.isnan(value)
    else:
        assert value == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
        assert -1 <= value <= 1


def test_values_that_are_not_finite_have_no_rank():
    values = T([[1.0, 2.0, math.nan], [1.0, 2.0, math.inf]])
    assert monotonicity_values(values, draw(2, 3)).isnan().all()
    assert monotonicity_values(draw(2, 3), values).isnan().all()


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((2, 3), (2, 4)), ((2, 3), (3,))])
def test_attributions_and_effects_come_in_pairs(shapes):
    with pytest.raises(ValueError, match="attributions, effects: got"):
        monotonicity_values(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("samples", [1, 3])
def test_attributions_in_the_order_of_the_effects_correlate_fully(samples):
    image, labels, gains = draw(3, 6, 9, seed=9), grid(6, 9, 3), T([4.0, 1.0, 6.0, 2.0, 5.0, 3.0])

    def f(images):  # the gains of the squares that differ from the clean image
        changed = (images != image).any(1).flatten(1)
        squares = torch.stack([changed[:, labels.flatten() == i].any(1) for i in range(6)], 1)
        return torch.stack([squares.double() @ gains.double(), torch.zeros(len(images))], 1)

    probe = MonotonicityMetric(3, samples)
    maps = torch.stack([gains, -gains, 1 / gains, gains * T([1, -1, 1, -1, 1, -1])])[:, labels]
    got = measure(probe, f, image.expand(4, -1, -1, -1), maps[:, None], 0, score="logit")
    assert got[MONOTONICITY].tolist() == pytest.approx([1, 1, -1, 1])


def test_effects_are_mean_squares_over_the_draws():
    image, raw = draw(3, 4, 6), normal(1, 4, 6)
    generator = MonotonicityMetric(2, 2).measure(sample(image, raw, score=0.5))
    count = 0
    with pytest.raises(StopIteration) as stop:
        while True:
            next(generator)
            count += 1
    assert count == 12
    first, second = draw(6, seed=1).double(), draw(6, seed=2).double()
    effects = ((first - 0.5) ** 2 + (second - 0.5) ** 2) / 2
    attributions = torch.nn.functional.avg_pool2d(raw.abs(), 2).flatten()
    expected = spearmanr(attributions, effects).statistic
    value = stop.value.value({"monotonicity": torch.cat([first, second])})[MONOTONICITY]
    assert value == pytest.approx(expected, abs=1e-12)


def test_methods_share_the_noise_which_stays_in_its_square():
    image, labels = draw(3, *SIZE), grid(*SIZE, 3)
    probe = MonotonicityMetric(3, 2)
    one = images_of(probe, sample(image, normal(1, *SIZE), seed=5))
    other = images_of(probe, sample(image, draw(1, *SIZE), seed=5))
    count = int(labels.max()) + 1
    assert len(one) == 2 * count
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for i, perturbed in enumerate(one):
        assert torch.equal((perturbed != image).any(0), labels == i % count)
        assert 0 <= perturbed.min() and perturbed.max() <= 1
    assert not torch.equal(one[0], one[count])
    assert not torch.equal(one[0], images_of(probe, sample(image, draw(1, *SIZE), seed=6))[0])
