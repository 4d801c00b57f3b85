"""The one command language: spellings, photos, heads of runs, output folders, quiet pipes."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import xattn
from xattn.cli import main
from xattn.cli.entry import COMMANDS
from xattn.runtime.arguments import choose, options_of

MODEL = "-b test_resnet --weights random --input-size 64 --device cpu"


def read(line: str):
    return choose(COMMANDS, shlex.split(line), "xattn", "")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path


def run(line: str) -> int:
    return main(shlex.split(line))


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("explain a --top 2 b --view whole c", "explain a b c --top 2 --view whole"),
        ("explain a --top 2 --top 3", "explain a --top 3"),
        ("explain --taps 1 --taps 2 3 --top=1", "explain --taps 2 3 --top=1"),
        ("explain a --batch_size 4", "explain --batch-size=4 a"),
        ("explain --top 2 -- -a.jpg", "explain ./-a.jpg --top 2"),
        ("evaluate a --no-overwrite", "evaluate a"),
    ],
)
def test_options_and_photos_stand_in_any_order_and_the_last_one_counts(line, same):
    assert read(line) == read(same)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("explain a --smoothing x", "smoothing: got 'x'; give a number"),
        ("diff a", "packs: got 1; give 2"),
        ("app a b", "argument: got 'b'; xattn app takes 1 without an option, see xattn app --help"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(line, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read(line)


def test_an_option_that_begins_with_no_is_no_opposite_of_another():
    assert read("app --no-token").no_token and not read("app").no_token


def test_the_help_of_every_command_says_what_each_option_is_for(capsys):
    for name, command in COMMANDS.items():
        with pytest.raises(SystemExit) as end:
            read(f"{name} --help")
        text = " ".join(capsys.readouterr().out.split())
        assert end.value.code == 0 and " ".join(command.__doc__.split()) in text
        for option in options_of(command):
            assert option.positional or option.flag in text
    assert "How many of the most probable classes to explain (default: 1)" in help_of(
        "explain", capsys
    )


def help_of(name, capsys):
    with pytest.raises(SystemExit):
        read(f"{name} --help")
    return " ".join(capsys.readouterr().out.split())


def test_a_missing_photo_is_told_without_torch_or_timm(tmp_path):
    code = (
        "import sys; from xattn.cli import main\n"
        "assert main(['explain', 'nope.jpg']) == 2\n"
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "nope.jpg" in found.stderr


def test_the_pages_table_of_options_is_up_to_date():
    """``python docs/commands.py`` writes it from the commands."""
    docs = Path(__file__).parents[2] / "docs"
    written = runpy.run_path(str(docs / "commands.py"))
    assert (docs / "commands.md").read_text(encoding="utf-8") == written["page"]()


@pytest.mark.parametrize("line", ["--help", "list --help"])
def test_a_reader_that_stops_reading_is_no_error(line, tmp_path):
    program = f"{shlex.quote(sys.executable)} -m xattn {line} | true"
    found = subprocess.run(program, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert found.stderr == ""


def test_a_pipe_that_closes_during_a_command_is_no_error(monkeypatch, capsys):
    def closed(self):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(COMMANDS["list"], "run", closed)
    monkeypatch.setattr("xattn.cli.entry.pipe_is_closed", lambda: True)
    assert main(["list"]) == 141
    assert capsys.readouterr().err == ""


def test_several_photos_and_a_limit(photos, capsys):
    assert run(f"explain photos/0.png photos/2.png {MODEL} --explainers cam --output a") == 0
    assert [e.image_id for e in xattn.load_pack("a")] == ["0.png", "2.png"]
    assert run(f"explain photos {MODEL} --explainers cam --limit 2 --output b") == 0
    assert len({e.image_id for e in xattn.load_pack("b")} & {f"{i}.png" for i in range(3)}) == 2


def test_earlier_results_are_kept(photos, capsys):
    line = f"explain photos/0.png {MODEL} --explainers cam"
    assert run(line) == 0 and run(line) == 0
    assert "runs/explained holds earlier results; the new ones go to runs/explained-2" in (
        capsys.readouterr().err
    )
    assert run(f"{line} --output runs/explained") == 2
    assert "output: runs/explained already holds results" in capsys.readouterr().err
    assert run(f"{line} --output runs/explained --overwrite --classes 3") == 0
    assert xattn.load_pack("runs/explained")[0].target == 3
    assert not (photos / "runs/explained-3").exists()


def test_without_a_head_grad_cam_explains_and_says_so(photos, capsys):
    assert run(f"explain photos/0.png {MODEL}") == 0
    assert "no trained head fits test_resnet, so Grad-CAM is used" in capsys.readouterr().err
    assert [e.method for e in xattn.load_pack("runs/explained")] == ["gradcam"]


def test_classes_by_number_id_and_name(photos, capsys):
    line = f"explain photos/0.png {MODEL} --explainers cam"
    assert run(f"{line} --classes 281,282 n02123394 'Siamese cat, Siamese' 281 --output a") == 0
    assert [e.target for e in xattn.load_pack("a")] == [281, 282, 283, 284]


def test_heads_are_found_in_the_folder_of_their_run(photos, capsys):
    import torch

    torch.manual_seed(0)
    backbone = xattn.load_backbone("test_resnet", None, input_size=64)
    torch.save(backbone.model.state_dict(), "w.pth")
    for name in ("one", "two"):
        xattn.save_head(xattn.create_head("ttame", backbone), f"runs/{name}/head")
    model = MODEL.replace("random", "w.pth")
    assert run(f"explain photos/0.png {model} --heads runs/one runs/two --output a") == 0
    assert [e.method for e in xattn.load_pack("a")] == ["one", "two"]
    assert run(f"explain photos/0.png {model} --heads runs --output b") == 2
    told = capsys.readouterr().err
    assert "heads: runs holds 2 heads; name one of runs/one/head, runs/two/head" in told


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("models", "tf_efficientnet_lite0"),
        ("heads", "evidence-efficientnet-lite0"),
        ("explainers", "gradcam "),
        ("blocks", "ninformer"),
        ("metrics", "higher is better"),
    ],
)
def test_a_kind_is_listed_alone(kind, says, capsys):
    assert main(["list", kind]) == 0
    out = capsys.readouterr().out
    assert says in out and "protocols:" not in out


@pytest.mark.parametrize(
    "words, head, recipe, epochs",
    [
        ("", "evidence", "outcomes", 30),
        ("--epochs 3", "evidence", "outcomes", 3),
        ("--recipe outcomes", "evidence", "outcomes", 30),
        ("--objective outcomes", "evidence", "outcomes", 30),
        ("--recipe small", "ttame", "small", 14),
        ("--recipe published", "ttame", "published", 8),
        ("--objective mask", "ttame", "small", 14),
        ("--head ttame", "ttame", "small", 14),
        ("--head Evidence", "Evidence", "outcomes", 30),
        ("--head ttame --objective outcomes", "ttame", "outcomes", 30),
        ("--head evidence --objective mask", "evidence", "small", 14),
        ("--head evidence --recipe small", "evidence", "small", 14),
        ("--preset ttame-vgg16", "evidence", "published", 8),  # the preset has a head of its own
    ],
)
def test_the_head_and_its_recipe_go_together(words, head, recipe, epochs):
    found = read(f"train photos/ {words}")
    assert (found.head, found.train.recipe, found.train.epochs) == (head, recipe, epochs)


def test_settings_of_a_training_are_checked_whichever_recipe_fills_them_in():
    for words in ("--epochs 0", "--lr nan", "--recipe small --batch-size 0"):
        with pytest.raises(ValueError, match=r"^(epochs|lr|batch_size): got"):
            read(f"train photos/ {words}")
