"""``--import``: files and modules of one's own in every command; what cannot be imported is one line."""

from __future__ import annotations

import sys

import pytest

from xattn.cli import main
from xattn.cli.imports import import_user_code, imported_sources, take_imports
from xattn.explainers.base import EXPLAINERS, explainer_class

OWN = """
import xattn
from xattn.explainers import Explainer


@xattn.register_explainer("toy_import")
class Toy(Explainer):
    version = {version}

    def _attribute(self, images, target):
        return images.mean(1, keepdim=True)
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("xattn.cli.imports._imported", [])
    before = set(sys.modules)
    yield
    EXPLAINERS.remove("toy_import")
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


def test_the_option_stands_anywhere_and_as_often_as_one_likes():
    line = ["--import", "a.py", "explain", "x.jpg", "--import=b.py", "--top", "2"]
    assert take_imports(line) == (["explain", "x.jpg", "--top", "2"], ["a.py", "b.py"])


def test_a_file_is_imported_before_names_are_checked_and_again_when_it_has_changed(tmp_path):
    file = tmp_path / "own_toy.py"
    file.write_text(OWN.format(version=1))
    import_user_code(str(file))
    assert explainer_class("toy_import").version == 1
    file.write_text(OWN.format(version=22))
    import_user_code(str(file))
    assert explainer_class("toy_import").version == 22
    assert imported_sources() == (str(file),)


def test_a_module_is_imported_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("from own_package import maps")
    (tmp_path / "own_package" / "maps.py").write_text(OWN.format(version=3))
    monkeypatch.chdir(tmp_path)
    import_user_code("own_package")
    import_user_code("own_package")
    assert explainer_class("toy_import").version == 3


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("own_missing.py", None, "own_missing.py does not exist; give a Python file"),
        ("own_missing", None, "there is no module 'own_missing'; install it, or give"),
        ("own_empty.py", "x = 1", "own_empty.py registers nothing; decorate"),
        ("own_broken.py", "\n1 / 0", "own_broken.py failed at line 2 (ZeroDivisionError: "),
        ("own_wrong.py", "def f(:", "own_wrong.py failed at line 1 (SyntaxError: "),
        ("own_quits.py", "raise SystemExit(3)", "own_quits.py failed at line 1 (SystemExit: 3)"),
        ("own_taken.py", OWN.format(version=1).replace("toy_import", "gradcam"), "is taken by"),
        ("own_notes.txt", "", "own_notes.txt is not a Python file; give a file whose name ends in"),
        ("json.py", "", "json.py has the name of another module ("),
        ("colorsys.py", "", "colorsys.py has the name of another module ("),
        ("a-b", None, "got 'a-b'; give a Python file, or the name of a module"),
    ],
)
def test_what_cannot_be_imported_is_one_line(name, text, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["list", "--import", name]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("xattn: error: import: ") and says in told[0]


def test_an_option_without_a_file_is_one_line(capsys):
    assert main(["list", "--import"]) == 2
    assert capsys.readouterr().err == "xattn: error: import: got no file; give --import mine.py\n"
