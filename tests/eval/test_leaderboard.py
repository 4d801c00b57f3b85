"""The leaderboard's data: who is best and who is level, as Markdown, CSV and JSON, run after run."""

import csv
import io
import json
import math
import re

import numpy as np
import pytest

from xattn.eval import Column, Protocol
from xattn.eval.evaluation.results import RANDOMIZED, TOO_FEW, ImageRecord, MethodResult, Results
from xattn.eval.report.leaderboard_files import markdown, seconds_script, write_report
from xattn.eval.report.results_files import from_dict
from xattn.eval.report.standings import standings, wins

AD, IC = Column("AD", 0.5), Column("IC", 0.5)  # lower and higher is better


def made_up(is_mask=(), objectives=(), **values):
    """Results whose methods have the given per-image values in both columns."""
    objectives = dict(objectives)
    n = len(next(iter(values.values())))
    methods = {
        name: MethodResult(
            3,
            name in is_mask,
            np.isfinite(x),
            {},
            {AD: np.array(x), IC: np.array(x)},
            seconds=2.0,
            objective=objectives.get(name),
        )
        for name, x in values.items()
    }
    images = [ImageRecord(f"{i}.jpg", 0, "ant, bee", 0.5) for i in range(n)]
    return Results(Protocol(n=n, n_invalid=0), images, methods, n_resamples=500)


def table(results):
    return {(s.method, s.column): s for s in standings(results)}


BASE = np.array([30.0, 42, 35, 51, 38, 44, 29, 47, 36, 40])
WIGGLE = np.array([1.0, -1, 1, -1, 1, -1, 1, -1, 1, -1.5])


# ---------------------------------------------------------------- standings


def test_the_best_follows_each_metrics_direction():
    cells = table(made_up(low=BASE - 5, mid=BASE, high=BASE + 5))
    assert [n for n in ("low", "mid", "high") if cells[n, AD].best] == ["low"]
    assert [n for n in ("low", "mid", "high") if cells[n, IC].best] == ["high"]


def test_a_sanity_row_or_a_mask_is_never_best():
    rows = {
        "random": BASE - 20,
        "centre": BASE - 30,
        "ones": BASE - 40,
        "randomized_mine": BASE - 9,
    }
    results = made_up(is_mask=("ones", "frame"), frame=BASE - 50, mine=BASE, **rows)
    assert [s.method for s in standings(results) if s.best] == ["mine", "mine"]
    assert table(results)["centre", AD].diff == pytest.approx(-30)
    assert not table(results)["centre", AD].level_with_best


def test_a_method_without_values_is_neither_best_nor_level():
    cells = table(made_up(dead=np.full(10, np.nan), mine=BASE))
    dead = cells["dead", AD]
    assert (dead.n, dead.n_invalid, dead.best, dead.level_with_best) == (0, 10, False, False)
    assert math.isnan(dead.mean) and cells["mine", AD].best


def test_level_with_the_best_is_a_paired_interval_that_holds_zero():
    results = made_up(mine=BASE, twin=BASE + WIGGLE * 2, poor=BASE + 3 + 0.1 * WIGGLE)
    cells = table(results)
    best = next(n for n in ("mine", "twin", "poor") if cells[n, AD].best)
    other = {"mine": "twin", "twin": "mine"}[best]
    assert cells[best, AD].level_with_best and math.isnan(cells[best, AD].diff)
    assert cells[other, AD].level_with_best
    poor = cells["poor", AD]
    assert not poor.level_with_best, "though its own interval overlaps the best one's"
    assert poor.lo < cells[best, AD].hi
    (d,) = results.compare("poor", best, [AD])
    assert (poor.diff, poor.diff_lo, poor.diff_hi) == (d.diff, d.lo, d.hi) and d.lo > 0


def test_a_difference_counts_only_images_valid_in_both():
    holes = BASE + 4
    holes[:3] = np.nan
    cells = table(made_up(mine=np.where(np.arange(10) == 9, np.nan, BASE), holes=holes))
    assert cells["holes", AD].diff == pytest.approx(4)
    assert (cells["holes", AD].n, cells["holes", AD].n_invalid) == (7, 3)


# ---------------------------------------------------------------- metrics that a head was trained on


ROAD = Column("ROAD")


