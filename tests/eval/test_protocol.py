"""A protocol's id changes exactly when the meaning of a number does."""

import json

import pytest

from xattn.eval import Protocol

OTHERS = [
    {"class_policy": "given"},
    {"normalization": "minmax_upsampled"},
    {"threshold": "kth"},
    {"masked_value": "mean"},
    {"ic_margin": 0.0},
    {"resize": "nearest"},
    {"levels": (1.0, 0.5)},
    {"view": "whole"},
]


@pytest.mark.parametrize("change", OTHERS, ids=lambda c: next(iter(c)))
def test_another_meaning_is_another_id(change):
    assert Protocol(**change).id != Protocol().id
    if "levels" not in change:
        assert Protocol(**change).metric_id("AD", 0.5) != Protocol().metric_id("AD", 0.5)


def test_what_does_not_change_the_meaning_keeps_the_id():
    assert Protocol(seed=3, n=500, n_invalid=2).id == Protocol().id
    one, two = Protocol(levels=(0.5,)), Protocol(levels=(1, 0.5))
    assert one.metric_id("AD", 0.5) == two.metric_id("AD", 0.5)


def test_metric_ids_differ_by_metric_and_level():
    p = Protocol()
    ids = {p.metric_id(m, v) for m in ("AD", "IC", "ADD", "AG") for v in p.levels}
    assert len(ids) == 12
    assert all(
        i.partition("-")[0]
        in {f"{m}@{v}" for m in ("AD", "IC", "ADD", "AG") for v in (100, 50, 15)}
        for i in ids
    )
    with pytest.raises(ValueError, match="metric"):
        p.metric_id("AUC", 0.5)


def test_the_id_is_short_readable_and_stable():
    assert Protocol().id.startswith("prob-pred-black-")
    assert len(Protocol().id) < 30
    assert Protocol(levels=[1, 0.5, 0.15]).id == Protocol().id


def test_json_round_trip_and_a_forged_id():
    p = Protocol(threshold="kth", seed=4, n=7)
    data = json.loads(json.dumps({**p.to_dict(), "id": p.id}))
    assert Protocol.from_dict(data) == p
    with pytest.raises(ValueError, match="stored id"):
        Protocol.from_dict({**data, "masked_value": "mean"})
    with pytest.raises(ValueError, match="unknown"):
        Protocol.from_dict({"colour": 1})


@pytest.mark.parametrize(
    "wrong",
    [
        {"score": "margin"},
        {"levels": ()},
        {"levels": (0.0,)},
        {"levels": (1.5,)},
        {"levels": (0.5, 0.5)},
        {"ic_margin": -1},
        {"view": "left"},
    ],
    ids=str,
)
def test_wrong_fields_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got"):
        Protocol(**wrong)
