"""torchmetrics classes on images and maps."""

import pickle

import eval_fakes as fakes
import numpy as np
import pytest
import torch
from eval_fakes import FakeBackbone, Maps
from torchmetrics import MetricCollection

from xattn.eval import create_metric, evaluate, functional, metrics
from xattn.eval.metrics import (
    AverageDrop,
    IncreaseInConfidence,
    adcc,
    complexity,
    curves,
    flipping,
    infidelity,
    irof,
    localization,
    monotonicity,
    road,
    sensitivity,
)
from xattn.eval.metrics.infidelity import infidelity_values
from xattn.eval.metrics.localization import iou_values, pointing_values, vea_values
from xattn.eval.metrics.masking import MaskingMetric
from xattn.eval.metrics.randomization import SPEARMAN, SSIM
from xattn.eval.metrics.randomization import randomization_values as stages
from xattn.eval.metrics.registry import CLASSES, GROUPS

ON_IMAGES = {name: cls for name, cls in CLASSES.items() if not cls.group.metric.needs_annotation}


def brightness(images, target):
    return fakes.brightness(images, target)


def at_stage(stage, images, target):
    stage = len(stage) if isinstance(stage, str) else stage % 5
    return brightness(images, target) * (stage + 1) + fakes.noise(images, target)


def probe_of(group):
    """Options under which a small image has a value, where the group's own are too coarse for it."""
    options = {"irof": {"compactness": 1000.0}}.get(group.name, group.cases[0])
    return create_metric(group.name, **options) if options else None


def on_images(cls, backbone, **options):
    probe = cls.group.metric
    if probe.explains_again:
        options["explainer"] = brightness
    if probe.explains_randomized:
        options["randomized"] = at_stage
    return cls(backbone, **options)


@pytest.fixture(scope="module")
def expected():
    """Means by metric of eight images, of all groups, by evaluate."""
    groups = [group for group in GROUPS.values() if not group.metric.needs_annotation]
    probes = [probe_of(group) or group.name for group in groups]
    found = evaluate(
        FakeBackbone(), {"m": Maps(brightness)}, fakes.images(8), metrics=probes, levels=(1.0,),
        randomized={"m": at_stage}, max_forward_batch=8, progress=False,
    )  # fmt: skip
    return {column.metric: found.mean("m", *column) for column in found.columns}


@pytest.mark.parametrize("name", ON_IMAGES)
def test_values_are_those_of_evaluate(name, expected):
    cls = ON_IMAGES[name]
    metric = on_images(cls, FakeBackbone(), measured_by=probe_of(cls.group))
    images = fakes.images(8)
    target = FakeBackbone().logits(images).argmax(1)
    for part in (slice(0, 4), slice(4, 8)):
        metric.update(images[part], brightness(images[part], None), target[part])
    assert float(metric.compute()) == pytest.approx(expected[cls.metric], rel=1e-9, abs=1e-12)
    assert int(metric.n + metric.n_invalid) == 8


def draw(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)))


MAPS, SCORES, TWO = draw(4, 1, 14, 15), draw(4, 9), draw(2, 4, 9)
STAGES, MASKS = draw(4, 2, 1, 14, 15), draw(4, 1, 14, 15) > 0.5
P = draw(3, 4)


