"""Extremal perturbation and iGOS++: their equations, additive networks, areas, descent, options."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from xattn.backbone import Preprocessing, load_backbone
from xattn.explainers import create_explainer
from xattn.explainers.masking.extremal_perturbation import smooth_max
from xattn.explainers.masking.igos_pp import four
from xattn.explainers.masking.mask_search import blend_levels, blur_image

SIDE = 24
WHITE = torch.ones(1, 3, SIDE, SIDE)


class Linear(nn.Module):
    """Two classes whose logits, or probabilities, are linear in the pixels: b + sum w x, and less it."""

    def __init__(self, weight, probabilities=False, bias=0.0):
        super().__init__()
        self.weight = nn.Parameter(weight.double() / 3)
        self.probabilities, self.bias = probabilities, bias
        self.preprocessing = Preprocessing(tuple(weight.shape), (0.0,) * 3, (1.0,) * 3)
        self.seen = 0

    def forward_taps(self, x):
        self.seen += len(x)
        f = self.bias + (x * self.weight.to(x)).sum((1, 2, 3))
        logits = torch.stack([f, 1 - f], 1).log() if self.probabilities else torch.stack([f, -f], 1)
        return logits, [x[:, :1]]


def block(share):
    """(24, 24): 1 in the rows of the lower ``share``, else 0."""
    weight = torch.zeros(SIDE, SIDE)
    weight[round((1 - share) * SIDE) :] = 1
    return weight


class Small(nn.Module):
    """Five classes that are not linear in the pixels, and differ much between parts of a photo."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last = nn.Conv2d(3, 16, 5, stride=3), nn.Linear(16, 5)
        self.preprocessing = Preprocessing((32, 32), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))

    def forward_taps(self, x):
        maps = self.conv(x).relu()
        return 20 * self.last(maps.mean((2, 3))), [maps]


def tiny():
    return load_backbone(Small()).double()


def photo(side=32, count=1):
    small = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    return F.interpolate(small, (side, side), mode="bilinear").double()


def levels_of(explainer, image):
    with torch.no_grad():
        return explainer._levels(image[0])


# ---------------------------------------------------------------------- the image under a mask


def test_a_mask_shows_the_image_at_one_and_what_is_behind_it_at_zero():
    net, image = tiny(), photo()
    for fill, behind in (("black", 0 * image), ("mean", net.mean.expand_as(image))):
        levels = levels_of(create_explainer("igos_pp", net, fill=fill), image)
        m = torch.rand(3, 1, 32, 32, dtype=torch.float64)
        assert torch.allclose(blend_levels(levels, m), m * image + (1 - m) * behind, atol=1e-12)
    for name, count in (("igos_pp", 2), ("extremal_perturbation", 8)):
        levels = levels_of(create_explainer(name, net), image)
        assert len(levels) == count and torch.equal(levels[-1], image[0])
        assert torch.allclose(levels[0], blur_image(image[0], 20 / 224 * 32))
        for number, level in enumerate(levels):  # linear between levels, equal to one at each
            m = torch.full((1, 1, 32, 32), number / (count - 1), dtype=torch.float64)
            assert torch.allclose(blend_levels(levels, m)[0], level, atol=1e-12)
        assert (levels.std((1, 2, 3)).diff() > 0).all()  # less and less blurred


def test_a_blur_is_a_gaussian_whose_sum_is_one():
    point = torch.zeros(1, 61, 61, dtype=torch.float64)
    point[0, 30, 30] = 1
    found = blur_image(point, 4.0)[0]
    place = torch.arange(-8, 9, dtype=torch.float64)
    line = torch.exp(-place.square() / 32)
    line = line / line.sum()
    assert torch.allclose(found[22:39, 22:39], line[:, None] * line, atol=1e-12)
    assert float(found.sum()) == pytest.approx(1)


# ---------------------------------------------------------------------- extremal perturbation


def test_the_smooth_maximum_is_the_maximum_in_its_limit_and_the_mean_in_the_other():
    values = torch.rand(2, 9, 4, dtype=torch.float64)
    assert torch.allclose(smooth_max(values, 1e-5), values.amax(1), atol=1e-4)
    assert torch.allclose(smooth_max(values, 1e5), values.mean(1), atol=1e-4)


