"""What ``make demo`` prints and writes: one line of warnings, and a table without "nan"."""

import re

import numpy as np
import pytest
from PIL import Image

from xattn import load_backbone
from xattn.app.demo import run
from xattn.eval import evaluate, read_json, sanity_rows, write_json
from xattn.eval.metrics.registry import create_metric
from xattn.explainers import create_explainer
from xattn.explaining.photos import explain


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    photos = [folder / name for name in run.SHOWN]
    for i, path in enumerate(photos):
        noise = np.random.default_rng(i).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((70, 70)).save(path)
    backbone = load_backbone("test_efficientnet", weights=None, input_size=64)
    rows = {"Grad-CAM": create_explainer("gradcam", backbone), **sanity_rows(backbone, "gradcam")}
    probes = ("masking", create_metric("insertion-deletion", steps=4))
    results = evaluate(backbone, rows, photos, metrics=probes, progress=False)
    found = explain(photos, backbone, explainer=rows["Grad-CAM"])
    return folder, rows, results, found


def test_one_line_stands_for_all_warnings(measured, capsys):
    folder, _, results, _ = measured
    write_json(results, folder / "results.json")
    run.print_table(results, folder)
    printed = capsys.readouterr().out
    assert "warning: " not in printed and "Grad-CAM" in printed
    (line,) = (line for line in printed.splitlines() if "warnings say which" in line)
    count = len(read_json(folder / "results.json").warnings())
    assert count and f"; {count} warnings" in line


def test_the_sheet_has_a_dash_where_a_map_of_ones_has_no_number(measured):
    folder, rows, results, found = measured
    run.write_sheet(folder, list(found), results, list(rows), 6)
    html = (folder / "index.html").read_text(encoding="utf-8")
    (ones,) = re.findall(r"<tr>(?:(?!</tr>).)*>ones<.*?</tr>", html, re.S)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", html, re.S)
    assert "–" in ones and len(cells) > 20 and not any("nan" in cell for cell in cells)
