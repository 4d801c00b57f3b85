"""Tables, comparisons, warnings, and files that are written whole or not at all."""

import csv

import eval_fakes as fakes
import numpy as np
import pytest
import torch
from eval_fakes import FakeBackbone

from xattn.eval import Column, evaluate, format_table, functional, read_json, write_csv, write_json
from xattn.eval.evaluation.results import ImageRecord, MethodResult, Results
from xattn.eval.report.results_files import from_dict, to_dict


@pytest.fixture(scope="module")
def results():
    rows = fakes.rows()
    rows["flat"] = fakes.Flat(FakeBackbone())
    return evaluate(
        FakeBackbone(), rows, fakes.images(7), max_forward_batch=8, progress=False, seed=2
    )


def made_up(metric="AD", **given):
    """Results with given values of ``metric`` at 100 % and nothing else."""
    from xattn.eval import Protocol

    n = len(next(iter(given.values())))
    methods = {
        name: MethodResult(1, False, np.ones(n, bool), {}, {Column(metric, 1.0): np.array(values)})
        for name, values in given.items()
    }
    images = [ImageRecord(str(i), 0, "ant", 0.5) for i in range(n)]
    return Results(Protocol(levels=(1.0,), n=n, n_invalid=0), images, methods)


def test_the_table_shows_every_row_level_count_and_id(results):
    text = format_table(results)
    for word in ("retained 100 %", "retained 50 %", "retained 15 %", "AD ↓", "IC ↑", "forwards"):
        assert word in text
    assert results.protocol.id in text and "7 images on fake" in text
    line = next(x for x in text.splitlines() if x.startswith("ones"))
    assert "0.00 [0.00, 0.00]" in line
    line = next(x for x in text.splitlines() if x.startswith("flat"))
    assert line.split()[-3:] == ["0", "7", "1"]
    assert "flat: 7 invalid maps, left out of its means (constant map)" in text


def test_markdown_has_one_cell_a_column(results):
    lines = [x for x in format_table(results, "markdown").splitlines() if x.startswith("|")]
    assert len(lines) == 3 * (2 + 5)
    assert {x.count("|") for x in lines} == {9}
    with pytest.raises(ValueError, match="style"):
        format_table(results, "latex")


@pytest.mark.parametrize("metric, up", [("AD", False), ("IC", True)])
def test_compare_knows_the_better_side_of_each_metric(metric, up):
    rng = np.random.default_rng(0)
    hard = rng.uniform(30, 60, 40)
    results = made_up(metric, low=hard - 5 + rng.normal(size=40), same=hard, ref=hard)
    (less,) = results.compare("low", "ref")
    assert less.hi < 0 and less.diff == pytest.approx(-5, abs=1)
    assert (less.better, less.worse) == ((False, True) if up else (True, False))
    (more,) = results.compare("ref", "low")
    assert (more.better, more.worse) == (less.worse, less.better)
    (same,) = results.compare("same", "ref")
    assert not same.better and not same.worse
    with pytest.raises(ValueError, match="'nobody'"):
        results.compare("nobody", "ref")


def test_a_method_that_does_not_beat_a_sanity_row_is_named():
    hard = np.linspace(30, 60, 20)
    results = made_up(mine=hard, random=hard + 5, centre=hard - 1, randomized_mine=hard + 9)
    (line,) = results.warnings()
    assert line == "mine does not beat centre in AD@100"
    assert made_up(mine=hard, random=hard + 5, centre=hard + 1).warnings() == []


def test_fewer_than_eight_images_give_no_verdict_however_clear_the_interval():
    hard = np.linspace(30, 60, 4)
    results = made_up(good=hard - 20, poor=hard + 9, random=hard, centre=hard + 1)
    (d,) = results.compare("good", "random")
    assert d.hi < 0 and not d.better and d.verdict == "too few images for a verdict"
    words = "good, poor: too few images for a verdict in AD@100; at least 8 are needed"
    assert results.warnings() == [words]
    assert f"warning: {words}\n" in format_table(results)
    assert results.sanity_failures()["good"] == {Column("AD", 1.0): None}
    eight = np.linspace(30, 60, 8)
    results = made_up(good=eight - 20, poor=eight + 9, random=eight)
    assert results.warnings() == ["poor does not beat random in AD@100"]
    assert results.compare("good", "random")[0].verdict == "better"
    assert results.compare("poor", "random")[0].verdict == "worse"


