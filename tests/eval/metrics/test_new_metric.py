"""A new metric is declared in one place, and every table knows it."""

from collections.abc import Generator
from dataclasses import dataclass

import eval_fakes as fakes
import pytest
from eval_fakes import FakeBackbone

from xattn.eval import GROUPS, METRICS, create_metric, evaluate, format_table, metrics
from xattn.eval.leaderboard import Comparison, groups_of
from xattn.eval.metric_words import metric_about
from xattn.eval.metrics import (
    Column,
    Finish,
    MeanMetric,
    MetricGroup,
    MetricInfo,
    PerturbationMetric,
    Request,
    Sample,
    registry,
)
from xattn.eval.report.standings import standings


@dataclass(frozen=True)
class Brightness(PerturbationMetric):
    """The mean of the grey map."""

    gain: float = 1.0

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column("brightness"),)

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        yield from ()
        return lambda scores: {Column("brightness"): self.gain * float(sample.grey.mean())}


class MeanBrightness(MeanMetric):
    """The mean over photos."""

    metric = "brightness"
    values = staticmethod(lambda maps: maps.mean((1, 2, 3)))


GROUP = MetricGroup(
    "brightness",
    Brightness,
    {"brightness": MetricInfo("mean of m", True, kind="complexity")},
    classes=(MeanBrightness,),
    words={"brightness": ("Brightness", "How bright {removed} is")},
)


@pytest.fixture(autouse=True)
def made_up():
    registry.register(GROUP)
    yield
    registry.REGISTRY.remove("brightness")


def test_it_is_a_group_a_metric_and_a_class():
    assert GROUPS["brightness"] is GROUP and METRICS["brightness"].higher_is_better
    assert metrics.MeanBrightness is MeanBrightness
    assert create_metric("brightness", gain=2.0) == Brightness(2.0)
    with pytest.raises(
        ValueError, match=r"brightness does not take that option \(speed\); its options: gain"
    ):
        create_metric("brightness", speed=1)


@pytest.mark.parametrize("choice", ["direct", "all"])
def test_compare_measures_it(choice):
    groups = groups_of(Comparison(backbone=FakeBackbone(), metrics=(choice,)))
    assert groups[-1] == "brightness" and len(groups) > 8
    assert "localization" not in groups


def test_evaluate_and_the_leaderboard_have_its_column():
    results = evaluate(
        FakeBackbone(), fakes.rows(), fakes.images(3), metrics=["brightness"], progress=False
    )
    column = Column("brightness")
    assert results.columns == [column] and results.mean("bright", "brightness") > 0
    assert results.metric_id(column).startswith("brightness-prob-pred-")
    assert {s.column for s in standings(results)} == {column}
    assert "complexity" in format_table(results).splitlines()[0]
    assert "brightness ↑" in format_table(results)


def test_the_viewer_has_its_words():
    assert metric_about("brightness", True) == "How bright what the map marks is. Higher is better."


def test_names_that_are_taken_are_refused():
    class Other(Brightness):
        """Another metric."""

    with pytest.raises(ValueError, match="group: brightness is taken"):
        registry.register(MetricGroup("brightness", Other, {}))
    registry.register(GROUP)  # its file was imported again
    with pytest.raises(ValueError, match="group: AD is taken"):
        registry.register(MetricGroup("new", Brightness, {"AD": GROUP.metrics["brightness"]}))
