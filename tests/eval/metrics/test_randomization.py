"""Similarity of maps, cascading randomisation, and the check that they make."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr
from skimage.metrics import structural_similarity

from xattn.backbone import load_backbone
from xattn.correlation import ranks, spearman
from xattn.eval.functional import upsample
from xattn.eval.metrics import Column, Sample
from xattn.eval.metrics.randomization import (
    RandomizationMetric,
    randomization_curves,
    randomization_values,
    ssim,
)
from xattn.eval.sanity import Cascade, cascade, randomized_backbone
from xattn.explainers import create_explainer

SPEARMAN, SSIM = Column("randomization-Spearman"), Column("randomization-SSIM")


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- similarity


@pytest.mark.parametrize("levels", [None, 3])
def test_spearman_is_that_of_scipy_also_with_ties(levels):
    a, b = rand(4, 1, 5, 7), rand(4, 1, 5, 7, seed=1) + 0.5 * rand(4, 1, 5, 7)
    if levels:
        a, b = (a * levels).floor(), (b * levels).floor()
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(spearman(a, b), expected, atol=1e-12)
    np.testing.assert_array_equal(ranks(a), rankdata(a.flatten(1), axis=1))


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ssim_is_that_of_scikit_image(data_range):
    a = rand(3, 1, 15, 19)
    b = (a + 0.6 * rand(3, 1, 15, 19, seed=1)).clamp(0, 1)
    a, b = a * data_range, b * data_range
    expected = [
        structural_similarity(
            x[0].double().numpy(),
            y[0].double().numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=data_range,
        )
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(ssim(a, b, data_range), expected, atol=1e-12)


def test_equal_maps_are_alike_and_opposite_ones_are_not():
    a = rand(2, 1, 12, 13)
    for similarity in (spearman, ssim):
        torch.testing.assert_close(similarity(a, a), torch.ones(2).double())
        assert (similarity(a, 1 - a) < 0).all()
        torch.testing.assert_close(similarity(a, 1 - a), similarity(1 - a, a))
    torch.testing.assert_close(spearman(a, a**3), torch.ones(2).double())


def test_constant_and_non_finite_maps_have_no_similarity():
    a, b = rand(3, 1, 12, 13), rand(3, 1, 12, 13, seed=1)
    a[0], b[1, 0, 3, 3] = 0.5, torch.nan
    for similarity in (spearman, ssim):
        assert similarity(a, b).isnan().tolist() == [True, True, False]
        assert similarity(b, a).isnan().tolist() == [True, True, False]


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="a, b: got shapes"):
        spearman(rand(2, 5), rand(2, 6))
    with pytest.raises(ValueError, match="values: got shape"):
        spearman(rand(5), rand(5))
    for shape in ((2, 1, 10, 20), (2, 20, 20), (2, 3, 20, 20)):
        with pytest.raises(ValueError, match="of at least 11 pixels per side"):
            ssim(rand(*shape), rand(*shape))


# ---------------------------------------------------------------- cascade


def load(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_backbone(name, weights=None, num_classes=7, input_size=64)


@pytest.fixture(scope="module", params=["test_efficientnet", "test_vit"])
def backbone(request):
    return load(request.param)


@pytest.fixture(scope="module")
def images(backbone):
    low = rand(2, 3, 6, 6, seed=3)
    return torch.nn.functional.interpolate(low, (64, 64), mode="bilinear")


def state(backbone):
    return {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}


def changed(backbone, twin):
    """Names of the tensors that are not the backbone's own."""
    theirs = state(twin)
    return {name for name, value in state(backbone).items() if theirs[name] is not value}


def test_stages_go_from_the_classifier_down_to_the_first_layer(backbone):
    twins = cascade(backbone, stages=5)
    random, before = [changed(backbone, twin) for _, twin in twins], state(backbone)
    assert len(twins) == 5
    top = "classifier" if "classifier.weight" in dict(backbone.model.named_parameters()) else "head"
    assert random[0] == {f"model.{top}.weight", f"model.{top}.bias"} and twins[0][0] == top
    order = [name for name in before if name.startswith("model.")]
    parameters = dict(backbone.named_parameters())
    for smaller, larger in pairwise(random):
        assert smaller < larger
        kept = [i for i, n in enumerate(order) if n in parameters and n not in larger]
        new = [i for i, n in enumerate(order) if n in parameters and n in larger - smaller]
        assert not kept or max(kept) < min(new), "what is kept lies below"
    assert random[-1] == {n for n in before if n.startswith("model.")}


