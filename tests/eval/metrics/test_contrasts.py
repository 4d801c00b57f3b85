"""Contrasts are exactly 0 for maps that ignore the photo, the class or the network; mosaics; blind halves."""

import warnings

import eval_fakes as fakes
import numpy as np
import pytest
import torch
from eval_fakes import FakeBackbone, Maps

import xattn
from xattn import load_backbone
from xattn.backbone.halves import HALVES, half_blind, visible_half
from xattn.eval import create_metric, evaluate, measure
from xattn.eval.metrics.base import Column
from xattn.eval.metrics.board.blind import leak_values
from xattn.eval.metrics.board.cohort import mosaic_of
from xattn.eval.metrics.board.gridpg import gridpg_values, positive_shares
from xattn.eval.sanity import Cascade

CASES = {
    "photo-gain": {"cells": 4, "patch": 8, "fill": "black"},
    "class-contrast": {"fill": "black"},
    "network-contrast": {"fill": "black"},
    "class-contrast-mosaic": {"fill": "black", "confidence": 0.0},
    "gridpg": {"confidence": 0.0},
}


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class Patches(FakeBackbone):
    """Five classes, each with weights of its own on 4 x 4 means; any size."""

    num_classes = 5

    def logits(self, images):
        self.shapes.append(tuple(images.shape))
        means = torch.nn.functional.adaptive_avg_pool2d(images.double(), 4).flatten(1)
        return ((means - 0.5) @ self.weight.double().T).float()

    def truth(self, images, targets):
        """What 4 x 4 cells add to the logit of the target beside black."""
        means = torch.nn.functional.adaptive_avg_pool2d(images, 4)
        weight = self.weight[targets].view(-1, 3, 4, 4)
        return (weight * means).sum(1, keepdim=True)


NETWORK = Patches()


def values(rows, names, n=8, randomized=None, network=NETWORK):
    metrics = [create_metric(name, **CASES[name]) for name in names]
    found = evaluate(
        network, rows, fakes.images(n), metrics=metrics, progress=False, max_forward_batch=8,
        randomized=randomized or {},
    )  # fmt: skip
    return {
        name: {row: found.methods[row].values[Column(name)] for row in rows} for name in names
    }, found


def test_maps_that_ignore_photo_class_or_network_have_exactly_nothing():
    rows = {"centre": Maps(fakes.centre), "bright": Maps(fakes.brightness)}
    same = {"centre": lambda s, x, t: fakes.centre(x, t), "bright": lambda s, x, t: fakes.brightness(x, t)}  # fmt: skip
    found, results = values(rows, CASES, randomized=same)
    assert np.isfinite(found["photo-gain"]["centre"]).sum() == 8
    assert (found["photo-gain"]["centre"] == 0).all()
    assert (found["photo-gain"]["bright"] != 0).all()
    for row in rows:
        assert (found["class-contrast"][row] == 0).all()
        assert (found["network-contrast"][row] == 0).all()
        mosaics = found["class-contrast-mosaic"][row]
        assert 0 < np.isfinite(mosaics).sum() < 8 and np.nansum(np.abs(mosaics)) == 0
        shares = found["gridpg"][row]
        np.testing.assert_allclose(shares[np.isfinite(shares)][found_positive(row)], 0.25)
    column = Column("gridpg")
    assert results.methods["bright"].measured[column].sum() == np.isfinite(mosaics).sum()


def found_positive(row):
    return slice(None) if row == "bright" else slice(0, 0)  # the centre row has no positive part


def test_the_truth_has_a_contrast_and_exchanged_classes_its_negative():
    def swapped(images, targets):
        second = NETWORK.logits(images).scatter(1, targets[:, None], -99.0).argmax(1)
        first = NETWORK.logits(images).argmax(1)
        return NETWORK.truth(images, torch.where(targets == first, second, first))

    rows = {"truth": Maps(NETWORK.truth), "swapped": Maps(swapped)}
    found, _ = values(rows, ["class-contrast"])
    truth, other = found["class-contrast"].values()
    np.testing.assert_allclose(other, -truth, rtol=0, atol=1e-12)
    assert truth.mean() > 0.3


def test_a_network_of_other_weights_is_told_apart():
    other = Patches(seed=9)
    rows = {"truth": Maps(NETWORK.truth)}
    found, _ = values(
        rows, ["network-contrast"], randomized={"truth": lambda s, x, t: other.truth(x, t)}
    )
    assert found["network-contrast"]["truth"].mean() > 0.3
    none, results = values(rows, ["network-contrast"])
    assert np.isnan(none["network-contrast"]["truth"]).all()
    assert not results.methods["truth"].measured[Column("network-contrast")].any()


def test_a_map_that_cannot_be_made_for_the_second_class_earns_nothing_for_it():
    predicted = NETWORK.logits(fakes.images(8)).argmax(1)

    def own_only(images, targets):
        maps = NETWORK.truth(images, targets)
        kept = NETWORK.logits(images).argmax(1) == targets
        return torch.where(kept[:, None, None, None], maps, torch.nan)

    found, _ = values({"truth": Maps(NETWORK.truth), "own": Maps(own_only)}, ["class-contrast"])
    rows = found["class-contrast"]
    assert len(predicted) == 8 and np.isfinite(rows["own"]).all() and (rows["own"] != rows["truth"]).all()  # fmt: skip


