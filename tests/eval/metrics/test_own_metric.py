"""A metric of one's own: a probe that nothing registers, a registered one, and a plain function."""

from __future__ import annotations

import json
from typing import ClassVar

import eval_fakes as fakes
import pytest
from eval_fakes import FakeBackbone

import xattn
from xattn.eval import (
    METRICS,
    Column,
    MetricInfo,
    PerturbationMetric,
    Request,
    evaluate,
    format_table,
    read_json,
    write_csv,
    write_json,
)
from xattn.eval.metrics import registry
from xattn.eval.report.leaderboard_files import write_report

INFO = MetricInfo("p minus the score of the upper half", True, low=-1.0)


class UpperHalf(PerturbationMetric):
    """How much of the score the lower half of the image carries; not a dataclass, and not registered."""

    info: ClassVar = {"lower-half": INFO}

    def __init__(self, share: float = 0.5) -> None:
        self.share = share

    def measure(self, sample):
        image = sample.image.clone()
        image[:, int(self.share * image.shape[1]) :] = 0
        yield Request("upper", image)
        return lambda scores: {Column("lower-half"): sample.score - float(scores["upper"][0])}


def run(*metrics, **options):
    options = {"progress": False, **options}
    return evaluate(FakeBackbone(), fakes.rows(), fakes.images(9), metrics=metrics, **options)


def test_a_probe_that_is_not_registered_is_measured_and_reported_everywhere(tmp_path):
    results = run("complexity", UpperHalf(), state=tmp_path / "state.sqlite")
    assert "lower-half" not in METRICS and results.info("lower-half") == INFO
    assert [c.key for c in results.columns][-1] == "lower-half"
    assert results.mean("bright", "lower-half") == results.mean("centre", "lower-half") != 0
    assert "lower-half ↑" in format_table(results)
    assert results.metric_id(Column("lower-half")) != run(UpperHalf(0.25)).metric_id(
        Column("lower-half")
    ), "its options are part of what a value means"
    write_json(results, tmp_path / "results.json")
    again = read_json(tmp_path / "results.json")
    assert again.infos == {"lower-half": INFO} and format_table(again) == format_table(results)
    write_csv(results, tmp_path / "results.csv")
    assert "lower-half" in (tmp_path / "results.csv").read_text()
    for file in write_report(results, tmp_path / "report"):
        if file.name != "seconds.js":
            assert "lower-half" in file.read_text(), file.name
    resumed = run("complexity", UpperHalf(), state=tmp_path / "state.sqlite")
    assert resumed.cost["images_scored"] == 0
    assert resumed.mean("bright", "lower-half") == results.mean("bright", "lower-half")


@pytest.fixture
def registered():
    yield
    for name in ("toy_probe", "toy_function"):
        registry.REGISTRY.remove(name)


def test_a_registered_probe_and_a_function_are_groups_by_name(registered, tmp_path):
    xattn.register_metric("toy_probe")(UpperHalf)

    @xattn.register_metric("toy_function", MetricInfo("share of the map above the middle", False))
    def above(image, map, *, times=1.0):
        assert image.shape == (3, 18, 20) and map.shape == (18, 20)
        return times * map[:9].sum() / map.sum()

    assert above.__name__ == "above", "the function stays a function"
    results = run("toy_probe", "toy_function")
    assert [c.key for c in results.columns] == ["lower-half", "toy_function"]
    assert 0.45 < results.mean("centre", "toy_function") < 0.55
    write_json(results, tmp_path / "results.json")
    for name in ("toy_probe", "toy_function"):  # as in a viewer that has not imported them
        registry.REGISTRY.remove(name)
    assert "toy_function ↓" in format_table(read_json(tmp_path / "results.json"))


def test_a_changed_metric_takes_its_own_name_again(registered):
    def register(formula):
        @xattn.register_metric("toy_function", MetricInfo(formula, True))
        def always(map):
            return 1.0

    register("one"), register("the number one")
    assert METRICS["toy_function"].formula == "the number one"
    with pytest.raises(ValueError, match="group: toy_function is taken"):
        xattn.register_metric("toy_function", MetricInfo("another", True))(lambda map: 0.0)


def test_results_files_say_what_a_metric_is(tmp_path):
    write_json(run(UpperHalf()), tmp_path / "results.json")
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["infos"]["lower-half"]["higher_is_better"] is True
    record["infos"]["lower-half"]["higher_is_better"] = "yes"
    (tmp_path / "results.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="^results: the description of lower-half is not valid"):
        read_json(tmp_path / "results.json")


class Silent(UpperHalf):
    info: ClassVar = {}
    columns = (Column("silent"),)


class Fails(UpperHalf):
    def measure(self, sample):
        raise RuntimeError("no luck")
        yield


class Elsewhere(UpperHalf):
    def measure(self, sample):
        yield from ()
        return lambda scores: {"lower-half": 1.0}


@pytest.mark.parametrize(
    "metric, says",
    [
        (Silent(), "metrics: Silent does not describe its column 'silent'; give it info = "),
        (Fails(), r"metrics: Fails failed \(RuntimeError: no luck\)"),
        (
            Elsewhere(),
            "metrics: Elsewhere returned 'lower-half'; return {column: value} for its columns",
        ),
        (
            UpperHalf,
            "metrics: got <class .*; give names that xattn list prints, or instances of PerturbationMetric",
        ),
        (len, "metrics: got <built-in function len>; give names"),
        (
            type("None_", (UpperHalf,), {"info": {}})(),
            "metrics: None_ has no columns; give it info",
        ),
        (
            type("Ad", (UpperHalf,), {"info": {"AD": INFO}})(),
            "metrics: AD is another metric's name",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line(metric, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        run(metric)


@pytest.mark.parametrize(
    "metric, info, says",
    [
        (UpperHalf, "higher", "info: got 'higher' for 'toy_probe'; give MetricInfo"),
        (lambda map: 0.0, None, "info: got None for 'toy_probe'; give MetricInfo"),
        (lambda heat: 0.0, INFO, "metric: toy_probe has the parameters heat; a function may only"),
        (lambda map: 0.0, {"a": INFO}, "info: got a; a function measures one metric, 'toy_probe'"),
        (
            dict,
            INFO,
            "metric: got <class 'dict'>; decorate a function, or a subclass of PerturbationMetric",
        ),
        (
            lambda map: 0.0,
            {"AD": INFO, "IC": INFO},
            "info: got AD, IC; a function measures one metric",
        ),
    ],
)
def test_what_cannot_be_registered_is_one_line(metric, info, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        xattn.register_metric("toy_probe", info)(metric)
    assert "toy_probe" not in registry.REGISTRY.registered()