def test_the_last_stage_is_the_randomised_backbone(backbone, images):
    twin, full = cascade(backbone, seed=4)[-1][1], randomized_backbone(backbone, 4)
    theirs = state(full)
    assert all(torch.equal(value, theirs[name]) for name, value in state(twin).items())
    with torch.no_grad():
        assert torch.equal(twin.logits(images), full.logits(images))
    assert twin.fingerprint == full.fingerprint


def test_a_cascade_is_a_function_of_its_seed_and_touches_nothing(backbone, images):
    before = {name: value.clone() for name, value in state(backbone).items()}
    torch.manual_seed(5)
    rng = torch.get_rng_state()
    one, same, other = (cascade(backbone, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in state(backbone).items())
    with torch.no_grad():
        real = backbone.logits(images)
        for (_, a), (_, b), (_, c) in zip(one, same, other, strict=True):
            x, y, z = (twin.logits(images) for twin in (a, b, c))
            assert torch.equal(x, y) and not torch.allclose(x, z) and not torch.allclose(x, real)
            assert x.isfinite().all() and x.std() > 1e-3
    assert len({twin.fingerprint for _, twin in one} | {backbone.fingerprint}) == 6


def test_a_cascade_holds_one_further_set_of_weights(backbone):
    own = {id(t) for t in state(backbone).values()}
    for stages in (2, 8):
        tensors = {id(t): t for _, twin in cascade(backbone, stages) for t in state(twin).values()}
        further = sum(t.numel() for key, t in tensors.items() if key not in own)
        assert further == sum(t.numel() for n, t in state(backbone).items() if "model." in n)


@pytest.mark.parametrize("stages", [0, 1, 2.5])
def test_a_cascade_has_two_stages_or_more(backbone, stages):
    with pytest.raises(ValueError, match="stages: got"):
        cascade(backbone, stages)


def test_a_network_without_that_many_layers_is_refused():
    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)
            self.fc = torch.nn.Linear(4, 3)

        def forward_taps(self, x):
            maps = self.conv(x).relu()
            return self.fc(maps.mean((2, 3))), [maps]

    tiny = load_backbone(Tiny(), weights=None, input_size=16)
    assert [name for name, _ in cascade(tiny, 2)] == ["fc", "conv"]
    with pytest.raises(ValueError, match=r"stages: got 5.*1 layers.*give at most 2"):
        cascade(tiny, 5)


# ---------------------------------------------------------------- methods on the twins


def test_gradcam_changes_and_the_centre_does_not(backbone, images):
    twins = Cascade(backbone, stages=4)
    values = {}
    for name in ("gradcam", "centre"):
        options = {"relu": False} if name == "gradcam" else {}
        maps = create_explainer(name, backbone, **options).attribute(images, 2)
        raw = torch.nn.functional.interpolate(maps, (64, 64), mode="bilinear")
        method = twins.method(name, **options)
        for i, image in enumerate(images):
            sample = Sample(
                image,
                raw[i],
                raw[i],
                2,
                0.5,
                explain_randomized=lambda k, x, method=method: method(k, x, 2),
            )
            values[name, i] = finish(RandomizationMetric(stages=4), sample)
    for i in range(len(images)):
        for column in (SPEARMAN, SSIM):
            assert values["centre", i][column] == pytest.approx(1, abs=1e-6)
            assert values["gradcam", i][column] < 0.8


def test_a_head_keeps_its_weights_and_reads_each_twins_maps(backbone, images):
    from xattn.heads import create_head

    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = create_head("ttame", backbone).eval()
    mine = head.backbone_fingerprint
    twins = Cascade(backbone)
    method = twins.method("head", head)
    real = create_explainer("head", backbone, head).attribute(images, 1)
    maps = [method(stage, images, torch.tensor([1, 1])) for stage in range(5)]
    assert torch.equal(maps[0], real), "the classifier is not read"
    # Of a ViT's last block the head reads norm1, whose weights are initial here.
    assert not any(torch.allclose(m, real) for m in maps[2:])
    assert head.backbone_fingerprint == mine == backbone.fingerprint


