"""Images of other than three channels: every explainer, metrics, arrays of any size, false colours."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import xattn
from xattn import Preprocessing, load_backbone
from xattn.explainers import create_explainer, list_explainers
from xattn.explainers.base import EXPLAINERS, explainer_class
from xattn.photos.view import prepare, prepare_bands

DRAW = torch.Generator().manual_seed(0)


def network(channels, kind="cnn"):
    torch.manual_seed(0)
    if kind == "vit":
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2,
            num_classes=4, in_chans=channels,
        )  # fmt: skip
    if kind == "timm":
        return timm.create_model("test_resnet", num_classes=4, in_chans=channels)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )  # fmt: skip


def loaded(channels, kind="cnn"):
    return load_backbone(
        network(channels, kind),
        input_size=32,
        mean=[0.4] * channels,
        std=[0.2] * channels,
        taps=["norm1.1"] if kind == "vit" else None,
    )


@pytest.mark.parametrize("channels, kind", [(1, "timm"), (13, "timm"), (6, "vit"), (4, "cnn")])
def test_every_explainer_runs_on_any_number_of_channels(channels, kind):
    backbone = loaded(channels, kind)
    images = torch.rand(1, channels, 32, 32, generator=DRAW)
    assert backbone.logits(images).shape == (1, 4)
    slow = ("extremal_perturbation", "igos_pp", "mda")
    networks = "vit" if kind == "vit" else "cnn"
    for name in list_explainers():
        entry = EXPLAINERS.entry(name)
        if explainer_class(name).needs_head or name in slow or networks not in entry.networks:
            continue
        options = {"samples": 80, "n_segments": 9} if name == "kernel_shap" else entry.cases[0]
        maps = create_explainer(name, backbone, **options).attribute(images, 1)
        assert maps.shape[:2] == (1, 1) and maps.isfinite().all(), name


@pytest.mark.parametrize("channels", [1, 13])
def test_arrays_of_any_size_and_metrics_take_any_number_of_channels(channels):
    backbone = loaded(channels)
    images = [
        torch.rand(channels, 40, 50, generator=DRAW),
        np.random.default_rng(0).random((40, 50, channels)),
    ]
    for image in images:
        found = xattn.explain(image, backbone, explainer="occlusion")[0]
        assert found.view.photo_size == (40, 50) and found.overlay().size == (50, 40)
    results = xattn.evaluate(
        backbone, {"occlusion": "occlusion"}, images[0][None, :, :32, :32], metrics="insertion-deletion", progress=False
    )  # fmt: skip
    assert results.methods


def test_bands_are_resized_and_cropped_as_photos_are():
    pixels = np.random.default_rng(0).integers(0, 256, (41, 67, 3), dtype=np.uint8)
    for mode in ("center", "border"):
        about = Preprocessing(input_size=(32, 24), crop_mode=mode, interpolation="bilinear")
        expected, view = prepare(Image.fromarray(pixels), about)
        bands, same = prepare_bands(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, about)
        assert view == same and float((bands - expected).abs().max()) < 2 / 255


def test_a_network_of_one_channel_gets_photos_in_grey():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    backbone = loaded(1)
    pixels, _ = prepare(photo, backbone.preprocessing)
    grey, _ = prepare(
        photo.convert("L").convert("RGB"), Preprocessing((32, 32), interpolation="bilinear")
    )
    assert torch.equal(pixels, grey[:1])
    assert xattn.explain(photo, backbone, explainer="saliency")


def test_pictures_show_the_bands_that_are_asked_for():
    backbone = loaded(6)
    image = torch.zeros(6, 32, 32)
    image[5], image[2] = 1.0, 0.2
    found = xattn.explain(image, backbone, explainer="occlusion", bands=(5, 0, 2))[0]
    assert found.source.getpixel((3, 3)) == (255, 0, 51)
    with pytest.raises(ValueError, match=r"bands: got .* three numbers of channels, from 0 to 5"):
        xattn.explain(image, backbone, explainer="occlusion", bands=(5, 0, 6))


@pytest.mark.parametrize("side", [32, 40])
def test_bands_change_the_picture_and_nothing_of_what_the_network_gets(side):
    backbone, image = loaded(3), torch.rand(3, side, side, generator=DRAW)
    for one in (image, image.permute(1, 2, 0).numpy()):
        plain = xattn.explain(one, backbone, explainer="saliency")[0]
        other = xattn.explain(one, backbone, explainer="saliency", bands=(2, 1, 1))[0]
        assert (other.probability, other.target) == (plain.probability, plain.target)
        assert np.array_equal(other.map, plain.map)
        red, green, _ = plain.source.getpixel((3, 3))
        assert other.source.getpixel((3, 3))[1:] == (green, green) != (red, green)


def test_what_is_missing_is_asked_for_in_one_line():
    for kind in ("cnn", "timm"):
        with pytest.raises(ValueError, match="mean: .*reads images of 13 channels.*give mean="):
            load_backbone(network(13, kind), input_size=32)
    with pytest.raises(
        ValueError, match=r"a photo has 3 channels, but the network takes 13; give tensors"
    ):
        xattn.explain(Image.new("RGB", (40, 40)), loaded(13), explainer="occlusion")
