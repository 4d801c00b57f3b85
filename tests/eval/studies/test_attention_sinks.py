"""Attention sinks: the search keeps the heads whose calibration helps, and the report has its rows."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from xattn.attention import conversion
from xattn.backbone import Backbone, load_backbone
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.attention_sinks import calibrated, judged, search_heads

NAMES = ("tench", "goldfish", "great white shark")


def weights(path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def backbone(tmp_path) -> Backbone:
    return load_backbone("test_vit", weights(tmp_path / "w.pth"), class_names=NAMES)


def test_a_head_is_kept_if_its_calibration_alone_raises_the_likelihood(backbone):
    images = torch.rand(4, 3, *backbone.preprocessing.input_size)
    classes = torch.tensor([0, 1, 2, 0])
    found = search_heads(backbone, images, classes, layers=[1], alpha=1.1)
    base = judged(backbone, images, classes)[1].mean()
    for head in range(backbone.model.blocks[1].attn.num_heads):
        alone = calibrated(backbone, {1: (head,)}, alpha=1.1)
        assert (head in found[1]) == bool(judged(alone, images, classes)[1].mean() > base)
    assert conversion(backbone.model) is None
    with pytest.raises(ValueError, match="by: got 'luck'; give 'likelihood' or 'accuracy'"):
        search_heads(backbone, images, classes, by="luck")


def test_calibrated_copies_hold_the_heads_of_each_layer(backbone):
    made = calibrated(backbone, {0: (1,), 1: (), 2: (0, 1)}, alpha=2.0)
    assert [(c.layers, c.options["heads"]) for c in conversion(made.model)] == [
        ((0,), [1]),
        ((2,), [0, 1]),
    ]
    assert calibrated(backbone, {0: ()}) is backbone


def test_the_command_prints_sinks_heads_and_maps(tmp_path, capsys):
    for i in range(4):
        folder = tmp_path / "photos" / NAMES[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    picture = tmp_path / "sinks.png"
    command = ["sinks", str(tmp_path / "photos"), "-b", "test_vit"]
    command += ["--weights", str(weights(tmp_path / "w.pth")), "--picture", str(picture)]
    assert main([*command, "--class-names", str(tmp_path / "names.txt")]) == 0
    out = capsys.readouterr().out
    assert "recall of every 8-th query" in out and "| searched heads |" in out
    assert Image.open(picture).size == (4 * 112, 2 * 112)
