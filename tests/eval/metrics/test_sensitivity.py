"""Max-sensitivity against Captum on the same perturbations, and where its value is known."""

import pytest
import torch
from captum.metrics import sensitivity_max
from eval_fakes import FakeBackbone
from hypothesis import given, settings
from hypothesis import strategies as st

from xattn.eval.metrics import Column, Sample, measure
from xattn.eval.metrics.sensitivity import (
    BATCH,
    MaxSensitivityMetric,
    max_sensitivity_values,
)

COLUMN = Column("max-sensitivity")
SIZE = (13, 17)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def run(probe, image, explain, seed=0):
    """The value of one image, and the batches it explained."""
    seen = []

    def record(images):
        seen.append(images.clone())
        return explain(images)

    raw = rand(1, *image.shape[1:])
    generator = probe.measure(Sample(image, raw, raw, 0, 0.0, seed, explain=record))
    with pytest.raises(StopIteration) as stop:
        next(generator)
    return stop.value.value({})[COLUMN], seen


def curved(images):
    """A map (b, 1, 4, 5) that no scaling makes linear in the image."""
    return torch.nn.functional.adaptive_avg_pool2d((7 * images).sin().sum(1, keepdim=True), (4, 5))


# ---------------------------------------------------------------- Captum


def test_equals_captum_away_from_black_and_white():
    image = 0.1 + 0.8 * rand(3, *SIZE)
    probe = MaxSensitivityMetric(radius=0.05, samples=7)
    ours, (seen,) = run(probe, image, curved)
    d = seen[1:] - image
    theirs = sensitivity_max(
        # Captum gives a tuple first, a tensor then.
        lambda x: (curved(x[0] if isinstance(x, tuple) else x),),
        image[None],
        lambda x: x + d,
        n_perturb_samples=7,
    )
    assert ours == pytest.approx(float(theirs), rel=1e-4)


def test_perturbed_images_stay_in_range_where_captums_do_not():
    image = rand(3, *SIZE).round()
    _, (seen,) = run(MaxSensitivityMetric(radius=0.1, samples=9), image, curved)
    assert torch.equal(seen[0], image)
    assert float(seen.min()) == 0 and float(seen.max()) == 1
    moved = (seen[1:] - image).abs()
    assert float(moved.max()) <= 0.1 + 1e-6
    assert 0.4 < float((moved == 0).float().mean()) < 0.6, "half of the moves point outwards"


def test_perturbations_are_uniform_in_the_ball():
    image = 0.2 + 0.6 * rand(3, 40, 40)
    _, (seen,) = run(MaxSensitivityMetric(radius=0.1), image, curved)
    d = (seen[1:] - image) / 0.1
    assert float(d.abs().max()) <= 1 + 1e-5
    assert abs(float(d.mean())) < 0.01
    assert float(d.square().mean()) == pytest.approx(1 / 3, rel=0.02)


# ---------------------------------------------------------------- exact cases


def test_a_map_that_ignores_the_image_has_none():
    value, _ = run(MaxSensitivityMetric(), rand(3, *SIZE), lambda x: rand(1, 1, 4, 5).expand(len(x), -1, -1, -1))  # fmt: skip
    assert value == 0


def test_the_gradient_of_a_linear_score_has_none():
    weight = rand(3, *SIZE, seed=2) - 0.5

    def gradient(images, targets):
        images = images.detach().requires_grad_()
        score = (images * weight).sum()
        return torch.autograd.grad(score, images)[0].sum(1, keepdim=True)

    images = rand(2, 3, *SIZE)
    maps = gradient(images, None)
    f = FakeBackbone().logits
    values = measure(MaxSensitivityMetric(samples=3), f, images, maps, 0, explain=gradient)[COLUMN]
    assert values.tolist() == [0, 0]


def test_the_identity_moves_by_the_perturbation():
    image = 0.2 + 0.6 * rand(3, *SIZE)
    value, (seen,) = run(MaxSensitivityMetric(samples=5), image, lambda x: x[:, :1])
    expected = (seen[1:, 0] - image[0]).flatten(1).norm(dim=1).max() / image[0].norm()
    assert value == pytest.approx(float(expected), rel=1e-5)


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_units_of_the_map_do_not_matter(scale, seed):
    maps, perturbed = rand(2, 1, 3, 4, seed=seed) + 0.1, rand(2, 5, 1, 3, 4, seed=seed + 1)
    value = max_sensitivity_values(maps, perturbed)
    torch.testing.assert_close(
        max_sensitivity_values(scale * maps, scale * perturbed), value, rtol=1e-5, atol=0
    )
    assert (value > 0).all()


def test_undefined_for_zero_and_non_finite_maps():
    maps, perturbed = rand(4, 1, 3, 4), rand(4, 2, 1, 3, 4, seed=1)
    maps[0] = 0
    maps[1, 0, 0, 0] = torch.inf
    perturbed[2, 1, 0, 0, 0] = torch.nan
    values = max_sensitivity_values(maps, perturbed)
    assert values.isnan().tolist() == [True, True, True, False]


# ---------------------------------------------------------------- batches, errors, class


def test_many_samples_go_in_bounded_batches_with_the_same_value():
    image = rand(3, *SIZE)
    value, seen = run(MaxSensitivityMetric(samples=40), image, curved)
    assert max(map(len, seen)) <= BATCH and sum(map(len, seen)) == 41
    perturbed = torch.cat([*seen])[1:]
    whole = max_sensitivity_values(curved(image[None]), curved(perturbed)[None])
    assert value == pytest.approx(float(whole), rel=1e-6)


def test_errors_of_the_explainer_are_not_swallowed():
    def broken(images):
        raise RuntimeError("no map")

    raw = rand(1, *SIZE)
    sample = Sample(rand(3, *SIZE), raw, raw, 0, 0.0, explain=broken)
    with pytest.raises(RuntimeError, match="no map"):
        next(MaxSensitivityMetric().measure(sample))
    sample = Sample(rand(3, *SIZE), raw, raw, 0, 0.0)
    with pytest.raises(ValueError, match="explain: None; max-sensitivity explains"):
        next(MaxSensitivityMetric().measure(sample))


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="maps, perturbed: got"):
        max_sensitivity_values(rand(2, 1, 3, 4), rand(2, 5, 1, 4, 3))
