"""Raw values of a study as tables: one line for each row, seed and sample."""

import csv

import pytest

from xattn.eval.studies.run_files import measure_rows, raw_rows, reported


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


def test_a_stopped_study_measures_what_is_missing_and_refuses_other_settings(tmp_path):
    asked = []

    def measured(name):
        def measure(split, seed):
            asked.append((name, seed))
            split.score([seed])
            return {"right": 0.5 + seed}

        return measure

    jobs = {name: measured(name) for name in ("one", "two")}
    whole = measure_rows(tmp_path, {"steps": 3}, jobs, 2)
    assert asked == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    (tmp_path / "two-1.json").unlink()
    again = measure_rows(tmp_path, {"steps": 3}, jobs, 2)
    assert asked[4:] == [("two", 1)]
    assert [[row["right"] for row in rows] for rows in again.values()] == [[0.5, 1.5]] * 2
    assert list(whole) == list(again)
    with pytest.raises(ValueError, match="^output: .* has other settings or photos; choose a new"):
        measure_rows(tmp_path, {"steps": 4}, jobs, 2)
    (tmp_path / "one-0.json").write_text("{")
    with pytest.raises(ValueError, match="^output: .*one-0.json"):
        measure_rows(tmp_path, {"steps": 3}, jobs, 2)


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
