"""The image study: its measures by their definitions, and a small study from photos to tables."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import xattn
from xattn.eval.studies.attention_image import (
    METRICS,
    ImageStudyConfig,
    Run,
    check_photos,
    deletion,
    gradient,
    pixel_gradients,
    study,
)
from xattn.heads import Tokens, create_head
from xattn.photos.images import load_image
from xattn.photos.view import prepare


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return xattn.load_backbone("test_vit", weights=None, num_classes=4, taps="head")


@pytest.fixture(scope="module")
def head(backbone):
    torch.manual_seed(1)
    head = create_head("efficient_probe", backbone, queries=4).eval()
    with torch.no_grad():
        head.queries.normal_()
        head.classifier.weight.normal_()
    return head


def tokens_of(count=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Tokens(
        (torch.randn(1, count, 64, generator=generator),), torch.zeros(1, 0, 64), (3, count // 3)
    )


def test_deletion_is_the_drop_when_a_token_is_not_there(head):
    tokens = tokens_of()
    with torch.no_grad():
        found = deletion(head, tokens, 2)
        whole = head.logits(tokens).softmax(1)[0, 2]
        for n in range(9):
            left = torch.cat([tokens.patches[0][:, :n], tokens.patches[0][:, n + 1 :]], 1)
            without = Tokens((left,), tokens.prefix, (2, 4))
            expected = whole - head.logits(without).softmax(1)[0, 2]
            torch.testing.assert_close(found[n], expected, rtol=1e-4, atol=1e-6)


def test_gradient_is_the_norm_of_the_losss_slope_by_each_token(head):
    tokens, target = tokens_of(), torch.tensor([1])
    found = gradient(head.double(), Tokens((tokens.patches[0].double(),), *tokens[1:]), target)
    x = tokens.patches[0].double()
    for n in (0, 5):
        slope = torch.zeros(64).double()
        for d in range(64):
            step = torch.zeros_like(x)
            step[0, n, d] = 1e-5
            up, down = (
                F.cross_entropy(head.logits(Tokens((x + s,), *tokens[1:])), target)
                for s in (step, -step)
            )
            slope[d] = (up - down) / 2e-5
        torch.testing.assert_close(found[n], slope.norm(), rtol=1e-5, atol=1e-8)
    head.float()


def test_pixel_gradients_are_the_slopes_by_the_pixels_of_each_cell(backbone, head, tmp_path):
    torch.manual_seed(2)
    other = create_head("efficient_probe", backbone, queries=2).eval()
    size = backbone.preprocessing.input_size
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3)).astype(np.uint8)
    photo, target = tmp_path / "photo.png", torch.tensor([1])
    Image.fromarray(pixels).save(photo)
    found = pixel_gradients(backbone, photo, [head, other], target)
    x = prepare(load_image(photo), backbone.preprocessing)[0][None].requires_grad_()
    for kind, slopes in zip((head, other), found, strict=True):
        tokens = kind.tokens(backbone(x))
        slope = torch.autograd.grad(F.cross_entropy(kind.logits(tokens), target), x)[0][0]
        (h, w), side = tokens.grid, size[0] // tokens.grid[0]
        cells = slope.reshape(3, h, side, w, side).square().mean((2, 4)).sum(0).sqrt()
        torch.testing.assert_close(slopes, cells.flatten(), rtol=1e-4, atol=1e-8)


@pytest.fixture
def photos(tmp_path):
    """Three classes of coloured noise, and photos with a square object."""
    generator = np.random.default_rng(0)
    for k in range(3):
        (tmp_path / "photos" / f"class{k}").mkdir(parents=True)
        for i in range(6):
            pixels = generator.integers(0, 120, (64, 64, 3))
            pixels[..., k] += 120
            path = tmp_path / "photos" / f"class{k}" / f"{k}-{i}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    for name in ("images", "masks"):
        (tmp_path / "objects" / name).mkdir(parents=True)
    for i in range(3):
        pixels = generator.integers(0, 255, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "objects" / "images" / f"{i}.jpg")
        mask = np.zeros((64, 64), np.uint8)
        mask[16:48, 8 : 30 + i] = 17 if i else 200  # a cat, or something that is no thing
        Image.fromarray(mask).save(tmp_path / "objects" / "masks" / f"{i}.png")
    return tmp_path


RUNS = [Run("net", "head", method, fold) for fold in range(2) for method in ("none", "at")]


def values_of(run):
    numbers = np.arange(run.fold, 7, 2)
    names = np.array([f"c/{i}.jpg" for i in numbers])
    return {"photos": numbers, "names": names, "energy": np.zeros(3)}


def test_runs_on_equal_photos_may_be_compared_with_or_without_names():
    stored = {run: values_of(run) for run in RUNS}
    check_photos(stored)
    del stored[RUNS[0]]["names"]
    check_photos(stored)


@pytest.mark.parametrize(
    ("run", "key", "value", "message"),
    [
        (1, "photos", np.array([0, 2, 4, 5]), "net-head-at-0.npz and net-head-none-0.npz tested"),
        (1, "photos", np.array([0, 2, 4]), "tested other photos"),
        (
            3,
            "names",
            np.array(["c/1.jpg", "d/3.jpg", "c/5.jpg"]),
            "at-1.npz and .*none-1.npz tested",
        ),
        (1, "energy", np.zeros(2), "at-0.npz tested other photos with objects"),
    ],
)
def test_runs_on_other_photos_are_not_compared(run, key, value, message):
    stored = {run: values_of(run) for run in RUNS}
    stored[RUNS[run]][key] = value
    with pytest.raises(ValueError, match=f"output: .*{message}"):
        check_photos(stored)


@pytest.mark.parametrize(
    ("numbers", "message"), [([1, 3, 4], "photo 4 is tested 2"), ([1, 5], "photo 3 is tested 0")]
)
def test_a_photo_is_tested_once(numbers, message):
    stored = {run: values_of(run) for run in RUNS}
    for run in RUNS[2:]:
        stored[run] |= {"photos": np.array(numbers), "names": np.array(numbers)}
    with pytest.raises(ValueError, match=f"{message} times in the folds of net head"):
        check_photos(stored)


def test_an_unknown_head_is_refused_before_any_work(photos):
    config = ImageStudyConfig(heads=("efficient_probe", "ttame"))
    with pytest.raises(ValueError, match="heads: 'ttame' does not pool"):
        next(study(photos / "photos", photos / "objects", None, photos / "out", config))
    assert not (photos / "out").exists()


@pytest.mark.slow
def test_a_small_study_ends_in_tables_and_goes_on(photos):
    config = ImageStudyConfig(
        backbones=("tf_efficientnet_lite0",),
        heads=("efficient_probe",),
        methods=("none", "at"),
        folds=3,
        input_size=64,
    )
    arguments = photos / "photos", photos / "objects", None, photos / "out"
    lines = list(study(*arguments, config))
    runs = [line for line in lines if " fold " in line]
    assert len(runs) == 6
    assert sum("| efficient_probe |" in line for line in lines) == 2
    records = json.loads((photos / "out" / "results.json").read_text())
    assert [r["method"] for r in records] == ["none", "at"]
    assert all(np.isfinite(records[0][name]["mean"]) for name in METRICS)
    assert records[0]["accuracy"]["n"] == 18 and records[0]["energy"]["n"] == 2
    part = photos / "out" / "tf_efficientnet_lite0-efficient_probe-at-1.npz"
    with np.load(part) as stored:
        assert all(name.startswith("class") for name in stored["names"])
        values = dict(stored)
    part.unlink()
    again = list(study(*arguments, config))
    assert [line for line in again if " fold " in line] == [runs[3]]
    assert again[1:] == lines[6:]
    with part.open("wb") as stream:
        np.savez(stream, **{**values, "photos": values["photos"] + 1})
    with pytest.raises(ValueError, match="tested other photos"):
        list(study(*arguments, config))
    with pytest.raises(ValueError, match="other settings or photos"):
        list(study(*arguments, ImageStudyConfig(folds=4)))
