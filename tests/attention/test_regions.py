"""Regions of patches, recruitment, and the bound of attention to regions."""

import math
from itertools import pairwise

import pytest
import torch

from xattn.attention.mechanisms.localist import (
    box_regions,
    check_regions,
    recruit,
    recruited_regions,
    superpixels,
)


def clusters(count, n, d, seed, away=7.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.zeros(count, d)
    centres[:, :2] = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.87]])[:count]
    which = torch.arange(n) % count
    return away * centres[which] + torch.randn(n, d, generator=generator), which


# ---------------------------------------------------------------------- regions


@pytest.mark.parametrize("grid, sides", [((4, 6), 2), ((5, 7), 3), ((9,), 4), ((2, 3, 5), 2)])
def test_boxes_are_as_equal_as_can_be(grid, sides):
    regions = box_regions(grid, sides)
    sizes = regions.bincount()
    assert len(regions) == math.prod(grid) and len(sizes) == sides ** len(grid)
    low = math.prod(n // sides for n in grid)
    assert low <= int(sizes.min()) and int(sizes.max()) <= math.prod(-(-n // sides) for n in grid)
    assert torch.equal(regions, regions.flip(0).neg() + len(sizes) - 1) or grid != (4, 6)


def test_superpixels_are_whole_patches_of_one_colour_and_never_empty():
    photo = torch.zeros(3, 64, 96)
    photo[0, :, 48:], photo[1, 32:] = 1.0, 0.5
    regions = superpixels(photo, (8, 12), 4)
    check_regions(regions)
    block = regions.unflatten(0, (8, 12))
    assert len(regions.unique()) == 4
    parts = [block[y : y + 4, x : x + 6].unique() for y in (0, 4) for x in (0, 6)]
    assert all(len(part) == 1 for part in parts)
    assert superpixels(torch.ones(3, 32, 32), (4, 4), 4).min() == 0


# ---------------------------------------------------------------------- recruitment


@pytest.mark.parametrize("n, d", [(60, 2), (196, 16)])
def test_three_clusters_give_three_regions_and_one_gives_one(n, d):
    for seed in range(10):
        x, which = clusters(3, n, d, seed)
        found = recruit(x, 1.0)
        assert len(found.anchors) == 3
        assert sum(int(found.regions[which == c].bincount().max()) for c in range(3)) >= 0.98 * n
        assert len(recruit(clusters(1, n, d, seed)[0], 1.0).anchors) == 1


def test_the_cost_falls_strictly_and_ends_in_time():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [9.0, 5.0, 1.0, 1.0]
    )
    found = recruit(x, 1.0)
    costs = found.costs
    assert len(costs) > 3
    assert all(after < before for before, after in pairwise(costs))
    price = 5 / 2 * math.log(200) + math.log(2)
    assert len(costs) - 1 <= costs[0] / price
    first = 0.5 * (x - x.mean(0)).double().square().sum() + 200 * 2 * math.log(2 * math.pi)
    assert costs[0] == pytest.approx(float(first))


def test_anchors_lie_where_the_clusters_do_at_any_scale():
    x, which = clusters(3, 90, 2, 0)
    for scale in (1e-3, 1.0, 1e4):
        found = recruit(scale * x, scale**2)
        means = torch.stack([x[which == c].mean(0) for c in range(3)]).double() * scale
        away = torch.cdist(found.anchors, means)
        assert (away.amin(0) < 0.2 * scale).all() and len(found.anchors) == 3


def test_keys_that_are_alike_are_one_region():
    assert (recruited_regions(torch.full((30, 8), 2.5), 0.7) == 0).all()
    assert (recruited_regions(torch.zeros(30, 8), 0.7) == 0).all()


@pytest.mark.parametrize("wide", [True, False])
def test_recruited_regions_read_principal_components(wide):
    x, which = clusters(3, 60, 80 if wide else 20, 1, away=12.0)
    regions = recruited_regions(x, 0.4)
    assert sum(int(regions[which == c].bincount().max()) for c in range(3)) == 60


@pytest.mark.parametrize(
    "points, variance, message",
    [
        (torch.zeros(0, 2), 1.0, "points: got shape"),
        (torch.full((3, 2), torch.nan), 1.0, "points: got shape"),
        (torch.zeros(3, 2), 0.0, "variance: got 0.0; give a positive"),
        (torch.zeros(3, 2), float("nan"), "variance: got nan"),
    ],
)
def test_recruitment_refuses_what_does_not_fit(points, variance, message):
    with pytest.raises(ValueError, match=message):
        recruit(points, variance)
