"""Every method and metric that can be chosen by name has a title and a sentence in plain words."""

import pytest

from xattn.eval.metrics.registry import METRICS
from xattn.explainers.base import EXPLAINERS
from xattn.pictures import words

OWN = [name for name in EXPLAINERS if EXPLAINERS.get(name).__module__.startswith("xattn.")]


@pytest.mark.parametrize("name", OWN)
def test_every_explainer_has_words(name):
    check(words.METHODS[name])


@pytest.mark.parametrize("name", [n for n in METRICS if not n.startswith("toy")])
def test_every_metric_has_words(name):
    check(words.METRICS[name])


def check(found):
    assert found.title and found.about and "_" not in found.title
    assert found.about[0].isupper() and not found.about.endswith(".") and len(found.about) < 100
    assert "\n" not in found.about


def test_no_words_are_left_of_what_is_gone():
    assert set(words.METHODS) == set(OWN)
    assert set(words.METRICS) <= set(METRICS)


@pytest.mark.parametrize("table", [words.METHODS, words.METRICS])
def test_titles_tell_things_apart(table):
    assert len({found.title for found in table.values()}) == len(table)


def test_a_row_that_a_method_has_to_beat_is_named_by_the_method():
    assert words.method_title("qk_randomized_rollout") == "Attention rollout, random attention"
    assert words.method_title("static_rollout") == "Attention rollout, fixed attention"
    assert words.method_about("randomized_lrp") == "The method on a network that knows nothing."


def test_levels_are_part_of_a_metrics_words():
    assert words.metric_title("AD@100") == "Average drop, whole map"
    assert "as much of each pixel as the map says is kept" in words.metric_about("AD@100")
    assert words.metric_about("ADD@15", True) == (
        "How much confidence is lost when the top 15 % is removed. Higher is better."
    )
    assert words.named_metric("AD@50") == "AD@50: average drop, top half"
    assert words.named_metric("ROAD") == "ROAD"


def test_a_name_that_nobody_knows_is_its_own_title():
    assert words.method_title("our {head}") == words.named_metric("our {head}") == "our {head}"
    assert words.method_about("our {head}") == words.metric_about("our {head}") == ""
    assert words.metric_about("mine", True) == "Higher is better."
