"""Aggregate ranks: limit cases of the formula, and where they stand in the report."""

import csv
import json
import re

import numpy as np
import pytest

from xattn.eval import Column, Protocol, aggregate_ranks, format_table
from xattn.eval.evaluation.results import ImageRecord, MethodResult, Results
from xattn.eval.report.html_page import html_page
from xattn.eval.report.leaderboard_files import write_report
from xattn.eval.report.standings import standings

LOWER = [Column("deletion"), Column("AD", 0.5), Column("AD", 0.15), Column("ROAD-MoRF")]
HIGHER = [Column("insertion"), Column("ADD", 0.5), Column("IC", 0.5)]


def results_of(values, objectives=(), masks=()):
    """Results of (n,) values by column, by method."""
    n = len(next(iter(next(iter(values.values())).values())))
    methods = {
        name: MethodResult(
            2,
            name in masks,
            np.ones(n, bool),
            {},
            {c: np.array(x, dtype=float) for c, x in columns.items()},
            objective=dict(objectives).get(name),
        )
        for name, columns in values.items()
    }
    images = [ImageRecord(f"{i}.jpg", 0, "ant", 0.5) for i in range(n)]
    return Results(Protocol(n=n, n_invalid=0), images, methods, n_resamples=400)


def noisy(goodness, n=40, columns=(*LOWER, *HIGHER), seed=0, noise=1.0):
    """Values of methods that differ by ``goodness`` in every column."""
    rng = np.random.default_rng(seed)
    shared = {c: rng.normal(size=n) for c in columns}
    return {
        name: {
            c: shared[c] + (1 if c in HIGHER else -1) * (good + noise * rng.normal(size=n))
            for c in columns
        }
        for name, good in goodness.items()
    }


def ranks(results):
    return {r.method: r.rank for r in aggregate_ranks(results).ranks}


def test_the_best_everywhere_is_first_in_every_resample():
    values = noisy({"worst": 0.0, "best": 9.0, "mid": 4.0}, noise=0.1)
    found = {r.method: r for r in aggregate_ranks(results_of(values)).ranks}
    assert found["best"][1:5] == (1, 1, 1, 1.0) and found["worst"][1:5] == (3, 3, 3, 0.0)
    assert list(found) == ["worst", "best", "mid"], "in the order of the methods"


def test_metrics_that_say_the_same_give_that_metrics_own_ranks():
    rng = np.random.default_rng(3)
    columns = [Column("deletion"), Column("ROAD-MoRF"), Column("AD", 0.5)]  # lower is better
    one = {f"m{m}": rng.normal(size=12) for m in range(6)}
    results = results_of({name: dict.fromkeys(columns, x) for name, x in one.items()})
    ordered = sorted(one, key=lambda name: one[name].mean())
    assert ranks(results) == {name: 1 + ordered.index(name) for name in one}


def test_equal_methods_share_the_better_rank():
    values = noisy({"a": 1.0, "b": 0.0})
    values["twin"] = values["a"]
    found = {r.method: r for r in aggregate_ranks(results_of(values)).ranks}
    assert found["a"][1:] == found["twin"][1:] and (found["a"].rank, found["b"].rank) == (1, 3)


def test_the_order_of_methods_and_images_does_not_matter():
    values = noisy({"a": 0.2, "b": 0.3, "c": 0.1, "d": 0.25})
    expected = {r.method: r for r in aggregate_ranks(results_of(values)).ranks}
    turned = {name: values[name] for name in ("d", "b", "c", "a")}
    again = {r.method: r for r in aggregate_ranks(results_of(turned)).ranks}
    for name, r in expected.items():
        assert r[:5] == again[name][:5] and r.score == pytest.approx(again[name].score)
    order = np.random.default_rng(1).permutation(40)
    shuffled = {n: {c: x[order] for c, x in cs.items()} for n, cs in values.items()}
    for r in aggregate_ranks(results_of(shuffled)).ranks:
        assert r.rank == expected[r.method].rank
        assert r.score == pytest.approx(expected[r.method].score)


def test_units_do_not_matter():
    values = noisy({"a": 0.2, "b": 0.3, "c": 0.1})
    scaled = {
        name: {c: 1000 * x - 70 if c == LOWER[0] else x for c, x in columns.items()}
        for name, columns in values.items()
    }
    both = zip(
        aggregate_ranks(results_of(values)).ranks,
        aggregate_ranks(results_of(scaled)).ranks,
        strict=True,
    )
    assert all(a[:5] == b[:5] and a.score == pytest.approx(b.score) for a, b in both)


def test_the_score_is_the_formula():
    values = noisy({"a": 0.2, "b": 0.5}, n=9)
    expected = {}
    for name in values:
        by_metric = {}
        for c in (*LOWER, *HIGHER):
            every = np.concatenate([values[m][c] for m in values])
            low, middle, high = np.quantile(every, (0.25, 0.5, 0.75))
            z = (values[name][c].mean() - middle) / (high - low) * (1 if c in HIGHER else -1)
            by_metric.setdefault(c.metric, []).append(z)
        expected[name] = np.median([np.mean(levels) for levels in by_metric.values()])
    found = aggregate_ranks(results_of(values))
    assert {r.method: r.score for r in found.ranks} == pytest.approx(expected)
    assert found.metrics == ("deletion", "AD", "ROAD-MoRF", "insertion", "ADD", "IC")


