"""The study of random features: kernels by definition, what is measured, resuming, refusals, the command."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from small_transformers import tiny

from xattn import load_backbone
from xattn.eval.studies import random_features
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.random_features import (
    MODELS,
    RandomFeatureConfig,
    agreement,
    kernel_of,
    measure,
    scaling,
    study,
    targets_of,
    tokens_of,
)

NAMES = ["cat", "dog", "fish"]
CONFIG = RandomFeatureConfig(
    heads=5, folds=2, seeds=2, examples=(8, 16), tests=12, width=4, tokens=3
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(18):
        (folder / NAMES[i % 3]).mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 90, (20, 20, 3), dtype=np.uint8)
        pixels[..., i % 3] += 120
        Image.fromarray(pixels).save(folder / NAMES[i % 3] / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny(grid=(3, 3), num_classes=3).model, class_names=NAMES)


@pytest.fixture(scope="module")
def done(photos, backbone, tmp_path_factory):
    output = tmp_path_factory.mktemp("study")
    return output, list(study(backbone, photos, None, output, CONFIG, progress=False))


def test_a_report_of_every_query_and_function(done):
    output, lines = done
    assert "18 photos of 3 classes, 2 folds, M = 5, 2 draws" in lines[0]
    for query in CONFIG.queries:
        assert sum(line.startswith(f"| random_feature, query {query} |") for line in lines) == 1
        assert sum(line.startswith(f"| {query} |") for line in lines) == 1
    assert sum(line.startswith(("| mean patch", "| class token")) for line in lines) == 4
    assert sum(line.startswith("| f") for line in lines) == 9 + 1
    assert len((output / "scaling.csv").read_text().splitlines()) == 1 + 9 * 3 * 2
    for line in lines:  # maps and rest are the logits
        if line.startswith(("| constant |", "| gap |", "| cls |")):
            float32, float64 = (float(cell) for cell in line.split("|")[3:5])
            assert float32 <= 5e-5 and float64 <= 1e-10


def test_a_stopped_study_goes_on_with_what_is_missing(done, photos, backbone, monkeypatch):
    output, lines = done
    (output / "gap" / "seed-1-fold-0.json").unlink()
    asked = []
    monkeypatch.setattr(
        random_features, "measure", lambda *args: (asked.append(args[1:3]), measure(*args))[1]
    )
    monkeypatch.setattr(random_features, "scaling", None)
    again = list(study(backbone, photos, None, output, CONFIG, progress=False))
    assert asked == [("gap", 1)]
    drop = [line for line in lines if "query gap" not in line]
    assert [line for line in again if "query gap" not in line] == drop
    with pytest.raises(ValueError, match="output: .* has other settings or photos"):
        list(study(backbone, photos, None, output, dataclasses.replace(CONFIG, heads=4)))


def test_what_does_not_fit_is_refused(photos, backbone, tmp_path):
    bare = load_backbone(tiny("none", grid=(3, 3), num_classes=3).model, class_names=NAMES)
    with pytest.raises(ValueError, match="queries: got cls; .* has no class token"):
        next(study(bare, photos, None, tmp_path / "x", CONFIG))
    assert not (tmp_path / "x").exists()


def test_maps_agree_if_they_rank_patches_alike():
    maps = torch.arange(8.0).view(2, 4).tolist()
    records = [{"seed": s, "fold": [0, 1], "maps": m} for s, m in enumerate((maps, maps))]
    assert agreement(records) == pytest.approx(1)
    records[1]["maps"] = [row[::-1] for row in maps]
    assert agreement(records) == pytest.approx(-1)
    assert np.isnan(agreement(records[:1]))


def test_functions_and_kernels_are_those_of_their_tokens():
    x_0, x = tokens_of(CONFIG, 0)
    assert x_0.shape == (28, 4) and x.shape == (28, 3, 4)
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(28, 3))
    targets = targets_of(x_0, x, 0)
    products = torch.stack([(x_0 * x[:, i]).sum(1).double() ** 2 for i in range(3)], 1).mean(1)
    expected = (products - products.mean()) / products.std(correction=0)
    torch.testing.assert_close(targets["f2, p = 2"], expected, rtol=1e-5, atol=1e-5)
    order = torch.tensor([2, 0, 1])
    for model in MODELS:
        kernel = kernel_of(model, x_0, x, 16, 5, 0)
        assert kernel.shape == (28, 16) and (torch.linalg.eigvalsh(kernel[:16]) > -1e-9).all()
        same = torch.allclose(kernel_of(model, x_0, x[:, order], 16, 5, 0), kernel, rtol=1e-4)
        assert same == (model != "RF-MLP")  # attention does not read the order


def test_attention_needs_fewer_examples_than_a_network_of_two_layers():
    config = RandomFeatureConfig(heads=60, examples=(200,), tests=200, width=6, tokens=8)
    errors = {(r["model"], r["function"]): r["mse"] for r in scaling(config, 0)}
    for function in ("f2, p = 1", "f2, p = 2", "f3, p = 1"):
        assert errors["BRFA", function] < errors["RF-MLP", function], function
    assert errors["BRFA", "f2, p = 1"] < errors["RFA", "f2, p = 1"] < 1


def test_the_command_runs_quickly(photos, backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("xattn.cli.model.BackboneArgs.load", lambda self: backbone)
    command = [
        "random-features",
        str(photos),
        "--quick",
        "--queries",
        "constant",
    ]
    command += ["--width", "4", "--tokens", "3", "--output", str(tmp_path / "out")]
    assert main(command) in (0, None)
    assert "| random_feature, query constant |" in capsys.readouterr().out
