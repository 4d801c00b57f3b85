"""Maps that explain nothing are at chance in the column that is to catch them, on networks whose answer is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eval_fakes import FakeBackbone, Flat, Maps

from xattn.eval import Protocol, create_metric, evaluate
from xattn.eval.metrics.base import Column
from xattn.eval.sanity.cheats import CHEATS, second_class_map

GROUPS = {
    "squares": {"side": 0.3},
    "subsets": {"cells": 4},
    "photo-gain": {"cells": 4, "patch": 7},
    "class-contrast": {},
    "class-contrast-mosaic": {"confidence": 0.0},
    "network-contrast": {},
    "gridpg": {"confidence": 0.0},
}


class Patchwork(FakeBackbone):
    """z_k = sum_c w_kc . mean colour of cell c, 4 x 4 cells and five classes: contributions are known."""

    def logits(self, images):
        means = F.adaptive_avg_pool2d(images.double(), 4).flatten(1)
        return ((means - 0.5) @ self.weight.double().T).float()

    def truth(self, images, targets):
        weight = self.weight[targets].view(-1, 3, 4, 4)
        return (weight * F.adaptive_avg_pool2d(images, 4)).sum(1, keepdim=True)


@pytest.fixture(scope="module")
def found():
    network, other = Patchwork(gain=9.0), Patchwork(seed=5, gain=9.0)
    coarse = torch.rand(48, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    images = F.interpolate(coarse, (28, 28), mode="nearest")
    methods = {
        "truth": network.truth,
        "negative": lambda x, t: -network.truth(x, t),
        "second": second_class_map(network.truth, network.logits),
        **CHEATS,
    }
    rows = {name: Maps(method) for name, method in methods.items()}
    rows["flat"] = Flat(backbone=network)
    randomized = {name: lambda s, x, t, m=m: m(x, t) for name, m in methods.items()}
    randomized["flat"] = lambda s, x, t: x.new_ones(len(x), 1, 3, 3)
    for name in ("truth", "negative", "second"):
        randomized[name] = lambda s, x, t: other.truth(x, t)
    metrics = [create_metric(name, fill="black", **o) if name != "gridpg" else create_metric(name, **o)
               for name, o in GROUPS.items()]  # fmt: skip
    network.preprocessing.input_size = (28, 28)
    return evaluate(
        network, rows, images, metrics=metrics, randomized=randomized, progress=False,
        max_forward_batch=16, protocol=Protocol(invalid="chance"), again_limit=None,
    )  # fmt: skip


def column(found, row, name):
    values = found.methods[row].values[Column(name)]
    return values[~np.isnan(values)]


@pytest.mark.parametrize("row", CHEATS)
@pytest.mark.parametrize("name", ["class-contrast", "network-contrast", "class-contrast-mosaic"])
def test_what_ignores_the_class_and_the_network_has_exactly_nothing(found, row, name):
    values = column(found, row, name)
    assert len(values) >= 8 and (values == 0).all()


@pytest.mark.parametrize("row", ["centre", "all_but_one"])
def test_what_ignores_the_photo_has_exactly_nothing(found, row):
    assert (column(found, row, "photo-gain") == 0).all()


@pytest.mark.parametrize("row", CHEATS)
def test_what_ignores_the_class_has_one_of_four_cells(found, row):
    np.testing.assert_allclose(column(found, row, "gridpg"), 0.25, atol=1e-6)


def test_a_flat_map_scores_chance_and_does_not_abstain(found):
    for name in GROUPS:
        values, chance = column(found, "flat", name), 0.25 if name == "gridpg" else 0
        assert len(values) == len(column(found, "truth", name)) and (values == chance).all(), name


@pytest.mark.parametrize("name", [n for n in GROUPS if n != "gridpg"])  # weights belong to places
def test_the_truth_beats_every_cheat_and_its_negative_is_last_where_signs_count(found, name):
    means = {row: column(found, row, name).mean() for row in found.methods}
    assert max(means, key=means.get) == "truth", means
    assert min(means, key=means.get) in ("negative", "second") and means["truth"] > 0.2, means
    assert means["second"] < means["truth"] - 0.05


def test_the_map_of_another_class_has_a_negative_contrast(found):
    assert column(found, "second", "class-contrast").mean() < -0.2