def test_a_metric_of_zeros_and_ones_has_a_spread_and_a_constant_one_says_nothing():
    columns = [Column("IC", 0.5), Column("insertion"), Column("ADD", 0.5)]
    rare = np.arange(20) == 3
    a = dict(zip(columns, (100 * rare, np.ones(20), np.ones(20)), strict=True))
    b = dict(zip(columns, (0 * rare, np.ones(20), np.ones(20)), strict=True))
    found = {r.method: r for r in aggregate_ranks(results_of({"a": a, "b": b})).ranks}
    assert found["a"].rank == found["b"].rank == 1, "two of three metrics see no difference"
    a[columns[1]] = np.ones(20) + rare
    assert ranks(results_of({"a": a, "b": b})) == {"a": 1, "b": 2}


def test_sanity_rows_masks_and_methods_without_values_take_no_rank():
    values = noisy({"a": 1.0, "b": 0.0, "random": 9.0, "frame": 9.0, "dead": 0.0})
    values["dead"] = {c: np.full(30, np.nan) for c in values["a"]}
    assert ranks(results_of(values, masks=["frame"])) == {"a": 1, "b": 2}
    del values["b"]
    assert aggregate_ranks(results_of(values, masks=["frame"])) is None


def test_metrics_that_a_head_was_trained_on_are_left_out_for_all():
    columns = [*LOWER, *HIGHER, Column("IROF")]
    values = noisy({"head": 1.0, "gradcam": 0.0}, columns=columns)
    found = aggregate_ranks(results_of(values, {"head": "mask"}))
    assert found.trained_on == ("deletion", "AD", "ADD", "IC")
    assert found.metrics == ("ROAD-MoRF", "insertion", "IROF")
    assert "deletion, AD, ADD, IC left out as close to a head's training" in found.notes[1]
    few = [Column("ROAD-MoRF"), Column("AD", 0.5), Column("insertion")]
    values = noisy({"head": 1.0, "gradcam": 0.0}, columns=few)
    found = aggregate_ranks(results_of(values, {"head": "mask"}))
    assert not found.ranks and "needs 3 metrics" in found.reason and "there are 2" in found.reason


def test_few_images_or_few_metrics_give_no_ranks():
    seven = aggregate_ranks(results_of(noisy({"a": 1.0, "b": 0.0}, n=7)))
    assert not seven.ranks
    assert seven.notes == ["aggregate rank: too few images for a verdict: 7; at least 8 are needed"]
    assert aggregate_ranks(results_of(noisy({"a": 1.0, "b": 0.0}, n=8))).ranks
    two = results_of(noisy({"a": 1.0, "b": 0.0}, columns=[*LOWER[1:3], HIGHER[0]]))
    assert aggregate_ranks(two) is None and "aggregate" not in format_table(two)


def test_the_interval_holds_what_resampling_gives():
    found = aggregate_ranks(results_of(noisy({"a": 0.3, "b": 0.25, "c": -3.0})))
    a, b, c = found.ranks
    assert (a.lo, a.hi, b.lo, b.hi) == (1, 2, 1, 2) and (c.lo, c.hi) == (3, 3)
    assert 0.05 < a.first < 0.95 and a.first + b.first == pytest.approx(1)


def test_the_ranks_stand_in_every_file_of_a_report(tmp_path):
    results = results_of(noisy({"a_b": 9.0, "c": 0.0, "random": -5.0}, noise=0.1))
    write_report(results, tmp_path)
    for style in ("text", "markdown"):
        assert "aggregate rank" in format_table(results, style)
    line = next(
        x for x in (tmp_path / "leaderboard.md").read_text().splitlines() if "first in" in x
    )
    assert [w.strip() for w in line.strip("|").split("|")][:3] == [
        "method",
        "rank",
        "rank set",
    ]
    with (tmp_path / "leaderboard.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {(r["method"], r["aggregate_rank"], r["aggregate_first"]) for r in rows} == {
        ("a_b", "1", "1.0"),
        ("c", "2", "0.0"),
        ("random", "", ""),
    }
    kept = json.loads((tmp_path / "leaderboard.json").read_text())["aggregate_ranks"]
    assert kept["ranks"][0] == {
        **{"method": "a_b", "rank": 1, "lo": 1, "hi": 1, "first": 1.0},
        "score": kept["ranks"][0]["score"],
    }
    page = (tmp_path / "report.html").read_text()
    assert re.search(r"data-v=1 title=\"first in 100 % of resamples", page)
    # The script sorts by the number of a heading's button, so cells follow the buttons' order.
    board = page[page.index("<table id=") : page.index("</table>")]
    buttons = board[: board.index("<tbody>")].count("<button")
    for row in board.split("<tr")[3:]:
        assert row.count("<td") + row.count("<th ") == buttons
    assert "aggregate rank: median over" in page


def test_a_page_without_ranks_has_no_column_for_them():
    results = results_of(noisy({"a": 1.0, "b": 0.0}, n=7))
    page = html_page(results, standings(results), state=None, photos={})
    assert "all metrics" not in page and "too few images for a verdict: 7" in page


def test_few_photos_tell_no_methods_apart_for_sure():
    values = noisy({"worst": 0.0, "best": 9.0, "mid": 4.0}, n=20, noise=0.1)
    found = {r.method: r for r in aggregate_ranks(results_of(values)).ranks}
    assert found["best"][1:4] == (1, 1, 3) and found["worst"][1:4] == (3, 1, 3)
