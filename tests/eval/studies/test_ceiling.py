"""Ceilings: a search that never makes an order worse, the best order of an additive game, and the study."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_class_folds import backbone, paths  # noqa: F401
from torch import nn

from xattn import load_backbone
from xattn.backbone import Preprocessing
from xattn.eval.metrics.curves import InsertionDeletionMetric
from xattn.eval.studies import ceiling
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.ceiling import SEARCH, Photo, map_of, search_order, way
from xattn.eval.studies.fold_rows import Row

SIZE, STEPS = (12, 15), 7
METRIC = InsertionDeletionMetric(steps=STEPS, deletion_fill="black", insertion_fill="black")


class Linear(nn.Module):
    """Two classes whose logits are linear in the pixels."""

    def __init__(self):
        super().__init__()
        weight = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(3)).double()
        self.weight = nn.Parameter(weight / 4)
        self.preprocessing = Preprocessing(SIZE, (0.0,) * 3, (1.0,) * 3)

    def forward_taps(self, x):
        f = (x * self.weight.to(x)).sum((1, 2, 3))
        return torch.stack([f, -f], 1), [x[:, :1]]


class Bent(Linear):
    """Not additive: neighbouring pixels count together."""

    def forward_taps(self, x):
        f = (x * self.weight.to(x)).sum(1)
        f = (f[:, 1:] * f[:, :-1]).sum((1, 2)) * 8
        return torch.stack([f, -f], 1), [x[:, :1]]


def pictured(network):
    """A photo of noise, as the study scores it, and an order of its pixels."""
    generator = torch.Generator().manual_seed(4)
    image = torch.rand(3, *SIZE, generator=generator)
    order = torch.randperm(image[0].numel(), generator=generator)
    return Photo(image, 0, load_backbone(network()), METRIC), order


def objective(photo, order):
    values = photo.values(map_of(order, SIZE))
    return values["insertion"] - values["deletion"]


@pytest.mark.parametrize("network", [Linear, Bent])
def test_more_tries_never_make_the_objective_worse_and_find_better_orders(network):
    photo, order = pictured(network)
    found = [objective(photo, order)]
    for tries in (1, 2, 3, 10, 40):
        after = search_order(order, photo.gains(), STEPS, tries)
        assert torch.equal(after.sort().values, torch.arange(len(order)))
        found.append(objective(photo, after))
    assert all(b >= a - 1e-6 for a, b in itertools.pairwise(found))
    assert found[-1] > found[0] + 0.01


def test_in_an_additive_game_no_search_is_ahead_of_the_order_of_the_weights():
    """The rearrangement inequality; the probability grows with the sum."""
    photo, order = pictured(Linear)
    weights = (photo.backbone.model.weight * photo.image).sum(0).flatten()
    best = weights.argsort(descending=True)
    assert torch.equal(search_order(best, photo.gains(), STEPS, 50), best)
    assert objective(photo, order) < objective(photo, search_order(order, photo.gains(), STEPS, 50))
    assert objective(photo, search_order(order, photo.gains(), STEPS, 50)) < objective(photo, best)


def test_gains_are_those_of_the_metric_and_cost_a_pass_only_for_photos_that_are_new(monkeypatch):
    photo, order = pictured(Bent)
    passed = []
    logits = photo.backbone.logits

    def counted(images):
        passed.append(len(images))
        return logits(images)

    monkeypatch.setitem(vars(photo.backbone), "logits", counted)
    gains = replace(photo, max_forward_batch=2).gains()
    first = gains(order)
    assert passed == [2] * (1 + STEPS)  # the clean photo, T of deletion and T of insertion
    area = float((first[1:] + first[:-1]).sum() / 2 / STEPS)
    assert area == pytest.approx(objective(photo, order), abs=1e-6)
    passed.clear()
    assert torch.equal(gains(order), first) and not passed
    after = order.clone()
    step = -(-len(order) // STEPS)
    after[[step - 1, step]] = order[[step, step - 1]]  # across the end of the first step alone
    changed = (gains(after) != first).nonzero().flatten().tolist()
    assert changed == [1] and passed == [2]  # one photo of insertion, one of deletion


def test_a_way_is_a_ratio_of_means():
    reference, ceiling_ = np.array([0.2, 0.4, np.nan, 0.3]), np.array([0.6, 1.0, 0.5, 0.7])
    assert way(reference, reference, ceiling_) == "0.00 [0.00, 0.00]"
    assert way(ceiling_, reference, ceiling_) == "1.00 [1.00, 1.00]"
    assert way((reference + ceiling_) / 2, reference, ceiling_) == "0.50 [0.50, 0.50]"
    assert (
        way(np.full(4, np.nan), reference, ceiling_) == way(ceiling_, reference, reference) == "-"
    )


def test_the_study_goes_on_where_it_was_and_its_ceilings_are_no_worse(
    backbone, paths, tmp_path, monkeypatch, capsys  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(ceiling, "study_backbone", lambda *_: backbone)
    options = ["--folds", "2", "--per-fold", "1", "--steps", "5", "--tries", "3"]
    options += ["--output", str(tmp_path), "--max-forward-batch", "8"]

    def run(*rows):
        assert main(["ceiling", str(paths[0].parents[1]), *options, "--rows", *rows]) == 0
        return capsys.readouterr().out

    few = ["cam", "ours=gradcam", "rise:masks=4"]
    text = run(*few)
    assert "2 photos" in text and f"| {SEARCH} |" in text
    found = {}
    for line in (tmp_path / "values.csv").read_text().splitlines()[1:]:
        row, photo, *values = line.rsplit(",", 3)
        found.setdefault(photo, {})[row.strip('"')] = tuple(map(float, values))
    for rows in found.values():
        most = max(rows[label][0] for label in rows if label not in (SEARCH, ceiling.BEST_EACH))
        assert rows[ceiling.BEST_EACH][0] == most
        best = max(ins - out for ins, out in (rows[Row.parse(text).label] for text in few))
        assert rows[ceiling.BEST][0] - rows[ceiling.BEST][1] == pytest.approx(best, abs=1e-5)
        assert rows[SEARCH][0] - rows[SEARCH][1] >= best - 1e-5
    with monkeypatch.context() as patch:
        patch.setattr(ceiling, "measure", lambda *_, **__: pytest.fail("measured again"))
        assert run(*few) == text
    assert "| centre |" in run(*few, "centre")
    scored = json.loads((tmp_path / "split.json").read_text())["scored"]
    assert scored["count"] == 2
    assert main(["ceiling", "x", *options, "--rows", "gradcam"]) == 2
    assert "give cam and others" in capsys.readouterr().err
