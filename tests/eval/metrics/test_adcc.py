"""Coherency, complexity and ADCC against their definitions and limit cases (heads.md 14)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xattn.eval.metrics import Column, Sample, create_metric, measure
from xattn.eval.metrics.adcc import (
    adcc_values,
    coherency_values,
    complexity_values,
)
from xattn.eval.metrics.masking import MaskingMetric

COHERENCY, COMPLEXITY, WHOLE = Column("coherency"), Column("complexity"), Column("ADCC")
FRACTIONS = st.lists(st.floats(0, 1), min_size=3, max_size=3)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def f(images):
    """Logits (b, 3): the sums of the channels of the left half."""
    return 0.2 * images[..., : images.shape[-1] // 2].sum((2, 3))


def brightness(images, targets=None):
    return images.mean(1, keepdim=True)


def one(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([v], dtype=torch.float64) for v in values]


# ---------------------------------------------------------------- values


@given(st.integers(0, 2**31))
@settings(max_examples=20)
def test_coherency_is_pearsons_correlation_moved_to_zero_to_one(seed):
    maps, others = draw(2, 1, 4, 5, seed=seed), draw(2, 1, 4, 5, seed=seed + 1)
    for got, a, b in zip(coherency_values(maps, others), maps, others, strict=True):
        pearson = np.corrcoef(a.double().numpy().ravel(), b.double().numpy().ravel())[0, 1]
        assert got.item() == pytest.approx((pearson + 1) / 2, abs=1e-9)


def test_limit_cases_of_the_coherency():
    maps = draw(1, 1, 4, 5)
    assert coherency_values(maps, 3 * maps + 1).item() == pytest.approx(1, abs=1e-6)
    assert coherency_values(maps, -maps).item() == pytest.approx(0, abs=1e-6)
    for constant in (torch.zeros_like(maps), torch.full_like(maps, 0.1)):
        assert coherency_values(maps, constant).item() == 0
        assert coherency_values(constant, maps).item() == 0
    broken = maps.clone()
    broken[..., 0, 0] = math.nan
    assert coherency_values(maps, broken).item() == 0


def test_complexity_is_the_mean_of_the_map():
    maps = torch.stack([torch.ones(1, 4, 5), torch.zeros(1, 4, 5), draw(1, 4, 5)])
    got = complexity_values(maps)
    assert got[:2].tolist() == [1, 0]
    assert got[2].item() == pytest.approx(maps[2].double().mean().item(), abs=1e-12)


@given(FRACTIONS)
@settings(max_examples=50)
def test_adcc_is_the_harmonic_mean_and_its_limits(parts):
    coherency, complexity, drop = parts
    good = [coherency, 1 - complexity, 1 - drop]
    got = adcc_values(*one(*parts)).item()
    if min(good) == 0:
        assert got == 0
    else:
        assert got == pytest.approx(3 / sum(1 / v for v in good), rel=1e-9)
    assert min(good) - 1e-12 <= got <= min(3 * min(good), max(good)) + 1e-12


def test_the_mean_over_images_is_at_most_the_adcc_of_the_means():
    parts = [draw(40, seed=i).double() for i in range(3)]
    whole = adcc_values(*[part.mean()[None] for part in parts]).item()
    assert adcc_values(*parts).mean().item() < whole


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (one(0.5, 30.0, 0.1), "complexity: values from 30 to 30; give fractions"),
        (one(-0.2, 0.5, 0.1), "coherency: values from -0.2"),
        ([*one(0.5, 0.5), torch.zeros(2)], "drop: got shape"),
    ],
)
def test_percentages_and_other_shapes_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        adcc_values(*parts)


def test_maps_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="others: got shape"):
        coherency_values(draw(1, 1, 4, 5), draw(1, 1, 5, 4))
    with pytest.raises(ValueError, match="maps: got shape"):
        complexity_values(draw(1, 3, 4, 5))


# ---------------------------------------------------------------- the probe


def test_values_are_those_of_the_definition():
    images, maps = draw(3, 3, 6, 8), draw(3, 1, 6, 8, seed=1)
    got = measure(create_metric("adcc"), f, images, maps, 1, explain=brightness)
    low, high = maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)
    grey = (maps - low) / (high - low)
    masked = images * grey
    coherency = coherency_values(grey, brightness(masked))
    complexity = complexity_values(grey)
    p, q = (f(x).double().softmax(1)[:, 1] for x in (images, masked))
    drop = (p - q).clamp_min(0) / p
    assert drop.max() > 0.01, "the case shows something"
    for column, expected in (
        (COHERENCY, coherency),
        (COMPLEXITY, complexity),
        (WHOLE, adcc_values(coherency, complexity, drop)),
    ):
        torch.testing.assert_close(got[column], expected, rtol=0, atol=1e-6)


def test_the_all_ones_mask_has_complexity_one_and_adcc_zero():
    images, ones = draw(1, 3, 6, 8), torch.ones(1, 1, 3, 4)
    for explain in (brightness, lambda x, t: torch.ones(len(x), 1, 3, 4)):
        got = measure(create_metric("adcc"), f, images, ones, 0, explain=explain, is_mask=True)
        assert got[COMPLEXITY].item() == 1
        assert got[WHOLE].item() == 0


@pytest.mark.parametrize("value", [0.0, 0.4, math.nan])
def test_a_method_that_says_nothing_about_the_masked_image_has_coherency_zero(value):
    images, maps = draw(1, 3, 6, 8), draw(1, 1, 6, 8, seed=1)
    got = measure(
        create_metric("adcc"),
        f,
        images,
        maps,
        0,
        explain=lambda x, t: torch.full((len(x), 1, 3, 4), value),
    )
    assert got[COHERENCY].item() == got[WHOLE].item() == 0
    assert got[COMPLEXITY].item() > 0


def sample(explain=brightness, score=0.5) -> Sample:
    grey = draw(1, 6, 8, seed=1)
    return Sample(image=draw(3, 6, 8), grey=grey, raw=grey, target=0, score=score, explain=explain)


def finished(probe, given):
    requests = []
    generator = probe.measure(given)
    while True:
        try:
            requests.append(next(generator))
        except StopIteration as stop:
            return requests, stop.value


def test_its_only_pass_is_that_of_average_drop_with_black_behind_the_mask():
    given = sample()
    ours, _ = finished(create_metric("adcc"), given)
    theirs, _ = finished(MaskingMetric(levels=(1.0,)), given)
    assert [(r.key, r.shared) for r in ours] == [("q", True)]
    assert torch.equal(ours[0].image, next(r.image for r in theirs if r.key == "q@100"))


def test_without_the_method_it_is_refused():
    with pytest.raises(ValueError, match="explain: None; ADCC explains the masked image"):
        finished(create_metric("adcc"), sample(explain=None))


@pytest.mark.parametrize(
    ("p", "q", "defined"),
    [(2.0, 1.0, True), (2.0, 5.0, True), (2.0, -0.5, False), (-1.0, -2.0, False), (0.0, 0.0, True)],
)
def test_logits_have_an_adcc_only_where_the_drop_is_a_fraction(p, q, defined):
    _, finish = finished(create_metric("adcc"), sample(score=p))
    got = finish({"q": torch.tensor([q], dtype=torch.float64)})
    assert math.isfinite(got[WHOLE]) == defined
    assert math.isfinite(got[COHERENCY]) and math.isfinite(got[COMPLEXITY])


# ---------------------------------------------------------------- classes