def test_a_mask_is_the_largest_of_the_kernels_at_its_cells():
    """At T near 0, by the definition max_v k(u - v) c(v), with what is outside of the image 0."""
    net = load_backbone(Linear(block(0.5)))
    explainer = create_explainer("extremal_perturbation", net, step=1, sigma=1.5, temperature=1e-5)
    cells = torch.rand(1, 1, 7, 9, dtype=torch.float64)
    found = explainer._mask(cells, (7, 9))[0, 0]
    y, x = (
        v.flatten().double()
        for v in torch.meshgrid(torch.arange(7), torch.arange(9), indexing="ij")
    )
    away = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs())
    square = (y[:, None] - y).square() + (x[:, None] - x).square()
    k = torch.exp(-square / (2 * 1.5**2)) * (away <= 5)  # cut at 3 sigma, rounded up
    expected = (k * cells.flatten()).amax(1).view(7, 9)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_mask_of_a_linear_network_keeps_the_pixels_of_its_weights(share):
    weight = block(share)
    net = load_backbone(Linear(40 * weight / weight.sum()))
    options = {"areas": [share], "steps": 400, "step": 1, "sigma": 0.5, "fill": "black"}
    explainer = create_explainer("extremal_perturbation", net, **options)
    found = explainer.attribute(WHITE, 0)[0, 0]
    assert found.shape == (SIDE, SIDE) and float(found.mean()) == pytest.approx(share, abs=0.02)
    inside = weight.bool()
    assert found[inside].mean() > 0.9 and found[~inside].mean() < 0.05


def test_each_mask_has_the_area_that_is_asked_for_and_the_map_is_their_mean():
    areas = (0.1, 0.3, 0.6)
    options = {"areas": areas, "steps": 300, "step": 2, "sigma": 1}
    net, image = tiny(), photo()
    explainer = create_explainer("extremal_perturbation", net, **options)
    masks = explainer._masks(levels_of(explainer, image), torch.tensor(2)).detach()
    assert torch.allclose(masks.mean((1, 2, 3)), torch.tensor(areas).double(), atol=0.03)
    assert 0 <= masks.min() and masks.max() <= 1
    found = explainer.attribute(image, 2)
    assert torch.allclose(found[0, 0], masks.mean(0)[0], atol=1e-6)


def test_of_masks_of_one_area_the_chosen_one_preserves_the_logit_best():
    net, image = tiny(), photo()
    options = {"areas": [0.3], "steps": 100, "step": 4, "sigma": 3, "penalty": 10}
    explainer = create_explainer("extremal_perturbation", net, **options)
    levels = levels_of(explainer, image)
    best = explainer._masks(levels, torch.tensor(1)).detach()
    others = torch.stack(
        [torch.roll(best[0], shift, (1, 2)) for shift in [(8, 0), (0, 8), (16, 16)]]
    )
    logits = [net.logits(blend_levels(levels, m))[:, 1].detach() for m in (best, others)]
    assert logits[0] > logits[1].max()


# ---------------------------------------------------------------------- iGOS++


def igos(net, **options):
    return create_explainer("igos_pp", net, **{"noise": 0.0, "fill": "black", **options})


def objective(net, image, masks, l1, tv, sigma, target):
    """The sum of iGOS++ by its definition, for Mx and My (h, w), where what is removed is black."""

    def f(mask):
        pixels = F.interpolate(mask[None, None], image.shape[2:], mode="bilinear")
        return float(net.logits(image * pixels).double().softmax(1)[0, target])

    x, y = masks
    both = x * y
    cells = len(both)
    brightness = F.adaptive_avg_pool2d(image.mean(1), cells)[0]
    total = f(x) - f(1 - y) + f(both) - f(1 - both) + l1 * float((1 - both).mean())
    for i in range(cells):
        for j in range(cells):
            for k, m in ((i + 1, j), (i, j + 1)):
                if k < cells and m < cells:
                    change = float(brightness[i, j] - brightness[k, m]) / sigma
                    total += (
                        tv * math.exp(-(change**2)) * float(both[i, j] - both[k, m]) ** 2 / cells**2
                    )
    return total


def test_the_map_is_what_the_product_of_deletion_and_insertion_removes():
    net, image = tiny(), photo()
    explainer = igos(net, steps=3, path=4, cells=6)
    masks = explainer._masks(levels_of(explainer, image), torch.tensor(0))
    assert masks.shape == (2, 1, 6, 6) and not torch.equal(masks[0], masks[1])
    assert torch.allclose(explainer.attribute(image, 0)[0, 0], 1 - masks[0, 0] * masks[1, 0])
    assert 0 <= masks.min() and masks.max() <= 1


def test_four_masks_are_those_of_the_definition():
    masks = torch.rand(2, 1, 4, 4)
    x, y = masks
    plain = four(masks, (4, 4))
    assert torch.allclose(plain, torch.stack([x, 1 - y, x * y, 1 - x * y]))
    path = four(masks, (4, 4), torch.tensor([0.25, 1.0]))
    assert torch.allclose(path[4:], plain)
    assert torch.allclose(path[:4], torch.stack([x / 4, 1 - y / 4, x * y / 4, 1 - x * y / 4]))


