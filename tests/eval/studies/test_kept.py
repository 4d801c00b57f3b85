"""Raw values of a study as tables: one line for each row, seed and sample."""

import csv

from xattn.eval.studies.kept import raw_rows, reported


def test_numbers_and_samples_have_lines_of_their_own():
    found = {
        "softmax": [{"seconds": 2.0, "split": {"scored": {"count": 2}}, "right": [1, 0]}],
        "none": [{"seconds": 1.0, "right": [0, 0], "gates": {"hits": {"mask": [0.25]}}}] * 2,
    }
    rows = raw_rows(found)
    assert rows[:3] == [
        {"row": "softmax", "seed": 0, "seconds": 2.0},
        {"row": "softmax", "seed": 0, "sample": 0, "of": 2, "right": 1},
        {"row": "softmax", "seed": 0, "sample": 1, "of": 2, "right": 0},
    ]
    assert {"row": "none", "seed": 1, "sample": 0, "of": 1, "gates hits mask": 0.25} in rows
    assert len(rows) == 3 + 2 * (1 + 2 + 1) and not any(
        "split" in key for row in rows for key in row
    )


def test_a_report_has_its_values_beside_it(tmp_path):
    values = [
        {"row": "a", "x": 1 / 3, "ok": True},
        {"row": "b", "y": float("nan"), "wrong": "3 17"},
    ]
    *lines, where = reported(tmp_path, ["| a |"], {"values": values}, tmp_path / "plot.png")
    assert lines == ["| a |"] and (tmp_path / "report.md").read_text() == "| a |\n"
    assert all(name in where for name in ("report.md", "values.csv", "plot.png"))
    with (tmp_path / "values.csv").open(newline="") as stream:
        assert list(csv.reader(stream)) == [
            ["row", "x", "ok", "y", "wrong"],
            ["a", "0.333333", "1", "", ""],
            ["b", "", "", "", "3 17"],
        ]