def test_a_layer_of_the_backbone_stands_for_that_of_the_twin(backbone, images):
    layer = backbone.model.blocks[1]
    method = Cascade(backbone).method("gradcam", layer=layer, relu=False)
    twin = cascade(backbone)[-1][1]
    expected = create_explainer("gradcam", twin, layer=twin.model.blocks[1], relu=False)
    assert torch.equal(method(4, images, 3), expected.attribute(images, 3))


def test_twins_are_shared_and_explainers_do_not_pile_up(backbone, images):
    twins = Cascade(backbone, stages=3)
    methods = [twins.method(name) for name in ("gradcam", "saliency", "random")]
    for _ in range(2):
        for method in methods:
            for stage in range(3):
                method(stage, images[:1], 0)
    assert len(twins._explainers) == 3
    shared = {id(e.backbone) for e in twins._explainers.values()}
    assert shared == {id(twin) for _, twin in twins.twins}


# ---------------------------------------------------------------- values


def finish(probe, sample):
    with pytest.raises(StopIteration) as stop:
        next(probe.measure(sample))
    return stop.value.value({})


def scaled(maps):
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / (high - low)


def test_each_stage_is_compared_and_the_value_is_their_mean():
    maps = rand(2, 1, 14, 15) - 0.5
    randomized = rand(2, 3, 1, 14, 15, seed=1) - 0.5
    randomized[:, 0] = maps
    for absolute in (True, False):
        curves = randomization_curves(maps, randomized, absolute=absolute)
        values = randomization_values(maps, randomized, absolute=absolute)
        for column, similarity in ((SPEARMAN, spearman), (SSIM, ssim)):
            assert curves[column].shape == (2, 3)
            torch.testing.assert_close(curves[column][:, 0], torch.ones(2).double())
            torch.testing.assert_close(curves[column].mean(1), values[column])
            for stage in range(3):
                a, b = (m.abs() if absolute else m for m in (maps, randomized[:, stage]))
                expected = similarity(scaled(a), scaled(b))
                torch.testing.assert_close(curves[column][:, stage], expected, atol=1e-5, rtol=0)


def test_signs_count_only_where_asked_for():
    maps = rand(1, 1, 14, 15) - 0.5
    flipped = -maps[:, None]
    for column in (SPEARMAN, SSIM):
        assert float(randomization_values(maps, flipped)[column]) == pytest.approx(1)
        assert float(randomization_values(maps, flipped, absolute=False)[column]) < 0


def test_a_map_that_vanishes_shares_nothing_and_an_invalid_one_is_undefined():
    maps, randomized = rand(3, 1, 14, 15), rand(3, 2, 1, 14, 15, seed=1)
    randomized[0, 0], maps[1], randomized[2, 1, 0, 3, 3] = 0.0, 1.0, torch.inf
    for values in randomization_curves(maps, randomized).values():
        assert values[0, 0] == 0 and values[0, 1] != 0
        assert values[1].isnan().all()
        assert values[2].isnan().tolist() == [False, True]


def test_methods_that_cannot_be_rebuilt_are_undefined():
    image, raw = rand(3, 14, 15), rand(1, 14, 15)
    values = finish(RandomizationMetric(), Sample(image, raw, raw, 0, 0.5))
    assert set(values) == {SPEARMAN, SSIM} and all(math.isnan(v) for v in values.values())


def test_maps_of_any_resolution_are_compared_at_that_of_the_image():
    image, small = rand(3, 30, 34), rand(1, 1, 5, 6)
    raw, stages = upsample(small, (30, 34))[0], []

    def explain(stage, images):
        assert torch.equal(images, image[None])
        stages.append(stage)
        return 3 * small

    sample = Sample(image, raw, raw, 0, 0.5, explain_randomized=explain)
    for value in finish(RandomizationMetric(stages=3), sample).values():
        assert value == pytest.approx(1, abs=1e-6)
    assert stages == [0, 1, 2]


def test_bad_options_and_shapes_are_refused():
    for shape in ((2, 3, 1, 14, 16), (2, 0, 1, 14, 15), (2, 1, 14, 15)):
        with pytest.raises(ValueError, match="maps, randomized: got"):
            randomization_values(rand(2, 1, 14, 15), rand(*shape))
