"""``python -m xattn.eval.studies``: one table, whose studies say themselves which options they take."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from xattn.eval.studies.__main__ import PROG, STUDIES, main, study_lines

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def printed() -> list[list[str]]:
    """The words of every study's command in a code block or between backticks of the pages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(rf"{re.escape(PROG)} ([^`\n]*)", text):
            words = shlex.split(re.sub(r"--raw \S+", "", line), comments=True)
            if len(words) > 1:  # others are names within a sentence
                found.append(words)
            else:
                assert words[0] in STUDIES, f"{page.name}: {line}"
    return found


def test_without_a_name_all_are_listed_and_torch_is_not_loaded():
    code = (
        "import sys; from xattn.eval.studies.__main__ import main; main([]); "
        "assert 'torch' not in sys.modules"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed = [line.split()[0] for line in told.stdout.splitlines() if line.startswith("  ")]
    assert listed == sorted(STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_help_gives_every_study_with_its_options(name, capsys):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0 and f"{PROG} {name}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("words", printed(), ids=" ".join)
def test_printed_commands_are_read(words, monkeypatch):
    """Options and values of a command on a page are those of its study, which is not run."""
    module = import_module(f"xattn.eval.studies.{STUDIES[words[0]][0]}")
    options = import_module("xattn.eval.studies.options")
    loaded = []
    monkeypatch.setattr(options.BackboneArgs, "check", lambda self: loaded.append(self))
    monkeypatch.setattr(options.BackboneArgs, "load", lambda self: None)
    study_lines(module.study, words[1:], words[0], "")
    assert len(loaded) == ("backbone: Network" in Path(module.__file__).read_text())


def test_an_unknown_name_and_an_error_are_one_line(capsys, tmp_path):
    assert main(["lesion"]) == 2
    assert "did you mean lesions" in capsys.readouterr().err
    assert main(["at", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("at: error: ")


def test_threads_are_told_to_sleep_before_torch_is_imported(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")

    def imported(module):
        assert os.environ["OMP_WAIT_POLICY"] == "passive"
        raise ValueError("far enough")

    monkeypatch.setattr("xattn.eval.studies.__main__.import_module", imported)
    with pytest.raises(ValueError, match="far enough"):
        main(["blocks"])