def test_a_column_that_was_measured_on_few_images_is_named_beside_the_verdicts_of_others():
    hard = np.linspace(30, 60, 20)
    results = made_up(mine=hard + 9, other=hard - 5, random=hard)
    few = np.where(np.arange(20) < 2, 0.5, np.nan)
    for name, method in results.methods.items():
        method.values[Column("ADCC")] = few + (name == "other")
    assert results.warnings() == [
        "mine, other: too few images for a verdict in ADCC; at least 8 are needed",
        "mine does not beat random in AD@100",
    ]


def test_a_method_without_a_valid_map_is_counted_and_not_compared():
    nothing = np.full(20, np.nan)
    results = made_up(mine=nothing, random=np.linspace(30, 60, 20))
    results.methods["mine"].valid[:] = False
    (line,) = results.warnings()
    assert line == "mine: 20 invalid maps, left out of its means (constant or non-finite)"


def test_ones_is_no_rival_and_sanity_rows_are_not_judged(results):
    lines = results.warnings()
    assert not any("ones" in line for line in lines)
    assert not any(line.startswith(("random ", "centre ")) for line in lines)


def test_json_reads_back_equal_and_can_be_recomputed(results, tmp_path):
    path = tmp_path / "deep" / "results.json"
    write_json(results, path)
    again = read_json(path)
    assert format_table(again) == format_table(results)
    assert again.rows()[0] == results.rows()[0]
    assert again.images == results.images and again.protocol == results.protocol
    method = again.methods["bright"]
    p = torch.tensor([image.p for image in again.images], dtype=torch.float64)
    recomputed = functional.average_drop(p, torch.from_numpy(method.scores["q@50"])).item()
    assert recomputed == pytest.approx(again.mean("bright", "AD", 0.5), rel=1e-12)
    assert "NaN" not in path.read_text()


def trained():
    """A head that was trained on masked images, one on other things, and a method that was not trained."""
    hard = np.linspace(30, 60, 20)
    results = made_up(mine=hard - 9, later=hard, gradcam=hard, random=hard + 9)
    results.methods["mine"].objective = "mask"
    results.methods["later"].objective = "of a later version"
    return results


@pytest.mark.parametrize(("fill", "marked"), [("black", True), ("rise", True), ("noise", False)])
def test_a_mark_follows_the_fill_that_was_measured(fill, marked):
    results = made_up(mine=np.linspace(30, 60, 20))
    results.methods["mine"].objective = "outcomes"
    results.options["AD@100"] = {"masked_value": fill}
    assert [row.trained_on for row in results.rows()] == [marked]


def test_an_objective_that_is_not_known_is_a_warning():
    (line,) = trained().warnings()[-1:]
    assert line == (
        "later: trained on 'of a later version', which is unknown to this version, so no metric is "
        "marked as close to it"
    )


def test_what_heads_were_trained_on_is_in_the_files(tmp_path):
    results = trained()
    write_json(results, tmp_path / "r.json")
    again = read_json(tmp_path / "r.json")
    assert again.rows() == results.rows() and again.methods["mine"].objective == "mask"
    write_csv(results, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trained_on"] for row in rows] == ["True", "False", "False", "False"]


def test_an_objective_of_another_kind_is_refused():
    data = to_dict(trained())
    data["methods"]["mine"]["objective"] = ["mask"]
    with pytest.raises(ValueError, match="objective of mine"):
        from_dict(data)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "xattn-results", "version": 1}'])
def test_a_damaged_file_is_one_clear_error(text, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="evaluate again"):
        read_json(path)
    with pytest.raises(OSError):
        read_json(tmp_path / "missing.json")


def test_csv_holds_the_table_and_the_images_beside_it(results, tmp_path):
    sibling = write_csv(results, tmp_path / "r.csv")
    assert sibling == tmp_path / "r.images.csv"
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 12
    got = {(r["method"], r["metric"], float(r["level"])): r for r in rows}
    assert float(got["bright", "IC", 0.5]["mean"]) == results.mean("bright", "IC", 0.5)
    assert got["flat", "AD", 1.0]["mean"] == "" and got["flat", "AD", 1.0]["n_invalid"] == "7"
    with sibling.open() as file:
        images = list(csv.DictReader(file))
    assert len(images) == 5 * 7
    mine = [float(r["AD@15"]) for r in images if r["method"] == "bright"]
    assert mine == results.methods["bright"].values[Column("AD", 0.15)].tolist()
