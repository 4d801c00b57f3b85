"""Recall on a ViT: the control is as large as the choice, and the command's table has its rows."""

import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from xattn.attention import Inputs, create_mechanism
from xattn.attention.model.spec import Conversion, parse_mechanism
from xattn.backbone import converted, load_backbone
from xattn.backbone.conversion import save_conversion
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.block_recall import measured, random_choice, study

SMALL = "infllm_v2:block=2,stride=1,dense_below=0,selected=4,local=0"


def inputs(grid=(5, 7), prefix=1):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, prefix + math.prod(grid), 8, generator=generator)
    return Inputs(q, k, v, None, grid, prefix)


def layer(setting):
    name, options = parse_mechanism(setting)
    return create_mechanism(name, 24, 3, **options)


def photos(folder, count):
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def weights(path):
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), path)
    return path


@pytest.fixture
def backbone(tmp_path):
    return load_backbone("test_vit", weights(tmp_path / "w.pth"), class_names=("a", "b", "c"))


def test_random_blocks_are_as_many_with_the_same_ones_always_read():
    asked = inputs()
    for name, options in [
        ("infllm_v2", {"block": 2, "stride": 1, "dense_below": 0, "selected": 10}),
        ("llsa", {"block": 2, "selected": 3, "levels": 2}),
    ]:
        choice = create_mechanism(name, 24, 3, **options).choice(asked)
        found = random_choice(choice, asked, torch.Generator().manual_seed(0))
        count = len(choice.tokens(asked)) // 4
        table = found.table(count)
        assert torch.equal((found.blocks.index >= 0).sum(3), (choice.blocks.index >= 0).sum(3))
        assert torch.equal(table.sum(3), (found.blocks.index >= 0).sum(3))  # none twice
        assert (table | ~choice.always(count)).all() and not torch.equal(table, choice.table(count))
        empty = (choice.tokens(asked).view(count, 4) < 0).all(1)
        assert not table[..., empty].any()
        assert empty.any() == (name == "llsa")


def test_what_is_measured_of_a_layer_is_the_recall_of_its_mechanism():
    asked, generator = inputs(), torch.Generator().manual_seed(0)
    found = measured(layer(SMALL), asked, generator)
    for forced in (True, False):
        expected = layer(SMALL).recall(asked.q, asked.k, (5, 7), 1, forced=forced)
        assert torch.allclose(found.values[forced][:, 0], expected.blocks.mean(1))
        assert torch.allclose(found.values[forced][:, 1], expected.mass.mean(1))
    assert (found.read, found.count) == (4.0, 12)
    assert measured(layer("hip"), asked, generator) is None
    assert measured(layer("llsa:block=2"), asked, generator).values.keys() == {True}


def test_the_layers_of_a_trained_conversion_are_measured(backbone, tmp_path):
    layers = (1, 3)
    network = converted(backbone, "dma", layers, {"window": 2})
    blocks = network.model.blocks
    for i in layers:
        torch.nn.init.ones_(blocks[i].attn.mechanism.a)
    state = {
        f"blocks.{i}.attn.mechanism.{name}": value.detach()
        for i in layers
        for name, value in blocks[i].attn.mechanism.named_parameters()
    }
    made = Conversion("dma", layers, {"window": 2})
    folder = save_conversion(tmp_path / "conversion", backbone, made, state, {})
    lines = list(
        study(backbone, photos(tmp_path / "photos", 2), (32,), 2, [str(folder), "dma:window=2"])
    )
    trained, plain = (line for line in lines if line.startswith("| `"))
    assert trained.split("|")[2] == plain.split("|")[2] and trained[-60:] != plain[-60:]


def test_the_command_prints_a_line_for_each_setting(tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc")
    command = ["recall", str(photos(tmp_path / "photos", 3)), "-b", "test_vit"]
    command += ["--weights", str(weights(tmp_path / "w.pth")), "--class-names", str(names)]
    command += ["--photos", "2", "--sizes", "160", "96", "--settings", SMALL, "hip", "llsa:block=2"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "2 photos" in out and "96 px, 6 x 6 patches" in out
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| `")]
    assert [row[1:3] for row in rows[:2]] == [
        ["4.0 of 25", "all"],
        ["4.0 of 25", "beside those always read"],
    ]
    assert rows[2][1] == "all: dense" and rows[3][1:3] == ["8.0 of 25", "all"]
    for row in (rows[0], rows[1], rows[3]):
        for cell in row[3:]:
            mean, error = (float(x) for x in cell.split(" ± "))
            assert 0 < mean <= 100 and 0 <= error < 50
    assert len(rows) == 8


def test_what_cannot_be_measured_is_named(backbone, tmp_path):
    folder = photos(tmp_path / "photos", 2)
    with pytest.raises(ValueError, match="photos: got 1 of 2; give at least 2"):
        list(study(backbone, folder, photos=1))
    with pytest.raises(ValueError, match="mechanism: gna does not choose blocks"):
        list(study(backbone, folder, (96,), settings=["gna:kernel=3"]))
    other = load_backbone("test_resnet", None)
    with pytest.raises(ValueError, match="choose a ViT of timm"):
        list(study(other, folder, (160,)))
    with pytest.raises(ValueError, match="choose a ViT of timm without --mechanism"):
        list(study(converted(backbone, "gna", None, {"kernel": 3}), folder, (160,)))
