"""Photos, folders and outputs whose names are not UTF-8: they work, or errors name them in printable form."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import xattn
from xattn.cli import main
from xattn.photos.sources import open_photos
from xattn.runtime.files import write_json

BYTE = os.fsdecode(b"\xe9")  # e acute in Latin-1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of two classes in folders; every name but that of the first folder is not UTF-8."""
    root = tmp_path_factory.mktemp("names")
    try:
        (root / f"b{BYTE}").mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names only")
    for folder in ("a", f"b{BYTE}"):
        (root / "photos" / folder).mkdir(parents=True)
        for i in range(6):
            noise = np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / "photos" / folder / f"{i}{BYTE}.png")
    (root / "photos" / "a" / f"bad{BYTE}.png").write_text("words")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = xattn.load_backbone("test_efficientnet", weights=None, num_classes=5).model
    save_file(model.state_dict(), str(root / "w.safetensors"))
    return root


def run(root: Path, capsys: pytest.CaptureFixture[str], *line: str) -> str:
    model = "--backbone test_efficientnet --input-size 64 --device cpu --weights".split()
    assert main([*line, *model, str(root / "w.safetensors")]) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    text = printed.out + printed.err
    text.encode()  # no half characters
    return text


def test_every_job_takes_such_names_and_prints_those_of_photos_left_out(root: Path, capsys) -> None:
    photos, short = str(root / "photos"), ["--epochs", "1", "--batch-size", "4"]
    output = root / f"out{BYTE}"
    left_out = r"bad\udce9.png"
    train = [
        "train",
        photos,
        *short,
        "--workers",
        "0",
        "--sample",
        "1",
        "--head",
        "ttame",
    ]
    said = run(root, capsys, *train, "--output", str(output / "t"))
    assert left_out in said
    probe = ["probe", photos, *short, "--heads", "gap", "--sample", "1"]
    assert left_out in run(root, capsys, *probe, "--output", str(output / "p"))
    classes = json.loads((output / "p" / "results.json").read_text(encoding="utf-8"))["classes"]
    assert classes == ["a", r"b\udce9"]
    head = str(output / "p" / "gap" / "head")
    explain = ["explain", photos, "--heads", head, "--labels", "folders"]
    assert left_out in run(root, capsys, *explain, "--output", str(output / "e"))
    found = xattn.load_pack(output / "e")
    assert {e.facts.label_name for e in found} == set(classes) and len(found) == 12
    measure = ["evaluate", photos, "--heads", str(output / "t" / "head"), "--no-sanity"]
    assert left_out in run(root, capsys, *measure, "--output", str(output / "v"))


def test_the_fingerprint_of_photos_tells_such_names_apart(root: Path, tmp_path: Path) -> None:
    data = next((root / "photos" / "a").glob(f"0{BYTE}.png")).read_bytes()
    found = []
    for name in (b"\xe8", b"\xe9"):
        path = tmp_path / f"{os.fsdecode(name)}.png"
        path.write_bytes(data)
        found.append(open_photos([path]).describe())
    assert found[0] != found[1]


def test_half_characters_in_json_come_back(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"name": f"caf{BYTE}", "other": "café"})
    found = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert found == {"name": f"caf{BYTE}", "other": "café"}


def test_a_clip_or_its_pack_of_such_a_name_is_refused(root: Path, tmp_path: Path, capsys) -> None:
    """OpenCV ends the process at such a path."""
    writer = cv2.VideoWriter(str(tmp_path / "c.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for i in range(3):
        writer.write(np.full((48, 64, 3), 40 * i, np.uint8))
    writer.release()
    named = tmp_path / f"c{BYTE}.mp4"
    named.write_bytes((tmp_path / "c.mp4").read_bytes())
    model = ["--backbone", "test_efficientnet", "--weights", "random", "--explainers", "cam"]
    for clip, output, argument in (
        (named, tmp_path / "out", "video"),
        (tmp_path / "c.mp4", tmp_path / f"out{BYTE}", "output"),
    ):
        assert main(["explain", str(clip), *model, "--output", str(output)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"xattn: error: {argument}: ") and "rename" in line
