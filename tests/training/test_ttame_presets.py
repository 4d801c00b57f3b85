"""The published settings: taps, parameter counts, and a dry run with random weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from xattn.backbone import load_backbone
from xattn.cli import main
from xattn.config import PRESETS, preset
from xattn.heads import create_head

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


def test_two_steps_of_a_preset(tmp_path, capsys):
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (tmp_path / "p").mkdir(exist_ok=True)
        Image.fromarray(noise).resize((240, 240)).save(tmp_path / f"p/{i}.png")
    command = ["train", "--preset", "ttame-resnet50", "--weights", "random", str(tmp_path / "p")]
    short = ["--epochs", "1", "--batch-size", "2", "--workers", "0", "--device", "cpu"]
    assert main([*command, *short, "--output", str(tmp_path / "run")]) == 0
    assert "2 steps" in capsys.readouterr().out


def test_unknown_presets_name_near_ones():
    with pytest.raises(ValueError, match="ttame-vgg16"):
        preset("ttame-vgg")
