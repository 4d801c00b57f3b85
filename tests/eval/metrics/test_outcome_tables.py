"""The table of outcomes: its masks, its passes, and the metrics that read it, on networks whose answer is known."""

import math

import eval_fakes as fakes
import numpy as np
import pytest
import timm
import torch
from eval_fakes import FakeBackbone, Maps
from scipy.stats import spearmanr

from xattn import create_explainer, load_backbone
from xattn.eval import Protocol, create_metric, evaluate, measure
from xattn.eval.evaluation.plan import plan
from xattn.eval.metrics.base import Column, Sample
from xattn.eval.metrics.board.correlation import correlation_values
from xattn.eval.metrics.board.masks import EachCell, IndependentCells, Squares, Subsets, cell_sums
from xattn.eval.metrics.board.table import OutcomeTable, Replacement
from xattn.eval.metrics.infidelity import InfidelityMetric, infidelity_values
from xattn.eval.metrics.scorer import MaskedScorer

MEAN = (0.5, 0.4, 0.3)
SIZE = (35, 37)
LISTS = [
    Squares(11, 0.3),
    EachCell(5),
    EachCell(4, True),
    EachCell(3),
    Subsets(5, 8, 12),
    IndependentCells(6, 0.3, 9),
]


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_rows_of_one_correlation_do_not_touch_each_other():
    """A row is flat by its own scale, however large the others are."""
    sums = torch.tensor([[1.0, 2.0, 4.0], [1e12, 2e12, 4e12], [0.1, 0.1, 0.1], [3.0, 2.0, 1.0]])
    drops = torch.tensor([[2.0, 4.0, 8.0]] * 4).double()
    values = correlation_values(sums.double(), drops)
    assert values.isnan().tolist() == [False, False, True, False]
    alone = [correlation_values(sums[i : i + 1].double(), drops[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(values, torch.cat(alone), rtol=0, atol=1e-15, equal_nan=True)


class Additive:
    """z_0 = w . x in float64, z_1 = 0: black takes away exactly the contributions w x."""

    def __init__(self, size=SIZE, seed=4):
        self.weight = rand(3, *size, seed=seed).double() - 0.5

    def __call__(self, images):
        score = (images.double() * self.weight).sum((1, 2, 3))
        return torch.stack([score, torch.zeros_like(score)], 1)

    def truth(self, images):
        return (self.weight * images).sum(1, keepdim=True)


@pytest.mark.parametrize("masks", LISTS, ids=repr)
def test_sums_are_those_over_what_is_removed(masks):
    values = rand(*SIZE).double() - 0.4
    removed = masks.removed(SIZE, 3)
    assert removed.shape == (masks.count, *SIZE) and removed.dtype == torch.bool
    torch.testing.assert_close(masks.sums(values, 3), (removed * values).sum((1, 2)))
    assert torch.equal(removed, masks.removed(SIZE, 3))
    assert isinstance(masks, EachCell) or not torch.equal(removed, masks.removed(SIZE, 4))


def test_cells_have_borders_at_floor_and_cover_the_photo_once():
    removed = EachCell(3).removed((35, 37), 0).view(3, 3, 35, 37)
    assert bool((removed.sum((0, 1)) == 1).all())
    assert [int(removed[i, 0].any(1).sum()) for i in range(3)] == [11, 12, 12]
    assert float(cell_sums(torch.ones(7, 5), (2, 2))[0, 0]) == 3 * 2


def test_squares_and_subsets_remove_one_area_and_a_constant_adds_nothing():
    assert len(Squares(20).removed(SIZE, 1).sum((1, 2)).unique()) == 1
    grid = Subsets(7, 20, 30)
    assert bool((grid.chosen(5).sum(1) == 20).all())
    sums = grid.sums(torch.ones(28, 28), 5)
    assert len(sums.unique()) == 1


def test_squares_are_those_of_infidelity():
    image, masks = 0.1 + 0.8 * rand(3, *SIZE), Squares(6, 0.25)
    asked = InfidelityMetric(samples=6).measure(Sample(image, image[:1], image[:1], 0, 0.0, seed=9))
    black = torch.stack([r.image[0].clone() == 0 for r in asked])
    assert torch.equal(black, masks.removed(SIZE, 9))


# ---------------------------------------------------------------- answers


def table_of(network, image, seed=0, **options):
    return OutcomeTable(MaskedScorer(network, 8), image, seed, **options)


def test_rows_are_the_networks_own_answers_and_are_computed_once():
    network, image, masks = FakeBackbone(), rand(3, 18, 20), Squares(8, 0.4)
    table = table_of(network, image)
    drops = table.drops(masks, Replacement("mean", MEAN), 2)
    removed = masks.removed((18, 20), 0)[:, None]
    changed = torch.where(removed, torch.tensor(MEAN)[:, None, None], image)
    whole = network.logits(image[None].expand(4, -1, -1, -1))[:1]
    logits = torch.cat([whole, network.logits(changed)]).double()
    p = logits.softmax(1)[:, 2]
    odds = p.log() - (1 - p).log()
    torch.testing.assert_close(drops, odds[0] - odds[1:], rtol=1e-5, atol=1e-6)
    passes = table.scorer.scored
    table.drops(masks, Replacement("mean", MEAN), 4)
    table.sums_and_drops(masks, Replacement("mean", MEAN), image[0], 2)
    assert table.scorer.scored == passes == 9
    table.drops(masks, Replacement("black"), 2)
    assert table.scorer.scored == 17


def test_the_second_class_of_an_outcome_table_is_the_most_probable_other_one():
    table = table_of(FakeBackbone(), rand(3, 18, 20), clean=torch.tensor([1.0, 5.0, 3.0]))
    assert [table.second(target) for target in range(3)] == [1, 2, 1]
    alone = table_of(FakeBackbone(), rand(3, 18, 20), clean=torch.tensor([1.0]))
    assert alone.second(0) == 0  # there is no other


def test_of_many_classes_the_kept_ones_and_the_sum_of_the_others_give_the_same():
    weight = rand(2500, 6, seed=3).double() * 9

    class Many(FakeBackbone):
        def logits(self, images):
            return (images.double().mean((2, 3)).repeat(1, 2) @ weight.T).float()

    image, masks, black = rand(3, 18, 20), Squares(5, 0.4), Replacement("black")
    table = table_of(Many(), image, wanted=(7,))
    assert table._rows == {} and len(table._classes) in (256, 257)
    changed = torch.where(masks.removed((18, 20), 0)[:, None], 0, image)
    for k in (int(table.clean.argmax()), 7):
        odds = [
            z[:, k] - torch.cat([z[:, :k], z[:, k + 1 :]], 1).logsumexp(1)
            for z in (table.clean[None], Many().logits(changed).double())
        ]
        torch.testing.assert_close(table.drops(masks, black, k), odds[0] - odds[1])


def test_dropped_patches_are_left_out_and_dropping_none_changes_nothing():
    backbone = load_backbone(
        timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5),
        input_size=64,
    )
    image = rand(3, 64, 64)
    metric = create_metric("squares", mean=MEAN).for_network(backbone)
    assert metric.fill == "drop" and "mean" not in metric.options()
    assert create_metric("squares", mean=MEAN).for_network(FakeBackbone()).fill == "mean"
    table = table_of(backbone, image)
    nothing = table.drops(IndependentCells(4, 0.0, 3), Replacement("drop"), 1, "logit")
    torch.testing.assert_close(nothing, torch.zeros(3).double(), rtol=0, atol=1e-5)
    one = table.drops(EachCell(4), Replacement("drop"), 1, "logit")
    again = table_of(backbone, image).drops(EachCell(2), Replacement("drop"), 1, "logit")
    assert len(one) == 16 and len(again) == 4 and float(one.abs().min()) > 0
    sums, _ = table.sums_and_drops(EachCell(2), Replacement("drop"), image[0], 1)
    torch.testing.assert_close(sums, cell_sums(image[0], (2, 2)).flatten())
    with pytest.raises(ValueError, match="fill: drop works only for timm's ViTs"):
        create_metric("squares", fill="drop").for_network(FakeBackbone())


def test_default_cells_are_no_more_than_the_patches_that_are_dropped():
    backbone = load_backbone("test_vit", weights=None, input_size=96)  # 6 x 6 patches
    images = rand(2, 3, 96, 96)
    for name in ("subsets", "photo-gain"):
        assert create_metric(name, mean=MEAN).for_network(backbone).cells == 6
        assert create_metric(name, mean=MEAN).for_network(FakeBackbone()).cells == 14
        assert create_metric(name, fill="mean", mean=MEAN).for_network(backbone).cells == 14
    rows = {"random": create_explainer("random", backbone)}
    found = evaluate(backbone, rows, images, metrics=["subsets"], progress=False)
    assert np.isfinite(found.methods["random"].values[Column("subsets")]).all()
    given = create_metric("subsets", cells=14, mean=MEAN)
    message = "cells: got 14; the photo has 6 x 6 patches; give cells=6 or fill='mean'"
    with pytest.raises(ValueError, match=message):
        measure(given, backbone, images, rand(2, 1, 6, 6), 0)


# ---------------------------------------------------------------- limit cases

TABLES = {
    "squares": {"samples": 12},
    "subsets": {"cells": 7, "samples": 8, "kept": (0.3, 0.7)},
    "single-deletion": {"cells": (4, 7)},
    "sensitivity-n": {"cells": 7, "samples": 8, "kept": (0.98, 0.5)},
    "mufidelity": {"cells": 5, "samples": 20},
}
OF_ONE_AREA = sorted(set(TABLES) - {"mufidelity"})


@pytest.mark.parametrize("name", TABLES)
def test_contributions_of_an_additive_network_have_one_and_their_negative_minus_one(name):
    network, images = Additive(), rand(2, 3, *SIZE)
    metric = create_metric(name, fill="black", score="logit", **TABLES[name])
    for sign in (1, -1):
        maps = sign * network.truth(images)
        values = measure(metric, network, images, maps, 0, score="logit")
        torch.testing.assert_close(
            values[Column(name)], torch.full((2,), float(sign)).double(), rtol=1e-5, atol=1e-5
        )


def test_infidelity_cannot_tell_a_map_from_its_negative_and_squares_can():
    network, images = Additive(), rand(1, 3, *SIZE)
    truth = network.truth(images)
    found = [
        float(measure(InfidelityMetric(samples=12), network, images, m, 0, score="logit")[Column("infidelity")])
        for m in (truth, -truth)
    ]  # fmt: skip
    assert found[0] == pytest.approx(found[1], abs=1e-9)
    sums, drops = rand(1, 20).double() - 0.3, rand(1, 20, seed=1).double()
    cosine = torch.nn.functional.cosine_similarity(sums, drops)
    expected = drops.square().mean(1) * (1 - cosine**2)
    torch.testing.assert_close(infidelity_values(sums, drops), expected)


@pytest.mark.parametrize("cells", [3, 5, 7])
def test_cells_that_do_not_divide_the_photo(cells):
    network, images = Additive((35, 35)), rand(1, 3, 35, 35)
    metric = create_metric("single-deletion", fill="black", score="logit", cells=cells)
    found = measure(metric, network, images, network.truth(images), 0)
    assert float(found[Column("single-deletion")]) == pytest.approx(1)


@pytest.mark.parametrize("side", [32, 35])
def test_single_deletion_as_published_by_hand(side):
    network, image, raw = Additive((side, side)), rand(3, side, side), rand(1, side, side, seed=6)
    options = {"fill": "black", "score": "logit", "cells": 4, "published": True}
    metric = create_metric("single-deletion", **options)
    found = measure(metric, network, image[None], raw[None], 0)[Column("single-deletion")]
    sums, drops, step = [], [], side // 4
    for i in range(0, 4 * step, step):
        for j in range(0, 4 * step, step):
            changed = image.clone()
            changed[:, i : i + step, j : j + step] = 0
            sums.append(float(raw[0, i : i + step, j : j + step].sum()))
            drops.append(float((network(image[None]) - network(changed[None]))[0, 0]))
    assert float(found) == pytest.approx(spearmanr(sums, drops).statistic, abs=1e-9)


@pytest.mark.parametrize("size", [(28, 28), (30, 25)])
@pytest.mark.parametrize("name", OF_ONE_AREA)
def test_a_constant_on_top_changes_nothing(name, size):
    network, image = Additive(size), rand(3, *size)
    metric = create_metric(name, fill="black", **TABLES[name]).for_network(network)
    raw = rand(1, *size, seed=8).double()
    table = OutcomeTable(MaskedScorer(_Network(network), 8), image, 3)
    plain, lifted = (metric.agreement(table, m, 0) for m in (raw, raw + 10))
    assert plain == pytest.approx(lifted, abs=1e-10) and abs(plain) < 0.999
    assert metric.agreement(table, -raw, 0) == pytest.approx(-plain, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "cells", "side"),
    [("single-deletion", 4, 14), ("single-deletion", 7, 16), ("subsets", 14, 16)],
)
def test_cells_of_unequal_area_give_nothing_to_maps_that_know_nothing(name, cells, side):
    def total(images):
        red = images[:, 0].double().sum((1, 2))
        return torch.stack([red, torch.zeros_like(red)], 1)

    images, other = rand(80, 3, side, side), rand(80, 1, side, side, seed=1)
    metric = create_metric(name, fill="black", score="logit", cells=cells)
    for maps in (other, 1 + 1e-3 * other):  # independent of the truth, and next to constant
        found = measure(metric, total, images, maps, 0, score="logit")[Column(name)]
        assert abs(float(found.mean())) < 0.1
    found = measure(metric, total, images, images[:, :1], 0, score="logit")[Column(name)]
    torch.testing.assert_close(found, torch.ones(80).double(), rtol=0, atol=1e-5)


class _Network:
    def __init__(self, logits):
        self.logits = logits

    def probabilities(self, logits):
        return logits.double().softmax(1)


@pytest.mark.parametrize("name", TABLES)
def test_a_network_that_does_not_react_gives_no_value(name):
    def flat(images):
        return torch.zeros(len(images), 3)

    metric = create_metric(name, fill="black", **TABLES[name])
    values = measure(metric, flat, rand(1, 3, 35, 35), rand(1, 1, 5, 5), 0)
    assert math.isnan(float(values[Column(name)]))


# ---------------------------------------------------------------- in a run


def test_methods_share_the_passes_and_the_plan_counts_them_once():
    rows = {"bright": Maps(fakes.brightness), "noise": Maps(fakes.noise)}
    options = {"max_forward_batch": 8, "progress": False}
    metric = create_metric("squares", mean=MEAN, samples=16)
    one, two = (
        evaluate(FakeBackbone(), r, fakes.images(8), metrics=[metric], **options).cost
        for r in ({"bright": rows["bright"]}, rows)
    )
    assert one["images_scored"] == two["images_scored"] == 8 * 17
    found = plan(FakeBackbone(), rows, [metric], fakes.images(1)[0], 8)
    assert found.table_passes == 8 * 16 and found.passes == 8 * 17 + 16
    noisy = plan(
        FakeBackbone(),
        rows,
        [create_metric("monotonicity", patch=8)],
        image := rand(3, 16, 16, seed=1),
        8,
    )
    assert noisy.table_passes == 8 * 4 and not any(noisy.scoring.values()), "noise ignores the map"
    road = plan(FakeBackbone(), rows, [create_metric("road", levels=(0.2,))], image, 8)
    assert not road.table_passes and road.scoring == dict.fromkeys(rows, 2 * 8), "its images do not"


def test_invalid_maps_score_chance_where_the_protocol_says_so():
    rows = {"bright": Maps(fakes.brightness), "flat": fakes.Flat(backbone=FakeBackbone())}
    options = {"metrics": ["squares", "complexity"], "progress": False, "max_forward_batch": 4}
    left_out, by_chance = (
        evaluate(FakeBackbone(), rows, fakes.images(4), protocol=Protocol(invalid=way), **options)
        for way in ("excluded", "chance")
    )
    column = Column("squares")
    assert np.isnan(left_out.methods["flat"].values[column]).all()
    assert (by_chance.methods["flat"].values[column] == 0).all()
    assert np.isnan(by_chance.methods["flat"].values[Column("Gini")]).all(), "chance is not known"
    assert left_out.metric_id(column) != by_chance.metric_id(column)
    assert by_chance.mean("bright", "squares") == left_out.mean("bright", "squares") != 0
