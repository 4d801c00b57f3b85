"""Every method and metric that can be chosen by name is called something in plain words."""

import pytest

from xattn.eval import metric_words as words
from xattn.eval.metrics.registry import METRICS, WORDS
from xattn.explainers.base import EXPLAINERS, method_title


def test_every_explainer_has_a_title_of_its_own():
    own = [n for n in EXPLAINERS if EXPLAINERS.get(n).__module__.startswith("xattn.")]
    titles = [EXPLAINERS.entry(name).title for name in own]
    assert all(titles) and len(set(titles)) == len(own)
    assert not any("_" in title for title in titles)


@pytest.mark.parametrize("name", [n for n in METRICS if not n.startswith("toy")])
def test_every_metric_has_words(name):
    title, about = WORDS[name]
    assert title and about and "_" not in title and "\n" not in about
    assert about[0].isupper() and not about.endswith(".") and len(about) < 100


def test_no_words_are_left_of_what_is_gone_and_titles_tell_metrics_apart():
    assert set(WORDS) <= set(METRICS)
    assert len({title for title, _ in WORDS.values()}) == len(WORDS)


def test_a_row_that_a_method_has_to_beat_is_named_by_the_method():
    assert method_title("qk_randomized_rollout") == "Attention rollout, random attention"
    assert method_title("static_rollout") == "Attention rollout, fixed attention"
    assert method_title("our {head}") == "our {head}"


def test_levels_are_part_of_a_metrics_words():
    assert words.metric_title("AD@100") == "Average drop, whole map"
    assert "as much of each pixel as the map says is kept" in words.metric_about("AD@100")
    assert words.metric_about("ADD@15", True) == (
        "How much confidence is lost when the top 15 % is removed. Higher is better."
    )
    assert words.named_metric("AD@50") == "AD@50: average drop, top half"
    assert words.named_metric("ROAD") == "ROAD"


def test_a_key_that_nobody_knows_is_its_own_title():
    assert words.named_metric("our {metric}") == "our {metric}"
    assert words.metric_about("our {metric}") == ""
    assert words.metric_about("mine", True) == "Higher is better."