def test_steps_make_the_sum_better():
    net, image = tiny(), photo()
    settings = {"l1": 0.5, "tv": 3.0, "sigma": 0.2}
    before = objective(net, image, torch.ones(2, 6, 6).double(), **settings, target=0)
    explainer = igos(net, steps=5, path=4, cells=6, **settings)
    masks = explainer._masks(levels_of(explainer, image), torch.tensor(0))[:, 0]
    assert objective(net, image, masks, **settings, target=0) < before - 1e-3


def test_integrated_gradients_lead_across_a_plateau():
    """The probability hardly changes until half of the block's pixels are black."""
    weight = block(0.5)
    net = load_backbone(Linear(40 * weight / weight.sum(), bias=-20.0)).double()
    explainer = igos(net, cells=SIDE, steps=5, path=10)
    found = explainer.attribute(WHITE.double(), 0)[0, 0]
    assert found[weight.bool()].mean() > found[~weight.bool()].mean() + 0.1


def test_additive_probabilities_lose_the_pixels_whose_weight_is_above_the_price_of_their_area():
    """A cell pays where 3 w > l1 / N: it is removed by the first, the third and the fourth term."""
    weight = torch.full((8, 8), 0.2 / 64)
    weight[2:5, 3:6] = 0.6 / 64
    net = load_backbone(Linear(weight, probabilities=True, bias=0.05)).double()
    image = torch.ones(1, 3, 8, 8).double()
    explainer = igos(net, cells=8, tv=0, l1=1.0, steps=40, path=2)
    assert torch.allclose(
        explainer.attribute(image, 0)[0, 0], (weight > 1 / 3 / 64).double(), atol=1e-3
    )


def test_variation_across_an_edge_of_the_photo_costs_nothing_and_elsewhere_its_square():
    net = load_backbone(Linear(block(0.5)))
    explainer = igos(net, cells=4, l1=0.0, tv=8.0, sigma=0.05)
    masks = torch.ones(2, 1, 4, 4)
    masks[0, 0, :, :2] = 0
    masks[1] = 0.5
    flat, edge = torch.full((1, 4, 4), 0.5), torch.zeros(1, 4, 4)
    edge[..., 2:] = 1
    assert float(explainer._price(masks, flat)) == pytest.approx(8 * 4 * 0.25 / 16)
    assert float(explainer._price(masks, edge)) == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------- both


def test_passes_are_at_most_those_that_are_announced():
    net = load_backbone(Linear(block(0.5) / 400, probabilities=True, bias=0.1))
    for name, options in (
        ("extremal_perturbation", {"steps": 3, "areas": [0.1, 0.5]}),
        ("igos_pp", {"steps": 3, "path": 5, "cells": 6}),
    ):
        explainer = create_explainer(name, net, max_forward_batch=3, **options)
        net.model.seen = 0
        explainer.attribute(WHITE / 2, 0)
        assert 0 < net.model.seen <= explainer.forwards
    assert create_explainer("extremal_perturbation", net).forwards == 4000
    assert create_explainer("igos_pp", net).forwards == 1624
    for name in ("extremal_perturbation", "igos_pp"):
        said = type(create_explainer(name, net)).__doc__.splitlines()[0]
        assert f"{create_explainer(name, net).forwards:,} passes" in said


def test_noise_depends_on_the_seed_alone():
    net, images = tiny(), photo(count=2)
    options = {"steps": 2, "path": 3, "cells": 5, "l1": 0.1}
    first = create_explainer("igos_pp", net, seed=1, **options)
    maps = first.attribute(images, 0)
    assert torch.equal(first.attribute(images.flip(0), 0).flip(0), maps)
    assert not torch.equal(
        create_explainer("igos_pp", net, seed=2, **options).attribute(images, 0), maps
    )


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("extremal_perturbation", {"areas": []}, r"areas: got \[\]; give a list of shares"),
        ("extremal_perturbation", {"areas": [0.5, 1.0]}, "areas: got"),
        ("extremal_perturbation", {"areas": 0.5}, "areas: got 0.5"),
        ("extremal_perturbation", {"steps": 0}, "steps: got 0; give an int of at least 1"),
        ("extremal_perturbation", {"temperature": 0.0}, "temperature: got 0.0"),
        ("extremal_perturbation", {"fill": "white"}, "fill: got 'white'; give 'blur', 'black' or 'mean'"),
        ("igos_pp", {"cells": 0}, "cells: got 0"),
        ("igos_pp", {"tv": -1.0}, "tv: got -1.0"),
        ("igos_pp", {"noise": float("nan")}, "noise: got nan"),
        ("igos_pp", {"areas": [0.1]}, "igos_pp does not take that option"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_explainer(name, load_backbone(Linear(block(0.5))), **options)
