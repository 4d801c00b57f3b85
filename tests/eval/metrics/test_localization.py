"""Pointing game, its energy form and IoU against their definitions and limit cases."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xattn.eval.annotations import Annotation
from xattn.eval.metrics import Column, create_metric, measure
from xattn.eval.metrics.localization import (
    THRESHOLDS,
    energy_pointing_values,
    iou_values,
    pointing_values,
    vea_values,
)

SEEDS = st.integers(0, 2**31)
VALUES = (pointing_values, energy_pointing_values, iou_values, vea_values)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def box(top, left, bottom, right, size=(9, 11)) -> torch.Tensor:
    mask = torch.zeros(1, 1, *size, dtype=torch.bool)
    mask[..., top:bottom, left:right] = True
    return mask


def peak(*places, size=(9, 11)) -> torch.Tensor:
    maps = torch.zeros(1, 1, *size)
    for y, x in places:
        maps[..., y, x] = 1
    return maps


# ---------------------------------------------------------------- pointing


@pytest.mark.parametrize(
    ("place", "tolerance", "hits"),
    [
        ((3, 4), 0, True),
        ((3, 7), 0, False),
        ((3, 7), 1.9, False),
        ((3, 7), 2, True),
        ((8, 9), 5, True),  # 3 down and 4 right of the corner (5, 5): exactly 5
        ((8, 9), 4.9, False),
        ((0, 0), 15, True),
    ],
)
def test_a_maximum_hits_within_the_euclidean_tolerance(place, tolerance, hits):
    got = pointing_values(peak(place), box(3, 4, 6, 6), tolerance)
    assert got.tolist() == [100.0 * hits]


@given(SEEDS, st.floats(0, 9), st.sampled_from([(1, 1), (1, 8), (7, 1), (6, 7)]))
@settings(max_examples=40)
def test_hits_are_those_of_the_distances_to_every_pixel_of_the_object(seed, tolerance, size):
    rng = np.random.default_rng(seed)
    mask = rng.random(size) < 0.15
    mask.flat[rng.integers(mask.size)] = True
    maps = torch.from_numpy(rng.random((1, 1, *size)))
    y, x = np.unravel_index(int(maps.argmax()), size)
    distance = min(math.hypot(y - v, x - u) for v, u in zip(*mask.nonzero(), strict=True))
    got = pointing_values(maps, torch.from_numpy(mask)[None, None], tolerance)
    assert got.item() == (100 if distance <= tolerance else 0)


def test_of_equal_maxima_the_share_that_hits_counts():
    inside, outside = (4, 4), [(0, 0), (8, 10), (0, 10)]
    assert pointing_values(peak(inside, *outside), box(3, 3, 6, 6), 1).tolist() == [25]
    assert pointing_values(torch.ones(1, 1, 9, 11), box(3, 3, 6, 6), 0).item() == pytest.approx(
        100 * 9 / 99
    )


# ---------------------------------------------------------------- energy


@given(SEEDS, st.floats(0.01, 1))
@settings(max_examples=20)
def test_the_energy_of_a_constant_map_is_the_share_of_the_area(seed, value):
    mask = draw(1, 1, 6, 7, seed=seed) < 0.3
    mask[..., 0, 0] = True
    got = energy_pointing_values(torch.full((1, 1, 6, 7), value), mask)
    assert got.item() == pytest.approx(mask.double().mean().item(), abs=1e-12)


def test_the_energy_of_the_object_itself_is_one_and_of_its_complement_zero():
    mask = box(2, 3, 7, 8)
    assert energy_pointing_values(mask.float(), mask).tolist() == [1]
    assert energy_pointing_values(1 - mask.float(), mask).tolist() == [0]


def test_the_energy_of_a_map_below_zero_is_refused():
    with pytest.raises(
        ValueError, match="maps: the smallest value is -1; give grey maps with values of at least 0"
    ):
        energy_pointing_values(-torch.ones(1, 1, 9, 11), box(0, 0, 2, 2))


# ---------------------------------------------------------------- IoU


@given(SEEDS, st.integers(1, 41))
@settings(max_examples=30)
def test_iou_takes_as_many_of_the_largest_pixels_as_the_object_has(seed, size):
    rng = np.random.default_rng(seed)
    ranks, mask = rng.permutation(42), np.zeros(42, dtype=bool)
    mask[rng.permutation(42)[:size]] = True
    both = int((mask & (ranks >= 42 - size)).sum())
    maps = torch.from_numpy(ranks).float().view(1, 1, 6, 7)
    got = iou_values(maps, torch.from_numpy(mask).view(1, 1, 6, 7))
    assert got.item() == pytest.approx(both / (2 * size - both), abs=1e-12)


def test_iou_of_ties_depends_on_no_order():
    maps, mask = draw(1, 1, 9, 11).mul(4).round(), box(2, 3, 7, 8)
    expected = iou_values(maps, mask).item()
    for dims in ((2,), (3,), (2, 3)):
        assert iou_values(maps.flip(dims), mask.flip(dims)).item() == pytest.approx(expected)
    area = 25 / 99  # each pixel of a constant map is kept to this part
    flat = iou_values(torch.ones(1, 1, 9, 11), mask)
    assert flat.item() == pytest.approx(area / (2 - area), abs=1e-12)


def test_iou_with_a_threshold_is_relative_to_the_maximum():
    maps = torch.zeros(1, 1, 9, 11)
    maps[..., 2:4, 3:8], maps[..., 4:7, 3:8], maps[..., 0, 0] = 0.8, 0.3, 0.5
    mask = box(2, 3, 7, 8)
    for threshold, both, kept in ((1.0, 10, 10), (0.6, 10, 11), (0.37, 25, 26), (0.01, 25, 26)):
        got = iou_values(maps, mask, threshold)
        assert got.item() == pytest.approx(both / (25 + kept - both), abs=1e-12), threshold
    assert iou_values(0 * maps, mask, 0.5).isnan().all()


@given(SEEDS)
@settings(max_examples=20)
def test_increasing_functions_of_a_map_have_its_pointing_and_iou(seed):
    maps, mask = draw(1, 1, 6, 7, seed=seed), draw(1, 1, 6, 7, seed=seed + 1) < 0.2
    mask[..., 3, 3] = True
    for function in (torch.exp, lambda m: m**3 - 4, lambda m: 9 * m):
        turned = function(maps.double())
        assert torch.equal(pointing_values(turned, mask, 1), pointing_values(maps, mask, 1))
        assert torch.equal(iou_values(turned, mask), iou_values(maps, mask))


# ---------------------------------------------------------------- all three


@pytest.mark.parametrize("values", VALUES)
def test_empty_masks_and_maps_with_nan_are_undefined(values):
    maps, masks = draw(3, 1, 6, 7), torch.ones(3, 1, 6, 7, dtype=torch.bool)
    masks[1], maps[2, 0, 2, 2] = False, math.nan
    assert values(maps, masks).isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("values", VALUES)
def test_masks_of_another_kind_are_refused(values):
    maps = draw(2, 1, 6, 7)
    with pytest.raises(ValueError, match=r"masks: got torch.float32 .*give bool \(2, 1, 6, 7\)"):
        values(maps, maps)
    with pytest.raises(ValueError, match="the shape of the maps"):
        values(maps, torch.ones(2, 1, 6, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="maps: got shape"):
        values(maps[:, 0], maps > 0)


def test_explanation_accuracy_is_the_mean_iou_over_thresholds():
    maps, masks = (
        draw(3, 1, 9, 11).double(),
        torch.cat([box(3, 4, 6, 9), box(0, 0, 2, 2), box(0, 0, 0, 0)]),
    )
    masks[1] &= False
    got = vea_values(maps, masks)
    ious = [
        float(((maps[0] > t) & masks[0]).sum() / ((maps[0] > t) | masks[0]).sum())
        for t in THRESHOLDS
    ]
    assert got[0].item() == pytest.approx(sum(ious) / 9) and got[1:].isnan().all()
    assert vea_values(masks[:1].double(), masks[:1]).item() == 1  # the object itself
    assert vea_values(maps[:1] ** 3, masks[:1]).item() != pytest.approx(
        got[0].item()
    )  # IoU would not tell


def test_the_probe_measures_the_grey_map_on_the_explained_class():
    maps, masks = draw(2, 1, 9, 11), torch.cat([box(3, 3, 6, 6), box(0, 0, 4, 9)])
    notes = [Annotation({2: masks[0], 1: masks[1]}), Annotation({1: masks[1]})]
    probe = create_metric("localization", tolerance=1)
    got = measure(
        probe, lambda x: x.mean((2, 3)), draw(2, 3, 9, 11), 3 * maps - 1, 2, annotations=notes
    )
    grey = (maps - maps.amin((2, 3), keepdim=True)) / (maps.amax((2, 3)) - maps.amin((2, 3)))[
        ..., None, None
    ]
    expected = {
        Column("pointing"): pointing_values(grey, masks, 1),
        Column("energy-pointing"): energy_pointing_values(grey, masks),
        Column("IoU"): iou_values(grey, masks),
        Column("VEA"): vea_values(grey, masks),
    }
    for column, values in expected.items():
        assert got[column][0].item() == pytest.approx(values[0].item(), abs=1e-6)
        assert got[column][1].isnan(), "the second image shows no object of class 2"
