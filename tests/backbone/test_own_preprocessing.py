"""A model's own mean, std, crop and interpolation: used, recorded, and part of what keys compare."""

import warnings

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image

import xattn
from xattn import create_head, load_backbone
from xattn.cli import main
from xattn.photos.view import prepare

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3).eval()


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_the_models_own_mean_and_std_are_used(model):
    own = load_backbone(model, input_size=64)
    given = load_backbone(model, input_size=64, mean=MEAN, std=STD)
    x = (IMAGES - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.allclose(given.logits(IMAGES), model(x), atol=1e-6)
    assert not torch.allclose(given.logits(IMAGES), own.logits(IMAGES), atol=1e-3)
    one = load_backbone(model, input_size=64, mean=0.5, std=(0.5,))
    assert one.preprocessing.mean == one.preprocessing.std == (0.5, 0.5, 0.5)


def test_crop_and_interpolation_are_those_of_the_photos_view(model, photo):
    backbone = load_backbone(model, input_size=64, crop=1.0, interpolation="nearest")
    with Image.open(photo) as image:
        pixels, _ = prepare(image, backbone.preprocessing)
        expected = image.resize((80, 64), Image.Resampling.NEAREST).crop((8, 0, 72, 64))
    assert torch.equal(pixels, torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255)


def test_another_normalization_is_another_fingerprint_and_its_own_is_none(model):
    own = load_backbone(model, input_size=64)
    given = load_backbone(model, input_size=64, mean=MEAN)
    same = load_backbone(model, mean=own.preprocessing.mean, std=own.preprocessing.std)
    assert own.fingerprint == xattn.backbone.sha256(model) == same.fingerprint
    assert given.fingerprint not in (own.fingerprint, load_backbone(model, std=STD).fingerprint)
    assert given.with_taps("head").fingerprint == given.fingerprint
    assert given.with_preprocessing(own.preprocessing).fingerprint == own.fingerprint
    # Another crop shows other photos to the same network.
    assert load_backbone(model, crop=1).fingerprint == own.fingerprint
    assert own.preprocessing_record() == {}
    assert given.preprocessing_record() == {"preprocessing": {"mean": list(MEAN)}}


def test_a_head_of_another_normalization_is_refused_with_the_remedy(model, tmp_path):
    own = load_backbone(model, input_size=64)
    given = load_backbone(model, input_size=64, mean=MEAN, std=STD)
    xattn.save_head(create_head("ttame", given), tmp_path / "given")
    xattn.save_head(create_head("ttame", own), tmp_path / "own")
    xattn.load_head(tmp_path / "given", given)
    with pytest.raises(ValueError, match=r"was trained with mean=\[0.1, 0.2, 0.3\].*--mean"):
        xattn.load_head(tmp_path / "given", own)
    with pytest.raises(ValueError, match=r"own mean.*leave out mean= \(--mean\)"):
        xattn.load_head(tmp_path / "own", given)


def test_flags_of_every_command_reach_the_backbone_and_the_record(tmp_path, photo):
    flags = "--mean .5 --std 0.25 0.25 0.25 --crop-pct 0.9 --interpolation lanczos".split()
    line = ["-b", "test_resnet", "--weights", "random", "--device", "cpu", "--input-size", "64"]
    line += ["--explainers", "gradcam", "--output", str(tmp_path / "pack")]
    assert main(["explain", str(photo), *line, *flags]) == 0
    record = xattn.load_pack(tmp_path / "pack")[0].protocol["backbone"]["preprocessing"]
    assert record["std"] == [0.25] * 3 and record["crop_pct"] == 0.9
    assert record["interpolation"] == "lanczos"


# ------------------------------------------------------------------ modules as they are


def test_a_torchvision_module_is_taken_as_it_is_and_what_it_does_not_say_is_said():
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=4).eval()
    with pytest.warns(
        UserWarning, match=r"ResNet does not define.*ImageNet's.*give mean= and std="
    ):
        backbone = load_backbone(net, input_size=64)
    assert backbone.taps[-1].startswith("layer4") and backbone.pools_linearly
    assert torch.allclose(backbone.logits(IMAGES), net(backbone.normalize(IMAGES)), atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = load_backbone(
            net, None, ["layer3"], input_size=64, mean=MEAN, std=STD, class_names=list("abcd")
        )
    assert named.class_names == list("abcd") and named.taps == ("layer3.1.relu",)


def test_a_torchvision_vit_is_tapped_where_its_last_blocks_read():
    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(32, 16, 4, 2, 24, 48, num_classes=4)
    torch.nn.init.normal_(net.heads.head.weight)  # torchvision starts from zeros
    backbone = load_backbone(net, mean=MEAN, std=STD)
    assert backbone.preprocessing.input_size == (32, 32)
    assert backbone.taps == tuple(f"encoder.layers.encoder_layer_{i}.ln_1" for i in (1, 2, 3))
    assert (
        xattn.create_explainer("gradcam", backbone, relu=False)
        .attribute(IMAGES[..., :32, :32], 1)
        .any()
    )


def test_a_module_that_says_its_preprocessing_is_believed():
    class Own(torch.nn.Sequential):
        preprocessing = xattn.Preprocessing((32, 48), MEAN, STD)

    net = Own(torch.nn.Conv2d(3, 4, 8, 8), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone = load_backbone(net)
    assert backbone.preprocessing == Own.preprocessing and backbone.num_classes == 4


def test_a_grey_network_says_what_to_give():
    net = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    with pytest.raises(
        ValueError, match=r"mean: test_resnet reads images of 1 channels.*give mean="
    ):
        load_backbone(net, input_size=32)
    backbone = load_backbone(net, input_size=32, mean=0.5, std=0.5)
    assert backbone.logits(IMAGES[:, :1]).shape == (2, 3)