def trained(objective, **shifts):
    """A head, a rival and a sanity row in AD, IC and ROAD; by default the head is best in AD alone."""
    shifts = {"AD": -5, "IC": -5, "ROAD": -5, **shifts}
    results = made_up(
        objectives={"mine": objective, "randomized_head": objective},
        mine=BASE, rival=BASE, randomized_head=BASE,
    )  # fmt: skip
    for name, method in results.methods.items():
        method.values[ROAD] = BASE.copy()
        for column in method.values:
            method.values[column] = method.values[column] + (
                shifts[column.metric] if name == "mine" else 0
            )
    return results


def test_cells_of_metrics_that_a_head_was_trained_on_are_marked_and_may_be_best():
    cells = table(trained("mask"))
    marked = {(s.method, s.column) for s in cells.values() if s.trained_on}
    assert marked == {(m, c) for m in ("mine", "randomized_head") for c in (AD, IC)}
    assert cells["mine", AD].best and cells["rival", IC].best
    assert not any(s.trained_on for s in table(trained(None)).values())


@pytest.mark.parametrize(
    ("objective", "shifts", "verdict"),
    [
        ("mask", {}, "best only close to its training: AD@50"),
        ("mask", {"IC": 5}, "best only close to its training: AD@50, IC@50"),
        (
            *("mask", {"ROAD": 5}),
            "best in AD@50, close to its training, and in ROAD, not close to it",
        ),
        ("mask", {"AD": 5, "ROAD": 5}, "best in ROAD, apart from its training"),
        (
            "outcomes",
            {"ROAD": 5},
            "best in AD@50, close to its training, and in ROAD, not close to it",
        ),
        (None, {}, "best in AD@50"),
    ],
)
def test_the_verdict_says_what_a_head_was_trained_on(objective, shifts, verdict):
    results = trained(objective, **shifts)
    said = {found.method: found.verdict for found in wins(results, standings(results))}
    assert said["mine"] == verdict
    assert "training" not in said.get("rival", "")
    assert f"- mine: {verdict}" in markdown(results, standings(results)).splitlines()


def test_the_table_of_the_best_marks_names_in_metrics_that_they_were_trained_on():
    results = trained("mask", IC=0.0)
    lines = markdown(results, standings(results)).splitlines()
    assert "| AD@50 | mine † | none |" in lines
    assert "| IC@50 | mine † | rival |" in lines or "| IC@50 | rival | mine † |" in lines
    assert "| ROAD | rival | none |" in lines
    assert "- † close to this head's training: the same score, and the same fill or masks" in lines


# ---------------------------------------------------------------- files


@pytest.fixture
def results():
    return made_up(
        mine=BASE, twin=BASE + WIGGLE, random=BASE + 30, ones=BASE * 0, dead=np.full(10, np.nan)
    )


def test_markdown_names_the_best_and_who_is_level(results):
    lines = markdown(results, standings(results)).splitlines()
    level = {"mine": "twin", "twin": "mine"}
    best = next(s.method for s in standings(results) if s.best)
    assert f"| AD@50 | {best} | {level[best]} |" in lines, "sanity rows are not listed as level"
    assert any(x.startswith("- protocol " + results.protocol.id) for x in lines)


def test_markdown_calls_nobody_level_by_too_few_images():
    four = made_up(mine=BASE[:4], twin=BASE[:4] + WIGGLE[:4], poor=BASE[:4] + 30, random=BASE[:4])
    lines = markdown(four, standings(four)).splitlines()
    assert "| AD@50 | too few images for a verdict | too few images for a verdict |" in lines
    assert "- too few images for a verdict in AD@50, IC@50; at least 8 are needed" in lines
    holes = np.where(np.arange(10) < 4, BASE, np.nan)
    some = made_up(mine=BASE - 0.1, twin=BASE + WIGGLE, holes=holes + 40, random=BASE)
    winner = next(s.method for s in standings(some) if s.best)
    level = {"mine": "twin", "twin": "mine"}[winner]
    text = f"| AD@50 | {winner} | {level}; too few images for a verdict: holes |"
    assert text in markdown(some, standings(some)).splitlines()


def test_markdown_leaves_out_columns_that_nobody_has(results):
    nothing = made_up(dead=np.full(10, np.nan), random=BASE)
    assert "| AD@50 |" not in markdown(nothing, standings(nothing))


