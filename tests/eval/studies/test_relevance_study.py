"""The study of relevance: its measure by definition, its rows, and that chosen photos are not scored."""

import csv
import warnings

import pytest
import torch
from PIL import Image

from xattn.backbone import load_backbone
from xattn.eval.metrics.base import Column, Sample
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.relevance import ROWS, Shifted, SymmetricGain, Without
from xattn.explainers import Explainer, create_explainer


def test_srg_of_a_sum_over_squares_is_that_of_its_order():
    weights = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    image, mean = torch.ones(3, 8, 8), (0.0, 0.0, 0.0)

    def score(x):
        cells = x.mean(0).view(2, 4, 2, 4).mean((1, 3)).flatten().double()
        return float(cells @ weights)

    raw = weights.float().view(1, 2, 2).repeat_interleave(4, 1).repeat_interleave(4, 2)
    sample = Sample(image, raw, raw, target=0, score=score(image))
    metric = SymmetricGain(mean, patch=4, steps=4)
    scores, run = {"MoRF": [], "LeRF": []}, metric.measure(sample)
    while True:
        try:
            request = next(run)
        except StopIteration as stop:
            finish = stop.value
            break
        scores[request.key].append(score(request.image))
    found = finish({key: torch.tensor(values) for key, values in scores.items()})
    most = [4.5, 1.5, -0.5, -1.0, 0.0]  # without 3, 2, 0.5, -1
    least = [4.5, 5.5, 5.0, 3.0, 0.0]
    areas = [sum(curve[1:-1]) / 4 + (curve[0] + curve[-1]) / 8 for curve in (least, most)]
    assert found[Column("LeRF")] == pytest.approx(areas[0])
    assert found[Column("MoRF")] == pytest.approx(areas[1])
    assert found[Column("SRG")] == pytest.approx(areas[0] - areas[1])


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    net = load_backbone("test_vit", weights=None, input_size=64, num_classes=5)
    with torch.no_grad():
        for parameter in net.parameters():  # biases, too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def test_each_rule_that_is_off_changes_the_map(vit):
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = create_explainer("libragrad", vit).attribute(images, 2)
    assert torch.equal(Without(vit).attribute(images, 2), whole)
    maps = [whole]
    for off in ("attention", "LayerNorm", "activation", "biases", "all"):
        with warnings.catch_warnings(action="ignore"):  # of what such a network loses
            maps.append(Without(vit, off=off).attribute(images, 2))
    for i, one in enumerate(maps):
        assert all((one - other).abs().max() > 1e-4 * one.abs().max() for other in maps[:i])


class Brightness(Explainer):
    name = "brightness"

    def _attribute(self, images, target):
        return images.mean(1, keepdim=True)


def test_shifted_maps_are_shifted_back(vit):
    images = torch.rand(2, 3, 64, 64)
    found = Shifted(vit, of=Brightness(vit)).attribute(images, 2)
    assert torch.allclose(found, images.mean(1, keepdim=True))


def test_rows_are_read_again_and_photos_of_even_place_are_not_scored(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("xattn.eval.studies.relevance.PART", 1)  # alone, a photo has no folder
    for i in range(6):
        pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
        (tmp_path / str(i)).mkdir()
        Image.fromarray(pixels.numpy()).save(tmp_path / str(i) / "x.png")
    rows = ["centre", "FullGrad+, LibraGrad", "FullGrad+, no rules", "four shifts of zero"]
    words = ["relevance", str(tmp_path), "--backbone", "test_vit", "--weights", "random"]
    words[-1] = str(tmp_path / "weights.pth")
    torch.save(load_backbone("test_vit", weights=None).model.state_dict(), words[-1])
    words += ["--input-size", "64", "--output", str(tmp_path / "out"), "--photos", "2"]
    words += ["--steps", "2", "--rows"]
    assert main([*words, *rows]) == 0
    folder = tmp_path / "out" / "test_vit"
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("results.json")}
    assert len(kept) == 4 * len(rows)
    assert main([*words, *rows, "random"]) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    text = (folder / "report.md").read_text()
    assert "| a | FullGrad+, no rules | FullGrad+, LibraGrad |" in text and "| random |" in text
    with open(folder / "values.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * (len(rows) + 1)
    assert {row["photo"] for row in table} < {"1/x.png", "3/x.png", "5/x.png"}
    assert all(row["SRG"] for row in table)
    assert (
        main([*words, "centre", "gamma, at pixels", "--pictures", str(tmp_path / "0" / "x.png")])
        == 0
    )
    with Image.open(folder / "maps.png") as sheet:
        assert sheet.width > 3 * 150  # the photo and two maps
    capsys.readouterr()
    assert main([*words, "nothing"]) == 2
    assert "rows: got 'nothing'; give some of random" in capsys.readouterr().err


def test_every_row_of_a_vit_has_its_explainer(vit):
    for label, row in ROWS["vit"].items():
        if row.off == "none":
            row.make(vit)
        assert "/" not in label  # it is a folder
