"""Which metrics a head was trained on: what its record of training says, and who has such a record."""

from dataclasses import asdict
from typing import get_args, get_type_hints

import pytest

from xattn import create_head, load_backbone
from xattn.config import ProbeConfig, TrainConfig
from xattn.eval import METRICS
from xattn.eval.metrics.objectives import TRAINED_ON, is_trained_on, objective_of
from xattn.eval.sanity import sanity_rows
from xattn.explainers import create_explainer

WITHOUT = {k: v for k, v in asdict(TrainConfig()).items() if k != "objective"}


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("test_resnet", weights=None, input_size=64, num_classes=5)


def explained(backbone, summary):
    head = create_head("lcam", backbone)
    head.summary = summary
    return create_explainer("head", backbone, head)


def test_every_metric_of_an_objective_is_in_the_registry():
    assert {name for names in TRAINED_ON.values() for name in names} <= set(METRICS)
    for metric in ("deletion", "insertion", "ROAD", "AOPC", "IROF", "pointing"):
        assert not any(is_trained_on(objective, metric) for objective in TRAINED_ON)


def test_every_objective_of_training_says_its_metrics():
    hint = get_type_hints(TrainConfig)["objective"]
    choices = {c for part in (hint, *get_args(hint)) for c in get_args(part) if isinstance(c, str)}
    assert {"masking", "outcomes"} <= choices <= set(TRAINED_ON)


@pytest.mark.parametrize(
    ("summary", "objective"),
    [
        ({"config": {**WITHOUT, "objective": "outcomes"}}, "outcomes"),
        ({"config": {**WITHOUT, "objective": "masking"}}, "masking"),
        ({"config": WITHOUT}, "masking"),
        ({"config": {"objective": "of a later version"}}, "of a later version"),
        ({"config": asdict(ProbeConfig())}, None),
        ({}, None),
        ({"config": "damaged"}, None),
        (["damaged"], None),
    ],
    ids=["outcomes", "masking", "earlier", "later", "probed", "untrained", "damaged", "no record"],
)
def test_the_record_of_training_says_the_objective(backbone, summary, objective):
    assert objective_of(explained(backbone, summary)) == objective


def test_only_rows_that_show_a_heads_maps_have_its_objective(backbone):
    head = create_head("lcam", backbone)
    head.summary = {"config": {"objective": "masking"}}
    beside = create_explainer("gradcam", backbone, head)
    assert beside.head is head and objective_of(beside) is None
    rows = sanity_rows(backbone, "head", head=head)
    assert {name: objective_of(row) for name, row in rows.items()} == {
        "random": None, "centre": None, "ones": None, "randomized_head": "masking",
    }  # fmt: skip
    assert objective_of(object()) is None
