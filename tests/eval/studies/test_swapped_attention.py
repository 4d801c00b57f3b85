"""Swapped attention: each network of a run sees the same photos, and what is called training-free is measured."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from xattn.attention import converted_copy, list_attention, mechanism_class
from xattn.backbone import load_backbone
from xattn.cli import main
from xattn.eval.studies.swapped_attention import SWAPS, Swap, accuracy
from xattn.photos.images import load_image
from xattn.photos.view import prepare

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared" / "data"
NAMES = ("tench", "goldfish", "great white shark")


@pytest.fixture
def photos(tmp_path):
    for i in range(7):
        folder = tmp_path / NAMES[i % 3]
        folder.mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def weights(path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    torch.save(model.state_dict(), path)
    return path


def test_right_and_same_are_those_of_each_network_alone(photos, tmp_path):
    backbone = load_backbone("test_vit", weights(tmp_path / "w.pth"), classes=NAMES)
    swaps = (Swap("softmax"), Swap("gna", {"kernel": 3}, 0.5))
    right, same = accuracy(backbone, photos, "folders", every=2, swaps=swaps)
    files = sorted(photos.glob("*/*.png"))[::2]
    images = torch.stack([prepare(load_image(f), backbone.preprocessing, "crop")[0] for f in files])
    half = range(len(backbone.model.blocks) // 2)
    networks = [
        backbone,
        converted_copy(backbone, "softmax"),
        converted_copy(backbone, "gna", half, {"kernel": 3}),
    ]
    with torch.no_grad():
        classes = torch.stack([n.logits(images).argmax(1) for n in networks], 1)
    truth = torch.tensor([NAMES.index(f.parent.name) for f in files])
    assert torch.equal(right, classes == truth[:, None])
    assert torch.equal(same, classes == classes[:, :1]) and same[:, :2].all()
    assert not any(hasattr(m, "mechanism") for m in backbone.modules())


def test_photos_without_a_class_are_named(photos, tmp_path):
    backbone = load_backbone("test_vit", weights(tmp_path / "w.pth"), classes=["a", "b", "c"])
    with (
        pytest.warns(UserWarning, match="no photo has a class"),
        pytest.raises(ValueError, match="none of 7 photos has a class of test_vit"),
    ):
        accuracy(backbone, photos, "folders")


def test_the_command_prints_a_row_for_every_swap(photos, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    file = weights(tmp_path / "w.pth")
    command = ["study", "swap", "--data", str(photos), "-b", "test_vit", "--weights", str(file)]
    assert main([*command, "--classes-file", str(tmp_path / "names.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0][2:] for line in lines[4:]] == [
        "as trained",
        *(s.label for s in SWAPS),
    ]


def test_what_is_called_training_free_is_measured_and_the_readme_says_so():
    measured = {swap.name for swap in SWAPS}
    assert measured <= set(list_attention())
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", text, re.M))
    for name in list_attention():
        free = mechanism_class(name).entry.training_free
        assert rows[name].startswith("training-free" if free else "needs training")
        assert not free or (name in measured and re.search(r"\d+(\.\d+)? %", rows[name]))


@pytest.mark.slow
def test_what_is_called_training_free_keeps_most_of_the_accuracy_of_a_trained_vit():
    file = SHARED / "vit-tiny" / "vit_tiny_patch16_224.safetensors"
    if not file.is_file():
        pytest.skip("needs ../shared/data/vit-tiny")
    backbone = load_backbone("vit_tiny_patch16_224", file)
    sample = SHARED / "imagenet-sample"
    right, _ = accuracy(backbone, sample, sample / "classes.json", every=5)
    share = right.double().mean(0)
    for swap, kept in zip(SWAPS, share[1:] / share[0], strict=True):
        if swap.share == 1:
            assert (kept > 0.8) == mechanism_class(swap.name).entry.training_free, swap.label
