"""Which metrics are close to a head's training: what both declare, and what its record says."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from xattn import create_head, load_backbone
from xattn.config import ProbeConfig, TrainConfig
from xattn.eval import METRICS, Protocol, create_metric
from xattn.eval.metrics.objectives import OBJECTIVES, find_shared, objective_of
from xattn.eval.metrics.registry import direct_groups
from xattn.eval.sanity import sanity_rows
from xattn.explainers import create_explainer
from xattn.training import list_objectives
from xattn.training.objectives.mask import masked_logits

WITHOUT = {k: v for k, v in asdict(TrainConfig()).items() if k != "objective"}


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("test_resnet", weights=None, input_size=64, num_classes=5)


def explained(backbone, summary):
    head = create_head("lcam", backbone)
    head.summary = summary
    return create_explainer("head", backbone, head)


MASKED = {"AD", "IC", "ADD", "AG", "drop", "ADCC"}
TABLE = {"squares", "subsets", "single-deletion", "photo-gain", "class-contrast", "network-contrast",
         "class-contrast-mosaic"}  # fmt: skip
BLACK_TABLE = {"sensitivity-n", "mufidelity"}
ERASER, BY_RANK = {"comprehensiveness", "sufficiency"}, {"thinned", "saco"}
BLUR = {"SIC", "AIC"}


@pytest.mark.parametrize(
    ("objective", "marked"),
    [
        (
            "mask",
            MASKED | BLACK_TABLE | ERASER | {"complexity", "deletion", "AOPC", "infidelity"},
        ),
        ("mask-mean", MASKED | TABLE | BY_RANK | {"complexity", "IROF"}),
        ("mask-features", MASKED | {"complexity"}),
        (
            "outcomes",
            MASKED
            | TABLE
            | BLACK_TABLE
            | ERASER
            | BY_RANK
            | BLUR
            | {"deletion", "insertion", "AOPC", "IROF", "infidelity", "monotonicity"},
        ),
        ("of a later version", set()),
        (None, set()),
    ],
)
def test_a_metric_is_close_by_its_score_and_by_its_masks_or_fill(objective, marked):
    assert {m for m, info in METRICS.items() if find_shared(objective, info.reads).close} == marked


def test_nothing_is_shared_with_what_is_not_known():
    reads = METRICS["AD"].reads
    for given in ((None, reads), ("of a later version", reads), ("mask", None)):
        assert find_shared(*given) == (False, False, False)


def test_another_fill_takes_a_mark_away_or_gives_one():
    ad, insertion = METRICS["AD"].reads, METRICS["insertion"].reads
    assert not find_shared("outcomes", ad, {"masked_value": "noise"}).close
    assert find_shared("outcomes", ad, {"masked_value": "rise"}).close, "a blur, too"
    assert find_shared("mask", ad, {"masked_value": "noise"}).close, "the map is still the mask"
    assert not find_shared("outcomes", insertion, {"fill": "road"}).close
    assert find_shared("mask", insertion, {"fill": "black"}).close


def test_the_fill_that_a_metric_declares_is_its_default():
    for name in direct_groups():
        probe = create_metric(name, Protocol())
        for column in probe.columns:
            options, reads = probe.column_options(column), METRICS[column.metric].reads
            for option in options.keys() & {"fill", "masked_value"}:
                assert reads.fill == options[option], column


@pytest.mark.parametrize("policy", ["raw_normalize", "renormalize", "normalized"])
def test_training_shows_the_fill_that_its_objective_declares(backbone, policy):
    head = create_head("ttame", backbone, mask_policy=policy)
    head.summary = {"config": {"objective": "mask"}}
    (fill,) = OBJECTIVES[objective_of(create_explainer("head", backbone, head))].fills
    images = torch.rand(1, 3, 64, 64)
    colour = {"black": torch.zeros(3), "mean": torch.tensor(backbone.preprocessing.mean)}[fill]
    hidden = colour[None, :, None, None].expand_as(images)
    found = masked_logits(backbone, images, torch.zeros(1, 1, 64, 64), policy)
    torch.testing.assert_close(found, backbone.logits(hidden), rtol=1e-4, atol=1e-5)


def test_every_objective_of_training_is_known():
    assert {"mask", "outcomes"} <= set(list_objectives()) <= set(OBJECTIVES)


def test_the_page_of_metrics_has_what_both_declare():
    text = (Path(__file__).parents[3] / "docs/metrics.md").read_text()
    section = text.split("## What a metric shares with a head's training")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| ") and not line.startswith("| :--")
    ]
    objectives = {n: row[2:] for row in rows for n in re.findall(r"`([\w-]+)`", row[0])}
    assert {name.partition("-")[0] for name in objectives} == set(list_objectives())
    for name, told in objectives.items():
        assert told == [", ".join(part) for part in OBJECTIVES[name]], name
    head = next(row for row in rows if row[0] == "metric")
    columns = [name.strip("`") for name in head[4:]]
    assert (
        {"mask", "mask-mean", "mask-features", "outcomes", "rank"} < set(columns) <= set(objectives)
    )
    listed = {m: row[1:] for row in rows if len(row) == len(head) for m in row[0].split(", ")}
    assert listed.pop("metric") and not any(listed.pop("all others"))
    said = {}
    for metric, info in METRICS.items():
        if info.reads is not None:
            found = [find_shared(name, info.reads) for name in columns]
            cells = [
                ", ".join(part for part in s._fields if getattr(s, part)) + " †" * s.close
                for s in found
            ]
            fill = info.reads.fill.replace("image-mean", "mean")
            shown = [c if "score" in c else "" for c in cells]
            said[metric] = [info.reads.score, info.reads.masks, fill, *shown]
    assert listed == said


@pytest.mark.parametrize(
    ("summary", "objective"),
    [
        ({"config": {**WITHOUT, "objective": "outcomes"}}, "outcomes"),
        ({"config": {**WITHOUT, "objective": "mask"}}, "mask"),
        ({"config": WITHOUT}, None),
        (
            {"config": {"objective": "labels:estimate=ridge"}, "table": {"fills": ["drop"]}},
            "labels-drop",
        ),
        ({"config": {"objective": "of a later version"}}, "of a later version"),
        ({"config": asdict(ProbeConfig())}, None),
        ({}, None),
        ({"config": "damaged"}, None),
        (["damaged"], None),
    ],
    ids=[
        "outcomes",
        "mask",
        "none",
        "labels",
        "later",
        "probed",
        "untrained",
        "damaged",
        "no record",
    ],
)
def test_the_record_of_training_says_the_objective(backbone, summary, objective):
    assert objective_of(explained(backbone, summary)) == objective


def test_only_rows_that_show_a_heads_maps_have_its_objective(backbone):
    head = create_head("lcam", backbone)
    head.summary = {"config": {"objective": "mask"}}
    beside = create_explainer("gradcam", backbone, head)
    assert beside.head is head and objective_of(beside) is None
    rows = sanity_rows(backbone, "head", head=head)
    assert {name: objective_of(row) for name, row in rows.items()} == {
        "random": None, "centre": None, "ones": None, "randomized_head": "mask",
    }  # fmt: skip
    assert objective_of(object()) is None
