"""RISE, occlusion, LIME and KernelSHAP: definitions, oracles, fixed micro-batches, randomness."""

import random
import warnings
from itertools import combinations
from math import factorial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from xattn.backbone import Preprocessing, load_backbone
from xattn.explainers import create_explainer
from xattn.explainers.masking.kernel_shap import KernelShap
from xattn.explainers.masking.lime import Lime
from xattn.explainers.masking.masked_passes import superpixels
from xattn.explainers.masking.occlusion import Occlusion
from xattn.explainers.masking.rise import Rise

CLASSES = 4
SIZE = (30, 41)
# Quick options; the numbers of passes are no multiples of the micro-batches.
OPTIONS = {
    "rise": {"masks": 23, "cells": 3},
    "occlusion": {"size": 9, "stride": 7},
    "lime": {"samples": 19, "n_segments": 6},
    "kernel_shap": {"samples": 32, "n_segments": 9},
}
NAMES = list(OPTIONS)
RANDOM = ["rise", "lime", "kernel_shap"]


class Tiny(nn.Module):
    """A nonlinear classifier that notes how many images each pass holds."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, stride=3)
        self.norm = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, CLASSES)
        self.preprocessing = Preprocessing(SIZE, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
        self.seen, self.limit, self.fails = [], None, False

    def forward_taps(self, x):
        self.seen.append(len(x))
        if self.fails and len(self.seen) > 2:
            raise RuntimeError("interrupted")
        if self.limit is not None and len(x) > self.limit:
            raise torch.OutOfMemoryError("out of memory: a pretended limit")
        maps = self.norm(self.conv(x)).relu()
        return 3 * self.classifier(maps.square().mean((2, 3))), [maps]


class Additive(nn.Module):
    """Probabilities that are linear in the pixels: p_k = b_k + sum w_k x, and they sum to 1."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        weight = torch.rand(CLASSES - 1, 3, *SIZE, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(0.8 * weight / weight.sum())
        self.preprocessing = Preprocessing(SIZE, (0.0,) * 3, (1.0,) * 3)

    def forward_taps(self, x):
        p = 0.05 + torch.einsum("bchw,kchw->bk", x, self.weight.to(x))
        logits = torch.cat([p, 1 - p.sum(1, keepdim=True)], 1).log()
        return logits, [x[:, :1]]


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return load_backbone(Tiny())


@pytest.fixture(scope="module")
def additive():
    return load_backbone(Additive()).double()


