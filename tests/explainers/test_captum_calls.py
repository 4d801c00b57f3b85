"""Captum takes an explainer of xattn as it is: NoiseTunnel, infidelity, sensitivity_max."""

from __future__ import annotations

import pytest
import torch
from captum.attr import NoiseTunnel
from captum.metrics import infidelity, sensitivity_max
from small_networks import made

from xattn.explainers import create_explainer


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("target", [1, torch.tensor([1, 2])], ids=["int", "tensor"])
@pytest.mark.parametrize("name", ["gradcam", "saliency", "rise"])
def test_noise_tunnel_is_the_mean_over_noisy_images(name, target, images):
    options = {"masks": 8} if name == "rise" else {}
    explainer = create_explainer(name, made("cnn"), **options)
    torch.manual_seed(0)
    found = NoiseTunnel(explainer).attribute(images, nt_samples=3, stdevs=0.2, target=target)
    torch.manual_seed(0)
    noisy = images.repeat_interleave(3, 0) + torch.normal(0, torch.full((6, 3, 32, 32), 0.2))
    assert noisy.min() < 0 and noisy.max() > 1
    each = target if isinstance(target, int) else target.repeat_interleave(3)
    maps = type(explainer).attribute.__wrapped__(explainer, noisy, each)
    torch.testing.assert_close(found, maps.unflatten(0, (2, 3)).mean(1))


def test_no_noise_changes_nothing(images):
    explainer = create_explainer("gradcam", made("cnn"))
    found = NoiseTunnel(explainer).attribute(images, nt_samples=2, stdevs=1e-12, target=1)
    torch.testing.assert_close(found, explainer.attribute(images, 1), rtol=1e-4, atol=1e-6)


def test_sensitivity_of_an_explainer_that_looks_at_no_image_is_0(images):
    constant = create_explainer("centre", made("cnn"))
    assert sensitivity_max(constant.attribute, images, target=1).tolist() == [0, 0]
    saliency = create_explainer("saliency", made("cnn"))
    assert (sensitivity_max(saliency.attribute, images, target=torch.tensor([1, 2])) > 0).all()


def test_infidelity_takes_maps_in_the_shape_of_the_inputs():
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    backbone = made("cnn")
    explainer = create_explainer("gradcam", backbone)
    maps = explainer.attribute_inputs(images, 1)
    assert maps.shape == images.shape
    small = explainer.attribute(images, 1)
    resized = torch.nn.functional.interpolate(small, images.shape[2:], mode="bilinear")
    assert min(small.shape[2:]) > 1
    torch.testing.assert_close(maps.sum(1, keepdim=True), resized)

    def noise(x):
        step = 0.01 * torch.ones_like(x)
        return step, x - step

    found = infidelity(backbone.logits, noise, images, maps, target=1, n_perturb_samples=2)
    with torch.no_grad():
        drop = (backbone.logits(images) - backbone.logits(images - 0.01))[:, 1]
    torch.testing.assert_close(found, (0.01 * maps.sum((1, 2, 3)) - drop) ** 2)


def test_normalised_images_are_refused_where_there_is_no_noise(images):
    with pytest.raises(ValueError, match=r"^inputs: got values in .*\[0, 1\]"):
        create_explainer("gradcam", made("cnn")).attribute(4 * images - 2, 1)
