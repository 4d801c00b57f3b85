"""Ladders of degraded maps, and which columns order them: a truth passes, what looks at no photo does not."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eval_fakes import FakeBackbone, Maps

from xattn.eval import Protocol, create_metric, evaluate
from xattn.eval.evaluation.results import ImageRecord, MethodResult, Results
from xattn.eval.metrics.base import Column
from xattn.eval.report.report_card import _agreement, _same_test, _Signed, report_card
from xattn.eval.sanity.ladders import (
    LADDERS,
    NULLS,
    RUNGS,
    SAME,
    Anchor,
    blend_ranks,
    card_rows,
    rung_name,
    shuffle_cells,
)

MAP = torch.rand(5, 7, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("t", RUNGS)
def test_every_rung_has_the_maps_own_values(t):
    other = torch.rand(3, 4, generator=torch.Generator().manual_seed(4))
    for made in (shuffle_cells(MAP, t, seed=1), blend_ranks(MAP, other, t)):
        assert torch.equal(made.flatten().sort().values, MAP.flatten().sort().values)
        assert torch.equal(made, MAP) == (t == 0)


def test_the_cells_that_exchange_are_nested_and_as_many_as_asked_for():
    moved = [
        set((shuffle_cells(MAP, t, 1) != MAP).flatten().nonzero()[:, 0].tolist()) for t in RUNGS
    ]
    for t, few, more in zip(RUNGS[1:], moved, moved[1:], strict=False):
        assert few <= more | few and len(more) <= round(t * 35) and len(more) >= round(t * 35) - 4
    order = [torch.rand(35, generator=torch.Generator().manual_seed(1)).argsort()]
    for t, places in zip(RUNGS, moved, strict=True):
        assert places <= set(order[0][: round(t * 35)].tolist())
    assert not torch.equal(shuffle_cells(MAP, 1.0, 1), shuffle_cells(MAP, 1.0, 2))


def test_the_last_rung_of_photo_has_the_order_of_the_other_map():
    other = torch.rand(5, 7, generator=torch.Generator().manual_seed(4))
    made = blend_ranks(MAP, other, 1.0)
    assert torch.equal(made.flatten().argsort(), other.flatten().argsort())
    resized = blend_ranks(MAP, other[:2, :3], 1.0)
    assert resized.shape == MAP.shape


class Cells(FakeBackbone):
    """z_k = sum_c w_kc . mean colour of cell c, 4 x 4 cells: contributions are known."""

    def logits(self, images):
        return ((self.means(images).flatten(1) - 0.5) @ self.weight.double().T).float()

    def means(self, images):
        return F.adaptive_avg_pool2d(images.double(), 4)

    def truth(self, images, targets):
        weight = self.weight[targets].view(-1, 3, 4, 4)
        return (weight * (self.means(images) - 0.5)).sum(1, keepdim=True).float()


@pytest.fixture(scope="module")
def network():
    made = Cells(gain=6.0)
    made.preprocessing.input_size = (28, 28)
    return made


@pytest.fixture(scope="module")
def photos():
    coarse = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    return F.interpolate(coarse, (28, 28), mode="nearest")


@pytest.fixture(scope="module")
def found(network, photos):
    classes = network.logits(photos[:8]).argmax(1).tolist()
    other = Cells(seed=5, gain=6.0)
    anchor = Anchor(
        "truth", Maps(network.truth), photos[:8], classes, lambda stage, x, t: other.truth(x, t)
    )
    noise = Maps(lambda x, t: (x.mean((1, 2, 3), keepdim=True) * 997 * MAP).frac())
    rows = card_rows([anchor], network, noise)
    metrics = [
        create_metric("squares", fill="black", side=0.3),
        create_metric("class-contrast", fill="black"),
        create_metric("network-contrast", fill="black"),
        create_metric("complexity"),
    ]
    return evaluate(
        network, rows.methods, photos, metrics=metrics, randomized=rows.randomized, progress=False,
        max_forward_batch=20, protocol=Protocol(invalid="chance", resize="nearest"), again_limit=None,
    )  # fmt: skip


def by_test(card, key):
    return {t.test: t for t in card.tests if t.metric == key}


def test_the_truths_columns_pass_and_a_metric_of_roughness_fails_the_photo_ladder(found):
    card = report_card(found, ["truth"])
    assert {"squares", "class-contrast"} <= set(card.admitted), card.lines()
    assert not {"Gini", "entropy"} & set(card.admitted)
    gini = by_test(card, "Gini")["ladder photo"]
    assert gini.passed is False
    squares = by_test(card, "squares")
    assert squares["ladder cells: truth"].value >= 0.9 and squares["ladder photo: truth"].lo > 0


def test_what_explains_nothing_is_not_above_chance_in_the_column_that_is_to_catch_it(found):
    tests = by_test(report_card(found, ["truth"]), "class-contrast")
    for null in ("centre", "edges", "colour", "all_but_one", "random"):
        assert tests[f"null {null}"].value == 0 and tests[f"null {null}"].passed
    assert tests["null second class"].value < 0 and tests["null second class"].passed
    assert set(NULLS) == {n.removeprefix("null ") for n in tests if n.startswith("null ")}


def test_a_changed_scale_or_zero_changes_no_squares_and_an_order_does(found):
    tests = by_test(report_card(found, ["truth"]), "squares")
    assert tests["invariance scale"].passed and tests["invariance shift"].passed
    assert tests["invariance order"].passed is None and tests["invariance order"].value > 0.01


def test_a_methods_maps_are_made_once_for_all_rungs(network, photos, monkeypatch):
    asked = []

    def truth(images, targets):
        asked.append(len(images))
        return network.truth(images, targets)

    classes = network.logits(photos[:2]).argmax(1)
    anchor = Anchor("truth", Maps(truth), photos[:2], classes.tolist())
    rows = card_rows([anchor], network, Maps(truth)).methods
    for _ in range(2):
        for t in RUNGS:
            for i in range(2):  # as metrics ask that explain again
                rows[rung_name("truth", "photo", t)].attribute(
                    photos[i : i + 1], classes[i : i + 1]
                )
    assert asked == [1] * 4, "of two photos, and of two that lend their maps"
    monkeypatch.setattr("xattn.eval.sanity.ladders.KEPT", 16)
    for i in (0, 1, 0):
        anchor.maps(photos[i : i + 1] / 2, classes[i : i + 1])
    assert asked == [1] * 7 and len(anchor._made) == 1


def test_rungs_fall_from_the_anchor_to_nothing(found):
    means = {
        name: float(np.nanmean(m.values[Column("squares")])) for name, m in found.methods.items()
    }
    for ladder in LADDERS:
        assert (
            means["truth"]
            > means[rung_name("truth", ladder, 0.6)]
            > means[rung_name("truth", ladder, 1.0)]
        )
        assert abs(means[rung_name("truth", ladder, 1.0)]) < 0.25


def made_up(curves, n=30, higher=True, spread=0.05, column="squares"):
    """Results of rungs whose means are ``curves`` by (anchor, ladder)."""
    rng, c = np.random.default_rng(0), Column(column)
    rows = {}
    for (anchor, ladder), curve in curves.items():
        for t, mean in zip(RUNGS, curve, strict=True):
            name = rung_name(anchor, ladder, t)
            rows.setdefault(name, mean + spread * rng.normal(size=n))
        for name in (*NULLS, *(f"{anchor} {kind}" for kind in SAME)):
            rows.setdefault(name, spread * rng.normal(size=n))
    methods = {k: MethodResult(1, False, np.ones(n, bool), {}, {c: v}) for k, v in rows.items()}
    images = [ImageRecord(f"{i}", 0, "ant", 0.5) for i in range(n)]
    return Results(Protocol(), images, methods, n_resamples=300)


FALLING, FLAT = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0), (0.3,) * 6


def card_of(anchors, **more):
    curves = {
        (a, ladder): curve for a, each in anchors.items() for ladder, curve in zip(LADDERS, each, strict=True)
    }  # fmt: skip
    return report_card(made_up(curves, **more), list(anchors))


def test_two_of_three_methods_are_enough_and_both_ladders_are_asked_for():
    good, bad = (FALLING, FALLING), (FLAT, FLAT)
    assert card_of({"a": good, "b": good, "c": bad}).admitted == ("squares",)
    assert card_of({"a": good, "b": bad, "c": bad}).admitted == ()
    assert card_of({"a": (FALLING, FLAT), "b": (FALLING, FLAT)}).admitted == ()


def test_a_column_in_which_lower_is_better_has_to_rise():
    rising = tuple(reversed(FALLING))
    assert card_of({"a": (rising, rising)}, column="deletion").admitted == ("deletion",)
    assert card_of({"a": (FALLING, FALLING)}, column="deletion").admitted == ()


def test_too_few_photos_admit_nothing_and_are_not_judged():
    card = card_of({"a": (FALLING, FALLING)}, n=7)
    assert card.admitted == () and by_test(card, "squares")["ladder cells"].passed is None
    assert "7 photos are too few; at least 8 are needed" in card.notes[0]


def test_halves_and_agreement_of_a_run():
    rng = np.random.default_rng(1)
    run = made_up({("a", "cells"): FALLING, ("a", "photo"): FALLING})
    table = report_card(made_up({("a", x): FALLING for x in LADDERS}), ["a"], run)
    tests = by_test(table, "squares")
    assert tests["halves"].passed and tests["halves"].value > 0.8
    for method in run.methods.values():
        method.values[Column("squares")] = rng.normal(size=30)
    worse = by_test(
        report_card(made_up({("a", x): FALLING for x in LADDERS}), ["a"], run), "squares"
    )
    assert worse["halves"].passed is False


@pytest.mark.parametrize("names", [("a", "b", "c"), ("c", "b", "a")])
def test_agreement_does_not_hang_on_the_order_of_methods_that_tie(names):
    """One column orders three methods; in another two of them tie; in the third all do, which says nothing."""
    values = {"a": (1.0, 1.0, 1.0), "b": (2.0, 1.0, 1.0), "c": (3.0, 2.0, 1.0)}
    run = of_columns({name: values[name] for name in names}, ("squares", "subsets", "ROAD"))
    (test,) = _agreement(run, ["squares", "subsets", "ROAD"])
    # Ranks 1 2 3 and 1.5 1.5 3: sums 2.5, 3.5, 6; S = 6.5; W = 12 S / (m^2 (n^3 - n) - m (2^3 - 2)).
    assert test.value == pytest.approx(12 * 6.5 / (4 * 24 - 2 * 6))


def test_a_value_that_a_change_takes_away_is_a_change():
    changed = np.full(10, 0.5)
    changed[3] = np.nan
    run = of_columns({"a": (0.5,), "a scale": (0.5,)}, ("squares",))
    table = _Signed(run, Column("squares"))
    assert _same_test(table, "a", "scale")[0].passed
    run.methods["a scale"].values[Column("squares")] = changed
    (test,) = _same_test(_Signed(run, Column("squares")), "a", "scale")
    assert test.value == 0 and test.passed is False


def of_columns(values, columns, n=10):
    """Results of methods that have the same value on each of ``n`` photos, by column."""
    methods = {
        name: MethodResult(
            2,
            False,
            np.ones(n, bool),
            {},
            {Column(c): np.full(n, v) for c, v in zip(columns, own, strict=True)},
        )
        for name, own in values.items()
    }
    images = [ImageRecord(f"{i}.jpg", 0, "ant", 0.5) for i in range(n)]
    return Results(Protocol(n=n, n_invalid=0), images, methods, n_resamples=100)
