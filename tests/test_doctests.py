"""Examples in docstrings run."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"xattn": "xattn", "eval": "xattn.eval", "models": "xattn.models", "app": "xattn.app"}
MODULES = [
    ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])
    for folder, package in FOLDERS.items()
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
