"""The command line itself: arguments that no command should choke on."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

from fuzz.engine import OWN, target
from fuzz.heads import head_files
from fuzz.photos import photos
from fuzz.states import put
from xattn import cli


def _files(folder: Path) -> None:
    put({"photos/a.png": photos()[0], "photos/b.jpg": photos()[1], "list.txt": b"photos/a.png\n", "head/config.json": head_files()[0]["config.json"],
         "head/model.safetensors": head_files()[0]["model.safetensors"], "labels.csv": b"a.png,1\nb.jpg,0\n", "classes.txt": b"a\nb\n"}, folder)  # fmt: skip


def _line(*words: str) -> bytes:
    return "\n".join(words).encode()


LONGEST = 4000  # characters of a line
_MODEL = ("--backbone", "test_vit3", "--weights", "random", "--input-size", "48", "--device", "cpu")


@target(
    "command line",
    "arguments",
    valid=lambda: [
        _line("explain", "photos", *_MODEL, "--explainers", "raw_attention", "--output", "out"),
        _line("explain", "list.txt", *_MODEL, "--explainers", "gradcam", "--labels", "labels.csv", "--classes", "3", "--output", "out"),
        _line("parts", "photos", "--evidence", "mser", "--output", "out"),
        _line("list", "--filter", "test_vit*"),
        _line("--version"),
    ],
    nasty=lambda: [
        b"", _line("explain"), _line("explain", ""), _line("explain", "\0"), _line("train", "--data"), _line("nothing"), _line("--help"), _line("explain", "--help"), _line("-h", "-h"),
        _line("explain", "photos", *_MODEL, "--explainers", "nothing"), _line("explain", "photos", *_MODEL, "--explainers", ""), _line("explain", "photos", *_MODEL, "--top", "-1"),
        _line("explain", "photos", *_MODEL, "--explainers", "raw_attention", "--top", "9" * 400, "--output", "out"), _line("explain", "photos", *_MODEL, "--batch-size", "0"),
        _line("explain", "photos", *_MODEL, "--explainers", "raw_attention", "--batch-size", "9" * 30, "--output", "out"),
        _line("explain", "photos", "--backbone", "test_vit3", "--weights", "random", "--input-size", "9" * 30), _line("explain", "photos", "--backbone", "test_vit3", "--weights", "random", "--input-size", "-1"),
        _line("explain", "photos", "--backbone", "", "--weights", "random"), _line("explain", "photos", "--backbone", "\0", "--weights", "random"), _line("explain", "photos", "--backbone", "../x", "--weights", "random"),
        _line("explain", "photos", "--backbone", "torchvision/", "--weights", "random"), _line("explain", "photos", "--backbone", "torchvision/x", "--weights", "random"),
        _line("explain", "photos", "--backbone", "test_vit3", "--weights", ""), _line("explain", "photos", "--backbone", "test_vit3", "--weights", "photos"), _line("explain", "photos", "--backbone", "test_vit3", "--weights", "labels.csv"),
        _line("explain", "photos", *_MODEL, "--device", "cuda:99"), _line("explain", "photos", *_MODEL, "--device", "meta"), _line("explain", "photos", *_MODEL, "--device", ""), _line("explain", "photos", *_MODEL, "--device", "\0"),
        _line("explain", "photos", *_MODEL, "--taps", "nothing", "--explainers", "gradcam"), _line("explain", "photos", *_MODEL, "--taps", ""), _line("explain", "photos", *_MODEL, "--class-names", "photos"),
        _line("explain", "photos", *_MODEL, "--heads", "head"), _line("explain", "photos", *_MODEL, "--heads", ""), _line("explain", "photos", *_MODEL, "--heads", "\0"), _line("explain", "photos", *_MODEL, "--heads", "photos"),
        _line("explain", "photos", *_MODEL, "--probe", "head"), _line("explain", "photos", *_MODEL, "--probe", "nothing"), _line("explain", "photos", *_MODEL, "--explainers", "gradcam", "--classes", ""),
        _line("explain", "photos", *_MODEL, "--explainers", "gradcam", "--classes", "9" * 5000), _line("explain", "photos", *_MODEL, "--explainers", "gradcam", "--classes", "²"), _line("explain", "photos", *_MODEL, "--explainers", "gradcam", "--classes", "-1"),
        _line("explain", "photos", *_MODEL, "--explainers", "gradcam", "--output", "labels.csv"), _line("explain", "photos", *_MODEL, "--explainers", "gradcam", "--output", "photos"), _line("explain", "photos", *_MODEL, "--explainers", "gradcam", "--output", ""),
        _line("explain", "photos", *_MODEL, "--explainers", "gradcam", "--output", "\0"), _line("explain", "photos", *_MODEL, "--explainers", "gradcam", "--output", "x" * 5000), _line("explain", "photos", *_MODEL, "--explainers", "gradcam", "--output", "/proc/x"),
        _line("explain", "photos", *_MODEL, "--explainers", "gradcam", "--seed", "-1", "--output", "out"), _line("explain", "photos", *_MODEL, "--explainers", "rise", "--seed", "9" * 40, "--output", "out"), _line("explain", "photos", *_MODEL, "--explainers", "gradcam", "--max-pixels", "0"),
        _line("explain", "photos", *_MODEL, "--explainers", "gradcam", "--labels", "nothing"), _line("explain", "photos", *_MODEL, "--explainers", "gradcam", "--labels", "photos"), _line("explain", "photos", *_MODEL, "--explainers", "gradcam", "--labels", "\0"),
        _line("parts", "photos", "--evidence", ""), _line("parts", "photos", "--evidence", "onnx:"), _line("parts", "photos", "--evidence", "onnx:labels.csv"), _line("parts", "photos", "--evidence", "labels.csv"), _line("parts", "photos", "--evidence", "photos", "--numbers", "9" * 40, "--output", "out"),
        _line("export", "x"), _line("export", "x.pt2", *_MODEL), _line("app", "labels.csv"), _line("app", "--host", "203.0.113.7", "--no-token"), _line("app", "--host", "\0"), _line("app", "--data", "nothing"), _line("app", "--upload-mb", "-1"),
        _line("bench", "kernels"), _line("bench", "nothing"),
        _line("evaluate", "photos", *_MODEL, "--metrics", "nothing", "--output", "out"), _line("evaluate", "photos", *_MODEL, "--preset", "nothing", "--output", "out"), _line("evaluate", "photos", *_MODEL, "--levels", "nan", "--output", "out"),
        _line("compare", "photos", *_MODEL, "--options", "rise.masks", "--output", "out"), _line("compare", "photos", *_MODEL, "--explainers", "gradcam", "--options", "gradcam.x=" + "[" * 50_000, "--output", "out"),
        _line("compare", "photos", *_MODEL, "--explainers", "gradcam", "--limit", "-1", "--output", "out"), _line("compare", "photos", *_MODEL, "--explainers", "gradcam", "--annotations", "photos", "--output", "out"),
        _line("compare", "photos", *_MODEL, "--explainers", "head", "--output", "out"), _line("train", "photos", *_MODEL, "--head", "nothing", "--output", "out"), _line("train", "photos", *_MODEL, "--options", "x=[", "--output", "out"),
        _line("train", "photos", *_MODEL, "--epochs", "0", "--output", "out"), _line("train", "photos", *_MODEL, "--lr", "nan", "--output", "out"), _line("train", "photos", *_MODEL, "--preset", "nothing", "--output", "out"),
        _line("train", "photos", *_MODEL, "--sample", "-1", "--output", "out"), _line("train", "photos", *_MODEL, "--resume", "--output", "out"), _line("train", "nothing", *_MODEL, "--output", "out"), _line("train", "photos", *_MODEL, "--seed", "9" * 40, "--output", "out"),
        _line("probe", "photos", *_MODEL, "--heads", "nothing", "--labels", "labels.csv", "--output", "out"), _line("probe", "photos", *_MODEL, "--folds", "9", "--labels", "labels.csv", "--output", "out"),
        _line("probe", "photos", *_MODEL, "--options", "gap.x=1", "--labels", "labels.csv", "--output", "out"), _line("probe", "photos", *_MODEL, "--labels", "photos", "--output", "out"), _line("probe", "photos", *_MODEL, "--views", "0", "--labels", "labels.csv", "--output", "out"),
    ],
    kind="text",
    template=_files,
    says=f"class |bench kernels: |{OWN}",  # of these two the first word is no argument
)  # fmt: skip
def command_line(folder: Path) -> None:
    """Mutations of lines that need no network from a hub: a word that is no flag changes, at most."""
    words = (folder / "arguments").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    if "\0" in "".join(words):
        return  # no shell can hand this over
    if len(words) > 40 or any("://" in word or word.startswith(("hfds", "pipe")) for word in words):
        return
    os.chdir(folder)
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except SystemExit as end:  # of the parser, whose message is on the terminal
            code = end.code if isinstance(end.code, int) else 2
    text = err.getvalue()
    if code not in (0, 2):
        raise RuntimeError(f"exit code {code}: {text[-300:]}")
    assert max(map(len, text.splitlines()), default=0) < LONGEST
    errors = [line for line in text.splitlines() if line.startswith("xattn: error: ")]
    if code == 2 and errors:
        raise ValueError(errors[-1].removeprefix("xattn: error: "))