def smooth(count, seed=1):
    """Images (count, 3, 30, 41) of a few colour blobs: SLIC merges pure noise into one segment."""
    small = torch.rand(count, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(small, SIZE, mode="bilinear")


IMAGES = smooth(3)
TARGET = torch.tensor([1, 0, 3])


def make(name, backbone, **options):
    return create_explainer(name, backbone, **{"max_forward_batch": 8, **OPTIONS[name], **options})


# ---------------------------------------------------------------------- contracts of all four


@pytest.mark.parametrize("fill", ["black", "mean"])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_a_loop_and_any_order_to_the_bit(backbone, name, fill):
    explainer = make(name, backbone, fill=fill)
    maps = explainer.attribute(IMAGES, TARGET)
    assert maps.shape == (3, 1, *SIZE) and maps.dtype == torch.float32 and not maps.requires_grad
    assert maps.isfinite().all() and all(m.unique().numel() > 2 for m in maps)
    for i in range(3):
        assert torch.equal(explainer.attribute(IMAGES[i : i + 1], int(TARGET[i])), maps[i : i + 1])
    order = torch.tensor([2, 0, 1])
    assert torch.equal(explainer.attribute(IMAGES[order], TARGET[order]), maps[order])
    other = make(name, backbone, fill={"black": "mean", "mean": "black"}[fill])
    assert not torch.allclose(other.attribute(IMAGES, TARGET), maps, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_maps_depend_on_the_seed_and_never_on_the_global_generators(backbone, name):
    first = make(name, backbone, seed=4).attribute(IMAGES, TARGET)
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    assert torch.equal(make(name, backbone, seed=4).attribute(IMAGES, TARGET), first)
    other = make(name, backbone, seed=5).attribute(IMAGES, TARGET)
    assert torch.equal(other, first) == (name not in RANDOM)


@pytest.mark.parametrize("limit", [1, 5, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_passes_hold_at_most_a_micro_batch_and_have_one_shape(backbone, name, limit):
    explainer = make(name, backbone, max_forward_batch=limit)
    backbone.model.seen = seen = []
    explainer.attribute(IMAGES[:1], 0)
    assert len(set(seen)) == 1 and seen[0] <= limit
    assert explainer.forwards <= sum(seen) < explainer.forwards + len(seen)
    assert len(seen) == -(-explainer.forwards // limit)
    assert explainer.perturbs


@pytest.mark.parametrize("name", NAMES)
def test_several_classes_share_their_passes(backbone, name):
    explainer = make(name, backbone)
    backbone.model.seen = seen = []
    explainer.attribute(IMAGES, TARGET)
    alone = sum(seen)
    seen.clear()
    logits, classes, maps = explainer.attribute_classes(IMAGES, lambda z: z.topk(3).indices)
    assert sum(seen) == alone + 3  # and a clean pass, whose logits choose the classes
    assert torch.equal(classes, logits.topk(3).indices) and maps.shape == (3, 3, *SIZE)
    for j in range(3):
        single = explainer.attribute(IMAGES, classes[:, j])[:, 0]
        assert torch.allclose(maps[:, j], single, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match=r"choose: got shape \(3,\)"):
        explainer.attribute_classes(IMAGES, lambda z: z.argmax(1))


def test_out_of_memory_halves_the_micro_batch_once():
    torch.manual_seed(0)
    backbone = load_backbone(Tiny())
    expected = make("rise", backbone).attribute(IMAGES, TARGET)
    backbone.model.limit = 5
    explainer = make("rise", backbone)
    with pytest.warns(RuntimeWarning, match="out of memory with [678] images"):
        found = explainer.attribute(IMAGES[:1], TARGET[:1])
    assert explainer.max_forward_batch in (3, 4)
    assert torch.allclose(found, expected[:1], atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = explainer.attribute(IMAGES, TARGET)
    assert torch.allclose(found, expected, atol=1e-5)
    backbone.model.limit = 0
    with pytest.warns(RuntimeWarning), pytest.raises(MemoryError, match="max_forward_batch"):
        explainer.attribute(IMAGES[:1], TARGET[:1])


@pytest.mark.parametrize("name", NAMES)
def test_images_of_another_size_and_constant_images_work(backbone, name):
    images = smooth(1)[:, :, :17, :23]
    assert make(name, backbone).attribute(images, 0).shape == (1, 1, 17, 23)
    for image in (torch.zeros(1, 3, *SIZE), torch.full((1, 3, *SIZE), 0.7)):
        assert make(name, backbone).attribute(image, 0).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_nan_scores_give_nan_maps_and_no_crash(name):
    torch.manual_seed(0)
    backbone = load_backbone(Tiny())
    with torch.no_grad():
        backbone.model.classifier.bias[0] = torch.nan
    assert make(name, backbone).attribute(IMAGES[:1], 1).isnan().all()


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("rise", {"masks": 0}, "masks: got 0; give an int of at least 1"),
        ("rise", {"keep": 1}, "keep: got 1; give a probability between 0 and 1"),
        ("rise", {"fill": "blur"}, "fill: got 'blur'; give 'black' or 'mean'"),
        ("rise", {"samples": 3}, "rise does not take that option"),
        ("occlusion", {"size": 0}, "size: got 0"),
        ("occlusion", {"size": 31}, "size: got 31 for images of 30 x 41 pixels"),
        ("occlusion", {"size": 4, "stride": 5}, "stride: got 5 with windows of 4 pixels"),
        ("occlusion", {"stride": True}, "stride: got True"),
        ("lime", {"samples": 1}, "samples: got 1; give an int of at least 2"),
        ("kernel_shap", {"max_forward_batch": 0}, "max_forward_batch: got 0"),
    ],
)
def test_bad_options_are_refused(backbone, name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, backbone, **options)


# ---------------------------------------------------------------------- RISE


def test_rise_is_the_weighted_mean_of_its_masks(backbone):
    explainer = make("rise", backbone, keep=0.3)
    masks = explainer._random_masks(IMAGES[0])(torch.arange(23)).double()
    with torch.no_grad():
        p = backbone.logits(IMAGES[:1] * masks.float()).double().softmax(1)[:, 2]
    expected = (p[:, None, None, None] * masks).sum(0) / (23 * 0.3)
    assert torch.allclose(explainer.attribute(IMAGES[:1], 2)[0].double(), expected, atol=1e-6)


def test_rise_masks_are_cropped_bilinear_enlargements_of_binary_cells(backbone):
    explainer = Rise(backbone, masks=200, cells=5)
    masks = explainer._random_masks(IMAGES[0])(torch.arange(200))
    assert masks.shape == (200, 1, *SIZE) and 0 <= masks.min() and masks.max() <= 1
    generator = explainer._generator()
    cells = torch.from_numpy(generator.random((200, 5, 5)) < 0.5).float()
    offsets = generator.random((200, 2))
    large = F.interpolate(cells[:, None], (6 * 6, 6 * 9), mode="bilinear", align_corners=False)
    seen = set()
    for mask, enlarged, (u, v) in zip(masks, large, offsets, strict=True):
        y, x = int(u * 6), int(v * 9)
        seen.add((y, x))
        assert torch.allclose(mask, enlarged[:, y : y + 30, x : x + 41], atol=1e-5)
    assert {y for y, _ in seen} == set(range(6)) and {x for _, x in seen} == set(range(9))


@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_rise_of_a_constant_score_is_that_score(keep):
    class Constant(Tiny):
        def forward_taps(self, x):
            logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(len(x), -1)
            return logits, [x[:, :1]]

    explainer = Rise(load_backbone(Constant()), masks=4000, cells=7, keep=keep)
    values = explainer.attribute(IMAGES[:1], 0)
    # E[m] = keep at each pixel; five standard errors of a Bernoulli variable, the widest case.
    error = 5 * 0.4 * (1 / keep - 1) ** 0.5 / 4000**0.5
    assert (values - 0.4).abs().max() < error


def test_rise_masks_depend_on_the_seed_and_size_alone(backbone):
    masks = [
        Rise(backbone, seed=seed, masks=9)._random_masks(image)(torch.arange(9))
        for seed, image in ((1, IMAGES[0]), (1, IMAGES[1]), (2, IMAGES[0]))
    ]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert len({m.sum().item() for m in masks[0]}) == 9


# ---------------------------------------------------------------------- occlusion


@pytest.mark.parametrize(
    "size, stride", [(9, 7), (6, 6), (10, 3), (30, 1), (5, None), (None, None)]
)
def test_occlusion_equals_captum(backbone, size, stride):
    from captum.attr import Occlusion as Reference

    explainer = Occlusion(backbone, size=size, stride=stride, fill="mean")
    size = size or 4
    stride = stride or size // 2
    reference = Reference(lambda x: backbone.logits(x).softmax(1)).attribute(
        IMAGES[:1],
        (3, size, size),
        (3, stride, stride),
        baselines=backbone.mean.expand(1, 3, *SIZE),
        target=1,
        perturbations_per_eval=16,
    )
    found = explainer.attribute(IMAGES[:1], 1)
    assert found.abs().max() > 1e-3
    assert torch.allclose(found, reference[:, :1].float(), atol=1e-6)


def test_occlusion_of_an_additive_model_without_overlap_is_its_contribution(additive):
    images = IMAGES.double()
    parts = additive.model.weight[2] * images
    for size in (1, 5):
        maps = Occlusion(additive, size=size, stride=size).attribute(images, 2)
        sums = F.avg_pool2d(parts.sum(1, keepdim=True), size, ceil_mode=True, divisor_override=1)
        expected = sums.repeat_interleave(size, 2).repeat_interleave(size, 3)[..., :30, :41]
        assert torch.allclose(maps, expected, atol=1e-12)


# ---------------------------------------------------------------------- superpixels


def contributions(additive, image, labels, target):
    """What each superpixel adds to the probability of an additive model, (M,) float64."""
    part = (additive.model.weight[target] * image).sum(0).detach()
    return torch.stack([part[labels == i].sum() for i in range(int(labels.max()) + 1)])


def test_superpixels_are_a_partition_into_connected_regions():
    from skimage.measure import label

    for image in smooth(3, seed=8):
        labels = superpixels(image, 12)
        count = int(labels.max()) + 1
        assert labels.shape == SIZE and labels.dtype == torch.int64 and 6 <= count <= 18
        assert labels.unique().tolist() == list(range(count))
        for i in range(count):
            assert label((labels == i).numpy(), connectivity=2).max() == 1
        assert torch.equal(superpixels(image.clone(), 12), labels)


@pytest.mark.parametrize("name", ["lime", "kernel_shap"])
def test_maps_are_constant_on_superpixels(backbone, name):
    maps = make(name, backbone).attribute(IMAGES, TARGET)
    for image, single in zip(IMAGES, maps, strict=True):
        labels = superpixels(image, OPTIONS[name]["n_segments"])
        for i in range(int(labels.max()) + 1):
            assert single[0, labels == i].unique().numel() == 1


@pytest.mark.parametrize("fill", ["black", "mean"])
def test_one_superpixel_gives_a_constant_map(backbone, fill):
    noise = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(3))
    clean, empty = noise, torch.zeros_like(noise)
    if fill == "mean":
        empty = backbone.mean.expand_as(noise)
    with torch.no_grad():
        p = backbone.logits(torch.cat([clean, empty])).double().softmax(1)[:, 0]
    for name in ("lime", "kernel_shap"):
        found = make(name, backbone, n_segments=1, fill=fill).attribute(noise, 0)
        assert found.unique().numel() == 1
        if name == "kernel_shap":
            assert torch.allclose(found.double(), p[0] - p[1], atol=1e-6)
        else:  # shrunk by the ridge
            assert 0 < float(found.mean()) / float(p[0] - p[1]) < 1


# ---------------------------------------------------------------------- LIME


@pytest.mark.parametrize("samples, segments", [(60, 9), (300, 30)])
def test_lime_recovers_an_additive_model(additive, samples, segments):
    image = smooth(1, seed=2)[0].double()
    labels = superpixels(image, segments)
    explainer = Lime(additive, samples=samples, n_segments=segments, ridge=1e-12)
    maps = explainer.attribute(image[None], 1)[0, 0]
    expected = contributions(additive, image, labels, 1)
    assert expected.max() > 1.5 * expected.min()
    assert torch.allclose(maps, expected[labels], atol=1e-10)


def test_lime_samples_are_fair_coins_and_the_clean_image(backbone):
    kept = Lime(backbone, samples=2000)._coalitions(20)
    assert kept[0].all() and kept.shape == (2000, 20)
    assert (kept[1:].double().mean(0) - 0.5).abs().max() < 5 * 0.5 / 2000**0.5
    assert abs(float(kept[1:].double().sum(1).var()) - 5) < 1


def test_lime_fits_like_captum_on_the_same_samples(backbone):
    pytest.importorskip("sklearn")
    from captum._utils.models.linear_model import SkLearnRidge
    from captum.attr import LimeBase

    image, target = IMAGES[:1], 2
    explainer = Lime(backbone, samples=80, n_segments=9, width=0.4, ridge=0.7, fill="mean")
    labels = superpixels(image[0], 9)
    kept = explainer._coalitions(int(labels.max()) + 1)

    def samples(*_, **__):
        for row in kept:
            yield row[None].float()

    def weight(_, __, row, **___):
        cosine = float(row.mean().sqrt())  # 0 for the empty row
        return torch.tensor([np.exp(-((1 - cosine) ** 2) / 0.4**2)])

    reference = LimeBase(
        lambda x: backbone.logits(x).double().softmax(1),
        SkLearnRidge(alpha=0.7),
        weight,
        samples,
        True,
        lambda row, x, **_: torch.where(row[0][labels] > 0, x, backbone.mean),
        None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = reference.attribute(image, target=target, n_samples=80).flatten()
    found = explainer.attribute(image, target)[0, 0]
    assert expected.abs().max() > 1e-3
    assert torch.allclose(found, expected[labels].float(), atol=1e-5)


# ---------------------------------------------------------------------- KernelSHAP


def brute_force(value, players):
    """Shapley values from their definition; ``value`` takes a frozenset."""
    phi = torch.zeros(players, dtype=torch.float64)
    for i in range(players):
        others = [j for j in range(players) if j != i]
        for size in range(players):
            weight = factorial(size) * factorial(players - size - 1) / factorial(players)
            for kept in map(frozenset, combinations(others, size)):
                phi[i] += weight * (value(kept | {i}) - value(kept))
    return phi


def shapley(backbone, image, labels, target):
    players = int(labels.max()) + 1
    with torch.no_grad():
        known = {}
        for code in range(2**players):
            kept = torch.tensor([code >> i & 1 for i in range(players)])
            p = backbone.logits((image * kept[labels])[None]).double().softmax(1)
            known[frozenset(kept.nonzero().flatten().tolist())] = p[0, target]
    return brute_force(known.__getitem__, players)


@pytest.mark.parametrize("segments", [2, 4, 6])
def test_kernel_shap_of_all_coalitions_gives_shapley_values(backbone, segments):
    labels = superpixels(IMAGES[1], segments)
    players = int(labels.max()) + 1
    expected = shapley(backbone, IMAGES[1], labels, 0)
    explainer = KernelShap(backbone, samples=2**players, n_segments=segments)
    found = explainer.attribute(IMAGES[1:2], 0)[0, 0].double()
    assert players > 1 and expected.abs().max() > 1e-3
    assert torch.allclose(found, expected[labels], atol=1e-6)


def test_kernel_shap_of_drawn_coalitions_comes_close_and_closer(backbone):
    labels = superpixels(IMAGES[0], 12)
    players = int(labels.max()) + 1
    assert 8 <= players <= 12
    expected = shapley(backbone, IMAGES[0], labels, 0)
    errors = []
    for samples in (2 * players + 4, 2**players - 2):
        runs = [
            KernelShap(backbone, seed=seed, samples=samples, n_segments=12)
            .attribute(IMAGES[:1], 0)[0, 0]
            .double()
            for seed in range(6)
        ]
        errors.append(torch.stack([(r - expected[labels]).abs().mean() for r in runs]).mean())
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.05 * expected.abs().max(), errors


@pytest.mark.parametrize("samples, segments", [(41, 12), (500, 40), (64, 5)])
def test_kernel_shap_recovers_an_additive_model(additive, samples, segments):
    image = smooth(1, seed=2)[0].double()
    labels = superpixels(image, segments)
    explainer = KernelShap(additive, samples=samples, n_segments=segments)
    maps = explainer.attribute(image[None], 1)[0, 0]
    assert torch.allclose(maps, contributions(additive, image, labels, 1)[labels], atol=1e-10)


@pytest.mark.parametrize("samples", [24, 200])
def test_kernel_shap_values_add_up_to_the_difference(backbone, samples):
    backbone = load_backbone(backbone.model).double()
    labels = superpixels(IMAGES[0].double(), 9)
    try:
        explainer = KernelShap(backbone, samples=samples, n_segments=9)
        maps = explainer.attribute(IMAGES[:1].double(), 2)[0, 0]
        empty = torch.zeros_like(IMAGES[:1]).double()
        with torch.no_grad():
            p = backbone.logits(torch.cat([IMAGES[:1].double(), empty])).softmax(1)[:, 2]
    finally:
        backbone.float()
    total = sum(maps[labels == i][0] for i in range(int(labels.max()) + 1))
    assert abs(float(total - (p[0] - p[1]))) < 1e-12


def test_kernel_shap_draws_pairs_with_sizes_of_the_shapley_kernel(backbone):
    explainer = KernelShap(backbone, samples=8003)
    kept = explainer._coalitions(14)
    assert kept.shape == (8002, 14) and not kept[0].any() and kept[-1].all()
    half = (len(kept) - 2) // 2
    assert torch.equal(kept[1 : 1 + half], ~kept[1 + half : -1])
    sizes = kept[1:-1].sum(1)
    assert sizes.min() >= 1 and sizes.max() <= 13
    k = torch.arange(1, 14).double()
    expected = 1 / (k * (14 - k))
    expected = expected / expected.sum()
    share = torch.bincount(sizes, minlength=14)[1:14].double() / len(sizes)
    assert ((share - expected).abs() < 5 * (expected / half).sqrt()).all()
    # Within a size all superpixels are equally likely.
    three = kept[1 : 1 + half][sizes[:half] == 3].double()
    assert (three.mean(0) - 3 / 14).abs().max() < 5 * (3 / 14 / len(three)) ** 0.5


def test_kernel_shap_refuses_too_few_samples(backbone):
    explainer = KernelShap(backbone, samples=12, n_segments=9)
    with pytest.raises(ValueError, match=r"samples: got 12 for \d+ superpixels; give at least \d+"):
        explainer.attribute(IMAGES[:1], 0)


def test_kernel_shap_agrees_with_captum_in_distribution(backbone):
    pytest.importorskip("sklearn")
    from captum.attr import KernelShap as Reference

    labels = superpixels(IMAGES[0], 6)
    players = int(labels.max()) + 1
    expected = shapley(backbone, IMAGES[0], labels, 0)
    reference = Reference(lambda x: backbone.logits(x).softmax(1))
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        theirs = reference.attribute(
            IMAGES[:1],
            target=0,
            feature_mask=labels.expand(1, 3, *SIZE),
            n_samples=600,
            perturbations_per_eval=50,
        )
    ours = KernelShap(backbone, samples=2**players, n_segments=6).attribute(IMAGES[:1], 0)
    scale = expected.abs().max()
    assert (theirs[:, :1] - ours).abs().max() < 0.1 * scale
