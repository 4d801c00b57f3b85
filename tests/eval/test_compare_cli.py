"""``xattn compare`` as a user runs it: plan, report, resume, refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from xattn.cli import main

MODEL = ["--backbone", "test_resnet", "--weights", "random", "--input-size", "64"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        coarse = np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((80, 70), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no photo")
    return folder


def compare(photos, output, *more):
    torch.manual_seed(0)  # of the random weights
    arguments = ["compare", str(photos), *MODEL, "--output", str(output)]
    return main([*arguments, "--batch-size", "8", *more])


CHEAP = ["--explainers", "gradcam", "saliency", "--metrics", "masking", "complexity"]


def test_all_metrics_of_passing_and_perturbing_explainers(photos, tmp_path, capsys):
    more = ["--explainers", "gradcam", "rise", "--options", "rise.masks=20", "--metrics", "all"]
    assert compare(photos, tmp_path / "out", *more) == 0
    out, err = capsys.readouterr()
    assert "plan: at most" in err and "forward passes for 6 methods on 4 images" in err
    assert "# Leaderboard" in out and "| rise " in out and "report.html" in out
    data = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert [image["id"] for image in data["images"]] == ["0.png", "1.png", "2.png"]
    assert [s["id"] for s in data["skipped"]] == ["broken.png"]
    cells = {(s["method"], s["column"]): s for s in data["standings"]}
    assert cells["gradcam", "max-sensitivity"]["n"] == 3
    assert cells["rise", "max-sensitivity"]["n"] == 2, "explains again on two images only"
    assert cells["rise", "ROAD"]["n"] == 3 and "randomization-SSIM" in data["options"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "randomized_gradcam" in page and "rise" in page


def test_the_state_of_other_arguments_is_refused_and_kept(photos, tmp_path, capsys):
    assert compare(photos, tmp_path / "out", *CHEAP) == 0
    before = (tmp_path / "out" / "leaderboard.json").read_bytes()
    assert compare(photos, tmp_path / "out", *CHEAP, "--seed", "1") == 2
    err = capsys.readouterr().err
    assert "belongs to another run; it differs in" in err and "protocol; give another file" in err
    assert (tmp_path / "out" / "leaderboard.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--options", "rise.masks=3"], "options: got 'rise.masks=3'"),
        (["--metrics", "localization"], "localization needs the positions of objects"),
    ],
)
def test_bad_arguments_are_named(photos, tmp_path, capsys, more, message):
    assert compare(photos, tmp_path / "out", "--explainers", "gradcam", *more) == 2
    assert message in capsys.readouterr().err


def test_explainers_that_a_backbone_does_not_allow_are_left_out_of_all(photos, tmp_path, capsys):
    options = [
        "rise.masks=8",
        "lime.samples=30",
        "kernel_shap.samples=120",
        "integrated_gradients.steps=2",
        "smoothgrad.samples=2",
        "gradient_shap.samples=2",
        "igos_pp.steps=1",
        "igos_pp.path=2",
        "dave.copies=2",
    ]
    more = ["--explainers", "all", "--metrics", "complexity", "--limit", "2", "--options", *options]
    assert compare(photos, tmp_path / "out", *more) == 0
    out, err = capsys.readouterr()
    assert "left out rollout" in err
    assert "left out extremal_perturbation: it needs 4,000 passes with gradients" in err
    assert "left out mda: it needs 5,488 passes;" in err
    shown = ("cam", "scorecam", "lrp", "occlusion", "kernel_shap", "guided_backprop", "igos_pp")
    for name in shown:
        assert f"| {name} " in out


def test_heads_take_options_and_say_what_they_were_trained_on(photos, tmp_path, capsys):
    from xattn import create_head, load_backbone, save_head

    torch.manual_seed(0)
    backbone = load_backbone("test_resnet", weights=None, input_size=64)
    trained = {
        "a": {"config": {"objective": "masking"}},
        "b": {"config": {"objective": "outcomes"}},
    }
    folders = [
        str(save_head(create_head("lcam", backbone), tmp_path / name, summary))
        for name, summary in trained.items()
    ]
    heads = ["--heads", *folders, "--explainers", "gradcam", "--metrics", "masking", "--limit", "2"]
    options = ["--options", "head.passes=2", "b.passes=4"]
    assert compare(photos, tmp_path / "out", *heads, *options) == 0
    assert (
        "randomized_head: the head of the row a, on a network with random weights"
        in capsys.readouterr().err
    )
    data = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    forwards = {name: method["forwards"] for name, method in data["methods"].items()}
    assert (forwards["a"], forwards["b"], forwards["randomized_head"]) == (2, 4, 2)
    objectives = {name: method["objective"] for name, method in data["methods"].items()}
    assert objectives.pop("randomized_head") == objectives.pop("a") == "masking"
    assert objectives.pop("b") == "outcomes" and set(objectives.values()) == {None}
    assert compare(photos, tmp_path / "no", *heads, "--options", "c.passes=4") == 2
    assert "options: got 'c.passes=4'; write name.option=value" in capsys.readouterr().err