def test_a_resumed_run_has_the_values_of_a_whole_one(tmp_path):
    rows = {"truth": Maps(NETWORK.truth), "bright": Maps(fakes.brightness)}
    metrics = [create_metric(name, **CASES[name]) for name in ("photo-gain", "class-contrast")]
    options = {"metrics": metrics, "progress": False, "max_forward_batch": 8}
    state = tmp_path / "state.sqlite"
    evaluate(NETWORK, {"bright": rows["bright"]}, fakes.images(8), state=state, **options)
    joined = evaluate(NETWORK, rows, fakes.images(8), state=state, **options)
    whole = evaluate(NETWORK, rows, fakes.images(8), **options)
    for row in rows:
        for column in whole.columns:
            a, b = (r.methods[row].values[column] for r in (joined, whole))
            assert np.array_equal(a, b), (row, column)


# ---------------------------------------------------------------- mosaics


def test_shares_are_of_the_positive_part_and_rows_come_first():
    maps = torch.zeros(1, 1, 4, 6)
    maps[0, 0, 0, 5], maps[0, 0, 3, 0], maps[0, 0, 3, 5] = 3, 1, -7
    torch.testing.assert_close(
        positive_shares(maps, 2), torch.tensor([[0.0, 0.75, 0.25, 0.0]]).double()
    )
    assert not positive_shares(-maps.abs(), 2).any()
    own = torch.zeros(1, 9, 1, 9, 9)
    for i in range(9):
        own[0, i, 0, i // 3 * 3, i % 3 * 3] = 1
    assert float(gridpg_values(own)) == 1
    assert float(gridpg_values(own.flip(1))) == pytest.approx(1 / 9)
    blind = rand(2, 1, 1, 12, 12).expand(-1, 4, -1, -1, -1)
    torch.testing.assert_close(gridpg_values(blind), torch.full((2,), 0.25).double())
    with pytest.raises(ValueError, match="maps: got"):
        gridpg_values(torch.ones(1, 5, 1, 6, 6))


def test_mosaics_lie_row_by_row_and_may_keep_the_size_of_a_photo():
    photos = rand(4, 3, 7, 9)
    whole = mosaic_of(photos, 2, halved=False)
    assert whole.shape == (3, 14, 18)
    assert torch.equal(whole[:, :7, 9:], photos[1]) and torch.equal(whole[:, 7:, :9], photos[2])
    assert mosaic_of(photos, 2, halved=True).shape == (3, 7, 9)


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("photo-gain", "2 photos of different predicted classes"),
        (
            "gridpg",
            "4 photos of different explained classes, each with a probability of at least 0",
        ),
        ("class-contrast-mosaic", "4 photos of different explained classes"),
    ],
)
def test_photos_that_have_none_to_compare_with_are_told_what_a_chunk_needs(name, needs):
    message = f"{name}: no photo has a value; .* here 8\\) contains {needs}"
    rows = {"truth": Maps(NETWORK.truth)}
    with pytest.warns(UserWarning, match=message):
        values(rows, [name], n=1)
    images, metric = fakes.images(8), create_metric(name, **CASES[name])
    targets, again = NETWORK.logits(images).argmax(1), {"explain": NETWORK.truth}
    maps = NETWORK.truth(images, targets)
    with pytest.warns(UserWarning, match=message):
        measure(metric, NETWORK, images[:1], maps[:1], targets[:1], **again)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        values(rows, [name])
        measure(metric, NETWORK, images, maps, targets, **again)


# ---------------------------------------------------------------- blind halves


def test_halves_and_what_leaks():
    assert [int(visible_half(half, (5, 7)).sum()) for half in HALVES] == [14, 15, 21, 20]
    maps = torch.ones(1, 1, 4, 4)
    assert float(leak_values(maps, ~visible_half("top", (4, 4)))) == 0.5
    assert (
        float(leak_values(-maps * visible_half("left", (4, 4)), ~visible_half("left", (4, 4)))) == 0
    )


def test_gradients_do_not_leak_and_the_centre_row_does():
    backbone = load_backbone("test_resnet", weights=None, input_size=64, num_classes=5)
    image = rand(1, 3, 64, 64)
    twin = half_blind(backbone, "left")
    changed = torch.where(visible_half("left", (64, 64)), image, rand(1, 3, 64, 64, seed=2))
    assert torch.equal(twin.logits(image), twin.logits(changed))
    assert not torch.equal(twin.logits(image), backbone.logits(image))
    assert next(twin.parameters()) is next(backbone.parameters())
    cascade = Cascade(backbone, max_forward_batch=4)
    names = ("saliency", "centre")
    rows = {name: xattn.create_explainer(name, backbone) for name in names}
    found = evaluate(
        backbone, rows, image, metrics=["blind"], progress=False, max_forward_batch=4,
        randomized={name: cascade.method(name) for name in names},
    )  # fmt: skip
    assert found.mean("saliency", "blind") == 0
    assert found.mean("centre", "blind") == pytest.approx(0.5, abs=1e-6)
