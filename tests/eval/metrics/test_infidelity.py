"""Infidelity against Captum on the same perturbations, and where it is known to be 0."""

import pytest
import torch
from captum.metrics import infidelity
from eval_fakes import FakeBackbone

from xattn.eval.metrics import Column, Sample, measure
from xattn.eval.metrics.infidelity import (
    PERTURBATIONS,
    InfidelityMetric,
    infidelity_values,
)

COLUMN = Column("infidelity")
SIZE = (13, 17)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def linear(weight):
    """Logits (b, 2): w . x and 0."""

    def f(images):
        score = (images.double() * weight).sum((1, 2, 3))
        return torch.stack([score, torch.zeros_like(score)], 1)

    return f


def requested(probe, image, raw, seed=0):
    sample = Sample(image, raw, raw, 0, 0.0, seed)
    return [r.image.clone() for r in probe.measure(sample)]


# ---------------------------------------------------------------- Captum


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("perturbation", ["square", "noise"])
def test_equals_captum_on_the_same_perturbations(perturbation, scale):
    f, images, maps = FakeBackbone().logits, rand(2, 3, 18, 20), rand(2, 1, 18, 20, seed=1) - 0.4
    probe = InfidelityMetric(samples=6, perturbation=perturbation, scale=scale, sigma=0.2)
    ours = measure(probe, f, images, maps, 2, max_forward_batch=4, seed=3)[COLUMN]

    from xattn.eval.metrics.measure import sample_seed

    for i in range(2):
        changed = torch.stack(requested(probe, images[i], maps[i], sample_seed(3, i)))

        def perturb(x, changed=changed):
            return x - changed, changed

        theirs = infidelity(
            lambda x: torch.cat([f(part[None].expand(4, -1, -1, -1))[:1] for part in x]).softmax(1),
            perturb,
            images[i : i + 1],
            maps[i : i + 1].expand(-1, 3, -1, -1) / 3,
            target=2,
            n_perturb_samples=6,
            normalize=scale,
        )
        assert float(ours[i]) == pytest.approx(float(theirs), rel=1e-4)


# ---------------------------------------------------------------- exact cases


@pytest.mark.parametrize("scale", [False, True])
def test_the_gradient_of_a_linear_score_has_none(scale):
    weight = rand(3, *SIZE, seed=4).double() - 0.5
    phi = weight.sum(0)[None, None]
    grey = rand(1, 1, *SIZE).expand(1, 3, *SIZE)
    for perturbation, images in (("noise", rand(1, 3, *SIZE)), ("square", grey)):
        probe = InfidelityMetric(samples=8, perturbation=perturbation, scale=scale)
        right, wrong = (
            float(measure(probe, linear(weight), images, m, 0, score="logit")[COLUMN])
            for m in (phi, phi.flip(2))
        )
        assert right < 1e-8 < 1e-3 < wrong


def test_contributions_of_a_linear_score_have_none_under_occlusion():
    weight, images = rand(3, *SIZE, seed=4).double() - 0.5, rand(1, 3, *SIZE)
    contributions = (weight * images).sum(1, keepdim=True)
    options = {"samples": 8, "scale": False}
    for perturbation, exact in (("occlusion", True), ("square", False)):
        probe = InfidelityMetric(perturbation=perturbation, **options)
        value = measure(probe, linear(weight), images, contributions, 0, score="logit")[COLUMN]
        assert (float(value) < 1e-8) == exact


def test_the_optimal_scale_is_optimal_and_removes_units():
    products, changes = rand(3, 7) - 0.3, rand(3, 7, seed=1) - 0.3
    best = infidelity_values(products, changes)
    for beta in torch.linspace(-3, 3, 61):
        plain = infidelity_values(beta * products, changes, scale=False)
        assert (best <= plain + 1e-12).all()
    torch.testing.assert_close(infidelity_values(-40 * products, changes), best)
    assert not torch.allclose(
        infidelity_values(2 * products, changes, False), infidelity_values(products, changes, False)
    )


def test_a_map_of_zeros_foretells_no_change():
    changes = rand(1, 5)
    expected = changes.double().square().mean(1)
    torch.testing.assert_close(infidelity_values(torch.zeros(1, 5), changes), expected)
    assert infidelity_values(torch.full((1, 5), torch.inf), changes).isnan().all()


# ---------------------------------------------------------------- perturbations


def test_squares_are_black_lie_inside_and_move():
    image = 0.1 + 0.8 * rand(3, *SIZE)
    probe = InfidelityMetric(samples=30, side=0.4)
    corners = set()
    for changed in requested(probe, image, rand(1, *SIZE)):
        gone = changed[0] == 0
        assert torch.equal(changed == 0, gone.expand(3, -1, -1))
        rows, columns = gone.any(1).nonzero()[:, 0], gone.any(0).nonzero()[:, 0]
        assert len(rows) == len(columns) == 5 and int(gone.sum()) == 25
        assert torch.equal(changed[:, ~gone], image[:, ~gone])
        corners.add((int(rows[0]), int(columns[0])))
    assert len(corners) > 15


def test_noise_is_equal_in_all_channels_and_not_clipped():
    image = rand(3, *SIZE).round()
    probe = InfidelityMetric(samples=20, perturbation="noise", sigma=0.3)
    noise = torch.stack([image - c for c in requested(probe, image, rand(1, *SIZE))])
    torch.testing.assert_close(noise[:, 0], noise[:, 2], atol=1e-6, rtol=0)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.05)
    assert abs(float(noise.mean())) < 0.02


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_all_methods_ask_for_the_same_images(perturbation):
    image, probe = rand(3, *SIZE), InfidelityMetric(samples=4, perturbation=perturbation)
    first, second = (requested(probe, image, rand(1, *SIZE, seed=s), seed=7) for s in (1, 2))
    other = requested(probe, image, rand(1, *SIZE, seed=1), seed=8)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# ---------------------------------------------------------------- class, options


def test_bad_shapes_are_refused():
    for products, changes in ((rand(3), rand(3)), (rand(2, 3), rand(2, 4)), (rand(2, 0),) * 2):
        with pytest.raises(ValueError, match="products, changes: got"):
            infidelity_values(products, changes)