def test_csv_reads_back_with_empty_cells_for_what_is_undefined(results, tmp_path):
    write_report(results, tmp_path)
    text = (tmp_path / "leaderboard.csv").read_text()
    assert "nan" not in text.lower()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 10
    for row, s in zip(rows, standings(results), strict=True):
        assert (row["method"], row["metric"], float(row["level"])) == (s.method, *s.column)
        for field in ("mean", "lo", "hi", "diff", "diff_lo", "diff_hi"):
            value = getattr(s, field)
            assert row[field] == "" if math.isnan(value) else float(row[field]) == value
        assert (row["best"], row["n"], row["forwards"]) == (str(s.best), str(s.n), "3")
        assert row["protocol_id"] == results.metric_id(s.column)
    images = list(csv.DictReader(io.StringIO((tmp_path / "images.csv").read_text())))
    assert len(images) == 50 and images[0]["class_name"] == "ant, bee"


def test_json_holds_standings_and_the_whole_results(results, tmp_path):
    write_report(results, tmp_path)
    data = json.loads((tmp_path / "leaderboard.json").read_text(), parse_constant=pytest.fail)
    assert [(row["method"], row["column"]) for row in data["standings"]] == [
        (s.method, s.column.key) for s in standings(results)
    ]
    dead = next(row for row in data["standings"] if row["method"] == "dead")
    assert dead["mean"] is None and dead["best"] is False
    assert standings(from_dict(data))[0] == standings(results)[0]


def test_seconds_are_an_image_and_stand_in_their_script_alone(results, tmp_path):
    name = '</script>"\u2028'
    results.methods[name] = results.methods.pop("twin")
    paths = write_report(results, tmp_path)
    first = {path.name: path.read_bytes() for path in paths}
    script = seconds_script(results)
    start, end = "window.XATTN_SECONDS = ", ";\n"
    assert script.startswith(start) and script.endswith(end) and script.isascii()
    assert json.loads(script[len(start) : -len(end)])[name] == 0.2
    results.methods["mine"].seconds = 77.0
    changed = {
        path.name
        for path in write_report(results, tmp_path)
        if first[path.name] != path.read_bytes()
    }
    assert changed == {"seconds.js"}


def test_reports_of_equal_results_are_byte_identical(results, tmp_path):
    one, two = write_report(results, tmp_path / "a"), write_report(results, tmp_path / "b")
    assert [p.name for p in one] == [
        *("leaderboard.md", "leaderboard.csv", "leaderboard.json", "images.csv"),
        *("report.html", "seconds.js"),
    ]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


# ---------------------------------------------------------------- few images


def few(n):
    """Results of ``n`` images in which one method is far ahead of all rows, also of its random twin."""
    base = BASE[:n]
    results = made_up(mine=base - 20, rival=base, random=base + 9, centre=base + 9)
    for name, method in results.methods.items():
        ahead = {"mine": 20, "rival": 0}.get(name, -9)
        method.values[IC] = base + ahead
        method.values[RANDOMIZED] = np.full(n, 0.9)
    return results


@pytest.mark.parametrize("n", [7, 8])
def test_below_eight_images_every_report_says_so_and_gives_no_verdict(tmp_path, n):
    write_report(few(n), tmp_path)
    texts = {p.name: p.read_text(encoding="utf-8") for p in tmp_path.iterdir()}
    markdown, data = texts["leaderboard.md"], json.loads(texts["leaderboard.json"])
    page = texts["report.html"].partition("<main>")[2].partition("<noscript>")[0]
    page = re.sub(
        r"<p class=(key|\"key\"|\"note\"|note)>.*?</p>|<section id=\"read\".*", "", page, flags=re.S
    )
    verdicts = {s["verdict"] for s in data["standings"]}
    claims = ("★", "≈", "✓", "✗", "survives weight", "beat")
    if n == 7:
        assert verdicts == {TOO_FEW}
        assert not any(s["best"] or s["level_with_best"] for s in data["standings"])
        assert (
            "mine: best" not in markdown and "| mine |" not in markdown.rpartition("| metric |")[2]
        )
        assert markdown.count(TOO_FEW) >= 4 and page.count(TOO_FEW) >= 4
        assert all(word not in page for word in claims)
        assert any(TOO_FEW in line and RANDOMIZED.key in line for line in data["warnings"])
        assert all("survives" not in line for line in data["warnings"])
    else:
        assert "best" in verdicts and "mine: best" in markdown
        assert "★" in page and "✓" in page and "survives weight" in page
        assert all(TOO_FEW not in text for text in (markdown, page, *verdicts))