@pytest.mark.parametrize(
    ("metric", "given", "values"),
    [
        (metrics.AverageDrop(), P[:2], functional.average_drop_values),
        (metrics.AverageGain(), P[:2], functional.average_gain_values),
        (metrics.AverageDropInDeletion(), P[:2], functional.average_drop_in_deletion_values),
        (metrics.Deletion(), (SCORES,), curves.auc),
        (metrics.Insertion(), (SCORES,), curves.auc),
        (metrics.PixelFlipping(), (SCORES,), flipping.aopc),
        (metrics.IROF(), (SCORES,), irof.irof_values),
        (metrics.RoadMoRF(), (SCORES,), road.road_values),
        (metrics.RoadLeRF(), (SCORES,), road.road_values),
        (metrics.RoadCombined(), TWO, road.road_combined_values),
        (metrics.MonotonicityCorrelation(), TWO, monotonicity.monotonicity_values),
        (metrics.Infidelity(), TWO, infidelity.infidelity_values),
        (metrics.Infidelity(scale=False), TWO, lambda a, b: infidelity_values(a, b, False)),
        (metrics.Gini(), (MAPS,), complexity.gini_values),
        (metrics.Entropy(), (MAPS,), complexity.entropy_values),
        (metrics.Coherency(), (MAPS, STAGES[:, 0]), adcc.coherency_values),
        (metrics.Complexity(), (MAPS,), adcc.complexity_values),
        (metrics.ADCC(), P, adcc.adcc_values),
        (metrics.MaxSensitivity(), (MAPS, STAGES), sensitivity.max_sensitivity_values),
        (metrics.PointingGame(tolerance=1), (MAPS, MASKS), lambda a, m: pointing_values(a, m, 1)),
        (metrics.EnergyPointingGame(), (MAPS, MASKS), localization.energy_pointing_values),
        (metrics.LocalizationIoU(threshold=0.5), (MAPS, MASKS), lambda a, m: iou_values(a, m, 0.5)),
        (metrics.VisualExplanationAccuracy(), (MAPS, MASKS), vea_values),
        (metrics.RandomizationSpearman(), (MAPS, STAGES), lambda *x: stages(*x)[SPEARMAN]),
        (metrics.RandomizationSSIM(), (MAPS, STAGES), lambda *x: stages(*x)[SSIM]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, metrics.MeanMetric) else "",
)
def test_without_a_backbone_a_class_averages_its_values_and_counts_undefined_ones(
    metric, given, values
):
    valid = torch.tensor([True, True, False, True])
    metric.update(*(part[:1] for part in given))
    metric.update(*(part[1:] for part in given), valid=valid[1:])
    assert float(metric.compute()) == pytest.approx(float(values(*given)[valid].mean()))
    assert (int(metric.n), int(metric.n_invalid)) == (3, 1)
    undefined = [torch.full_like(given[0], torch.nan), *given[1:]]
    if type(metric) is not metrics.Coherency:  # which is 0 there
        metric.update(*undefined)
        assert int(metric.n_invalid) == 5


def test_every_class_names_a_metric_of_its_group():
    for cls in CLASSES.values():
        assert cls.metric in cls.group.metrics


def test_state_adds_up_resets_and_pickles():
    images = fakes.images(8)
    maps = brightness(images, None)
    halves = [AverageDrop(FakeBackbone()) for _ in range(2)]
    for metric, part in zip(halves, (slice(0, 4), slice(4, 8)), strict=True):
        assert float(metric(images[part], maps[part], 1)) == float(metric.compute())
    whole = pickle.loads(pickle.dumps(halves[0]))
    whole.update(images[4:], maps[4:], 1)
    total = sum(float(m.total) for m in halves)
    assert float(whole.compute()) == pytest.approx(total / 8)
    assert not list(whole.parameters()) and not whole.state_dict()
    whole.reset()
    assert int(whole.n) == 0 and np.isnan(float(whole.compute()))
    whole.update(images, maps, 1)
    assert float(whole.compute()) == pytest.approx(total / 8)
    together = MetricCollection(
        {"AD": AverageDrop(FakeBackbone()), "IC": IncreaseInConfidence(FakeBackbone())}
    )
    together.update(images, maps, 1)
    assert float(together.compute()["AD"]) == pytest.approx(total / 8)


def test_levels_options_and_shapes_of_maps():
    images = fakes.images(4)
    maps = brightness(images, None)
    half = AverageDrop(FakeBackbone(), level=0.5)
    half.update(images, maps[:, 0], torch.tensor([0, 1, 2, 3]))
    probe = create_metric("masking", levels=(0.5,))
    other = AverageDrop(FakeBackbone().logits, measured_by=probe)
    other.update(images.permute(0, 2, 3, 1).numpy(), maps, torch.tensor([0, 1, 2, 3]))
    assert float(half.compute()) == pytest.approx(float(other.compute()), rel=1e-9)


@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (4, 2, 16, 16), (4, 1, 1, 16, 16)])
def test_maps_that_are_not_one_an_image_are_refused(shape):
    metric = AverageDrop(FakeBackbone())
    with pytest.raises(ValueError, match=r"maps: got shape .* for 4 images; give \(B, 1, h, w\)"):
        metric.update(fakes.images(4), torch.rand(shape), torch.arange(4))


def test_logits_have_the_masking_metrics_that_need_no_bound():
    assert MaskingMetric(metrics=("AD", "IC", "drop"), bounded=False).columns
    with pytest.raises(ValueError, match="only AD, IC and drop are defined for logits"):
        MaskingMetric(metrics=("AD", "ADD"), bounded=False)
