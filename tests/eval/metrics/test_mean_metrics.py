"""torchmetrics classes on images and maps."""

import pickle

import eval_fakes as fakes
import numpy as np
import pytest
import torch
from eval_fakes import FakeBackbone, Maps
from torchmetrics import MetricCollection

from xattn.eval import create_probe, evaluate
from xattn.eval.metrics import AverageDrop, IncreaseInConfidence
from xattn.eval.metrics.masking import MaskingMetric
from xattn.eval.metrics.registry import CLASSES, GROUPS

ON_IMAGES = {name: cls for name, cls in CLASSES.items() if not cls.group.probe.needs_annotation}


def brightness(images, target):
    return fakes.brightness(images, target)


def at_stage(stage, images, target):
    return brightness(images, target) * (stage + 1) + fakes.noise(images, target)


def probe_of(group):
    """Options under which a small image has a value, where the group's own are too coarse for it."""
    options = {"irof": {"compactness": 1000.0}}.get(group.name, group.cases[0])
    return create_probe(group.name, **options) if options else None


def on_images(cls, backbone, **options):
    probe = cls.group.probe
    if probe.explains_again:
        options["explainer"] = brightness
    if probe.explains_randomized:
        options["randomized"] = at_stage
    return cls(backbone, **options)


@pytest.fixture(scope="module")
def expected():
    """Means by metric of eight images, of all groups, by evaluate."""
    groups = [group for group in GROUPS.values() if not group.probe.needs_annotation]
    probes = [probe_of(group) or group.name for group in groups]
    found = evaluate(
        FakeBackbone(), {"m": Maps(brightness)}, fakes.images(8), metrics=probes, levels=(1.0,),
        randomized={"m": at_stage}, max_forward_batch=8, progress=False,
    )  # fmt: skip
    return {column.metric: found.mean("m", *column) for column in found.columns}


@pytest.mark.parametrize("name", ON_IMAGES)
def test_values_are_those_of_evaluate(name, expected):
    cls = ON_IMAGES[name]
    metric = on_images(cls, FakeBackbone(), probe=probe_of(cls.group))
    images = fakes.images(8)
    target = FakeBackbone().logits(images).argmax(1)
    for part in (slice(0, 4), slice(4, 8)):
        metric.update(images[part], brightness(images[part], None), target[part])
    assert float(metric.compute()) == pytest.approx(expected[cls.metric], rel=1e-9, abs=1e-12)
    assert int(metric.n + metric.n_invalid) == 8


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
    probe = create_probe("masking", levels=(0.5,))
    other = AverageDrop(FakeBackbone().logits, probe=probe)
    other.update(images.permute(0, 2, 3, 1).numpy(), maps, torch.tensor([0, 1, 2, 3]))
    assert float(half.compute()) == pytest.approx(float(other.compute()), rel=1e-9)


@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (4, 2, 16, 16), (4, 1, 1, 16, 16)])
def test_maps_that_are_not_one_an_image_are_refused(shape):
    metric = AverageDrop(FakeBackbone())
    with pytest.raises(ValueError, match=r"maps: got shape .* for 4 images; give \(B, 1, h, w\)"):
        metric.update(fakes.images(4), torch.rand(shape), torch.arange(4))


def test_logits_have_the_masking_metrics_that_need_no_bound():
    assert MaskingMetric(metrics=("AD", "IC", "drop"), bounded=False).columns
    with pytest.raises(ValueError, match="logits have only AD, IC and drop"):
        MaskingMetric(metrics=("AD", "ADD"), bounded=False)


def test_without_a_backbone_scores_are_taken_as_before():
    metric = AverageDrop()
    metric.update(torch.tensor([0.8, 0.4]), torch.tensor([0.4, 0.5]))
    assert float(metric.compute()) == pytest.approx(25)
