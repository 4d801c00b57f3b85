"""The study of exported files and several processes: what it measures, its tables and its command."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from xattn.backbone import load_backbone
from xattn.eval.studies import exports
from xattn.eval.studies.__main__ import main
from xattn.explaining.exporting import ExplainedClassifier
from xattn.heads import create_head


def tiny():
    torch.manual_seed(0)
    backbone = load_backbone("test_resnet", weights=None, input_size=64, num_classes=5)
    return backbone, create_head("ttame", backbone).eval()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((70, 80)).save(folder / f"{i}.png")
    return sorted(folder.glob("*.png"))


@torch.no_grad()
def test_differences_are_the_largest_of_each_photo_for_both_classes(photos):
    module = ExplainedClassifier(*tiny()).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def off(images, classes):
        logits, maps = module(images, classes)
        logits, maps = logits.clone(), maps.clone()
        logits[1, 2] += 0.5
        maps[1, 0, 5, 7] -= 0.25 if classes[0] == 0 else 0.0
        return logits, maps

    rows = exports.differences(module, off, images, photos[:2])
    expected = float(module(images, torch.zeros(2, dtype=torch.long))[0][1].abs().max())
    assert [row["photo"] for row in rows] == ["photos/0.png", "photos/1.png"] * 2
    assert [row["target"] for row in rows] == ["predicted"] * 2 + ["class 0"] * 2
    assert [row["logits"] for row in rows] == pytest.approx([0, 0.5, 0, 0.5])
    assert [row["relative"] for row in rows] == pytest.approx(
        [0, 0.5 / expected, 0, 0.5 / expected]
    )
    assert [row["map"] for row in rows] == pytest.approx([0, 0, 0, 0.25])


@pytest.mark.slow
def test_a_pt2_file_is_compared_on_every_photo(photos):
    rows = exports.compared(tiny, ".pt2", photos)
    assert len(rows) == 2 * len(photos)
    assert max(row[key] for row in rows for key in ("logits", "relative", "map")) < 1e-5


def test_the_command_writes_its_tables(photos, tmp_path, monkeypatch, capsys):
    def compared(make, suffix, photos):
        off = 1e-6 if suffix == ".onnx" else 0.0
        values = {"logits": off, "relative": off, "map": 2 * off}
        return [{"photo": photo.name, "target": "predicted", **values} for photo in photos]

    def processes(photos, output):
        first = {"method": "gradcam", "scores": 3}
        return [{"photo": photo.name, **first, "score": 0.0, "p": 0.0} for photo in photos]

    monkeypatch.setattr(exports, "compared", compared)
    monkeypatch.setattr(exports, "processes", processes)
    output = tmp_path / "run"
    main(["exports", str(photos[0].parent), "--quick", "--output", str(output)])
    shown = capsys.readouterr().out
    assert "| tf_efficientnet_lite0, shipped | .pt2 | 2 | 0.0e+00 | 0.0e+00 | 0.0e+00 |" in shown
    assert "| vit_tiny_patch16_224, per_class | .onnx | 2 | 1.0e-06 | 1.0e-06 | 2.0e-06 |" in shown
    assert "4 photos, gradcam: scores differ by at most 0.0e+00" in shown
    with (output / "values.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 2 * 4
    assert len(json.loads((output / "processes.json").read_text())) == 4
