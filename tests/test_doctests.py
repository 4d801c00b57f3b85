"""Examples in docstrings run, and every public name has one."""

import doctest
import importlib
import inspect
from pathlib import Path

import own_names
import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"xattn": "xattn", "eval": "xattn.eval", "models": "xattn.models", "app": "xattn.app"}
MODULES = [
    ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])
    for folder, package in FOLDERS.items()
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
PUBLIC = """xattn xattn.attention xattn.backbone xattn.blocks xattn.detection xattn.eval xattn.eval.functional
xattn.explainers xattn.heads xattn.parts xattn.training""".split()
# Each needs a file that no package ships (a model, a video, a text detector, a board's photos) or a server.
WITHOUT_EXAMPLE = {
    "xattn.app.serving.session.open_viewer",
    "xattn.backbone.families.clip.load_clip",
    "xattn.eval.board.folder.Board",
    "xattn.explaining.clips.explain_video",
    "xattn.parts.evidence.DetectorText",
    "xattn.vlm.explain.explain_tokens",
    "xattn.vlm.loading.load_vlm",
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with own_names.forgetting():
        result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


def public_names():
    """The classes and functions that the public packages export, by their full names."""
    names = {}
    for package in map(importlib.import_module, PUBLIC):
        for name in getattr(package, "__all__", None) or vars(package):
            value = getattr(package, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                names[f"{value.__module__}.{value.__qualname__}"] = value
    ours = [name for name in names if name.startswith("xattn.") and "._" not in name]
    return {name: names[name] for name in ours if not name.startswith("xattn.kernels.")}


def docstrings(value):
    """The docstring of a function, or those of a class and its methods."""
    parts = vars(value).values() if inspect.isclass(value) else ()
    return [str(getattr(part, "__doc__", "") or "") for part in (value, *parts)]


def test_every_public_name_has_an_example():
    names = public_names()
    assert len(names) > 250
    without = {n for n, value in names.items() if not any(">>> " in d for d in docstrings(value))}
    assert without == WITHOUT_EXAMPLE
