"""The published settings: taps, parameter counts, and a dry run with random weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from xattn.backbone import load_backbone
from xattn.cli import main
from xattn.config import PRESETS, TrainConfig, preset
from xattn.heads import create_head
from xattn.training.objectives.base import Step
from xattn.training.objectives.mask import Mask

# specs: sum_i (C_i^2 + 3 C_i) + K sum C_i + K with K = 1000.
PUBLISHED = {
    "ttame-vgg16": (1_874_664, [(256, 28, 28), (512, 14, 14), (512, 7, 7)]),
    "ttame-resnet50": (9_100_776, [(512, 28, 28), (1024, 14, 14), (2048, 7, 7)]),
    "ttame-vit-b16": (4_081_384, [(768, 14, 14)] * 3),
}


@pytest.mark.parametrize("name", PRESETS)
def test_taps_and_parameter_counts_are_the_published_ones(name):
    chosen, (count, shapes) = preset(name), PUBLISHED[name]
    backbone = load_backbone(chosen.backbone, weights=None, taps=chosen.taps)
    sizes = [(c, *s) for c, s in zip(backbone.channels, backbone.tap_sizes, strict=True)]
    assert sizes == shapes
    head = create_head(chosen.head, backbone, **chosen.options)
    assert sum(p.numel() for p in head.parameters()) == count
    assert head.mask_policy == ("normalized" if "vit" in name else "raw_normalize")


@torch.no_grad()
def test_pooled_taps_are_the_tensors_behind_vggs_pools():
    backbone = load_backbone("vgg11", weights=None, input_size=64, taps=["stage.2.pool", "stage.3"])
    x = torch.rand(1, 3, 64, 64)
    pooled, inner = backbone(x).maps
    features, seen = backbone.normalize(x), []
    for layer in backbone.model.features:
        features = layer(features)
        if isinstance(layer, torch.nn.MaxPool2d):
            seen.append(features)
    assert torch.equal(pooled, seen[2])
    assert torch.equal(F.max_pool2d(inner, 2), seen[3])


@pytest.mark.parametrize(
    "name", ["ttame-resnet50", pytest.param("ttame-vgg16", marks=pytest.mark.slow)]
)
def test_two_steps_of_a_preset(name, tmp_path, capsys):
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (tmp_path / "p").mkdir(exist_ok=True)
        Image.fromarray(noise).resize((240, 240)).save(tmp_path / f"p/{i}.png")
    command = ["train", "--preset", name, "--weights", "random", str(tmp_path / "p")]
    short = ["--epochs", "1", "--batch-size", "2", "--workers", "0", "--device", "cpu"]
    assert main([*command, *short, "--output", str(tmp_path / "run")]) == 0
    assert "2 steps" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ttame-resnet50", "ttame-vgg16"])
def test_the_published_loss_of_a_preset_is_finite_and_trains_every_branch(name):
    """One step at 224 pixels with 1,000 classes; every term of the loss is there."""
    chosen = preset(name)
    torch.manual_seed(0)
    backbone = load_backbone(chosen.backbone, weights=None, taps=chosen.taps)
    head = create_head(chosen.head, backbone, **chosen.options)
    terms = Mask().on_photos(Step(head, backbone, torch.rand(2, 3, 224, 224), TrainConfig()))
    weights = {"cross_entropy": 1.5, "area": 2.0, "variation": 0.01}
    assert set(terms) == {"loss", *weights} and all(torch.isfinite(t) for t in terms.values())
    torch.testing.assert_close(terms["loss"], sum(w * terms[name] for name, w in weights.items()))
    terms["loss"].backward()
    sizes = [p.grad.abs().max() for p in head.parameters()]
    assert torch.isfinite(torch.stack(sizes)).all() and min(sizes[:-1]) > 0
    assert all(p.grad is None for p in backbone.model.parameters())


def test_unknown_presets_name_near_ones():
    with pytest.raises(ValueError, match="ttame-vgg16"):
        preset("ttame-vgg")
