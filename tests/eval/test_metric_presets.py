"""Every preset against the original's formula, written out on normalised images as its authors compute it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from references import cases
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from xattn.eval.metric_presets import PRESETS, preset
from xattn.eval.metrics import Column, measure


@pytest.fixture(scope="module")
def case():
    """A tiny network, three images of 28 x 36 and maps of 5 x 6; the class is the prediction."""
    made = cases.synthetic()
    maps = torch.rand(3, 1, 5, 6, generator=torch.Generator().manual_seed(7)) * 3 - 1
    with torch.no_grad():
        made.net[-1].bias += 3.0  # torch-cam divides by logits
        targets = made.f(made.images).argmax(1)
    return replace(made, maps=maps, targets=targets)


def ours(name, case, maps=None, **changes):
    """The preset's values by column, image by image."""
    protocol, (probe,) = preset(name, case.mean.flatten().tolist())
    return measure(
        replace(probe, **changes),
        case.f,
        case.images,
        case.maps if maps is None else maps,
        case.targets,
        score=protocol.score,
        normalization=protocol.normalization,
        resize=protocol.resize,
        max_forward_batch=4,
    )


def same(found, expected, tolerance=1e-5):
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def scaled(maps):
    low = maps.amin((1, 2, 3), keepdim=True)
    return (maps - low) / (maps.amax((1, 2, 3), keepdim=True) - low)


def resized(maps, case):
    return F.interpolate(maps, case.size, mode="bilinear", align_corners=False)


def probability(case, normalized):
    with torch.no_grad():
        scores = case.net(normalized).double().softmax(1)
    return scores.gather(1, case.targets[:, None])[:, 0]


def of_raw(case, pixels):
    return probability(case, (pixels - case.mean) / case.std)


def test_no_preset_goes_untested():
    tests = {name.removeprefix("test_").split("_is_")[0].replace("_", "-") for name in globals()}
    assert set(PRESETS) <= tests


def test_ttame_is_masked_at_quantiles_of_the_resized_map(case):
    grey = resized(scaled(case.maps), case)
    p, values = of_raw(case, case.images), ours("ttame", case)
    for level, dropped in ((1.0, 0.0), (0.5, 0.5), (0.15, 0.85)):
        least = grey.flatten(1).quantile(dropped, dim=1)[:, None, None, None]
        q = of_raw(case, case.images * grey.masked_fill(grey < least, 0))
        same(values[Column("AD", level)], 100 * (p - q).clip(min=0) / p)
        same(values[Column("IC", level)], 100.0 * (q > p))


def test_lift_cam_is_the_grey_map_that_was_scaled_after_resizing_and_its_complement(case):
    grey = scaled(resized(case.maps, case))
    p, q = of_raw(case, case.images), of_raw(case, case.images * grey)
    d = of_raw(case, case.images * (1 - grey))
    values = ours("lift-cam", case)
    same(values[Column("AD", 1.0)], 100 * (p - q).clip(min=0) / p)
    same(values[Column("IC", 1.0)], 100.0 * (q > p))
    same(values[Column("ADD", 1.0)], 100 * (p - d) / p)
    assert set(values) == {Column(m, 1.0) for m in ("AD", "IC", "ADD")}


def test_opti_cam_is_the_grey_map_that_was_scaled_after_resizing(case):
    p = of_raw(case, case.images)
    q = of_raw(case, case.images * scaled(resized(case.maps, case)))
    values = ours("opti-cam", case)
    same(values[Column("AD", 1.0)], 100 * (p - q).clip(min=0) / p)
    same(values[Column("IC", 1.0)], 100.0 * (q > p))
    same(values[Column("AG", 1.0)], 100 * (q - p).clip(min=0) / (1 - p))
    assert set(values) == {Column(m, 1.0) for m in ("AD", "IC", "AG")}


def rise_curve(case, start, finish, maps):
    """Probabilities while 224 pixels a step of ``finish`` replace those of ``start``."""
    ranks = np.flip(np.argsort(maps.flatten(1).numpy(), axis=1), axis=1).copy()
    current, count = start.clone(), ranks.shape[1]
    scores = []
    for step in range(-(-count // 224) + 1):
        scores.append(probability(case, current).numpy())
        for i, row in enumerate(ranks[:, 224 * step : 224 * (step + 1)]):
            current[i].flatten(1)[:, row] = finish[i].flatten(1)[:, row]
    return np.array(scores)


def area(curve):
    return (curve.sum(0) - curve[0] / 2 - curve[-1] / 2) / (len(curve) - 1)


def test_rise_is_deletion_to_zero_and_insertion_onto_the_zero_padded_blur(case):
    maps = torch.rand(3, 1, *case.size, generator=torch.Generator().manual_seed(8))  # without ties
    x = case.normalized
    impulse = np.zeros((11, 11))
    impulse[5, 5] = 1
    kernel = torch.from_numpy(gaussian_filter(impulse, 5)).float()
    blurred = F.conv2d(x, kernel.expand(3, 1, 11, 11), padding=5, groups=3)
    values = ours("rise", case, maps)
    deletion, insertion = (
        rise_curve(case, *ends, maps) for ends in ((x, torch.zeros_like(x)), (blurred, x))
    )
    assert len(deletion) == 6, "1008 pixels are five steps, the last one short"
    same(values[Column("deletion")], area(deletion))
    same(values[Column("insertion")], area(insertion))


def imputed(image, removed):
    """Removed pixels are the mean of their neighbours, edges twice as heavy as corners."""
    height, width = removed.shape
    holes = [(i, j) for i in range(height) for j in range(width) if removed[i, j]]
    place = {hole: n for n, hole in enumerate(holes)}
    a, b = np.zeros((len(holes), len(holes))), np.zeros((len(holes), 3))
    for n, (i, j) in enumerate(holes):
        for di, dj in np.ndindex(3, 3):
            near = (i + di - 1, j + dj - 1)
            weight = {1: 1 / 6, 2: 1 / 12}.get(abs(di - 1) + abs(dj - 1), 0)
            if weight and 0 <= near[0] < height and 0 <= near[1] < width:
                a[n, n] += weight
                if near in place:
                    a[n, place[near]] -= weight
                else:
                    b[n] += weight * image[:, near[0], near[1]]
    filled = image.copy()
    filled[:, removed] = np.linalg.solve(a, b).T
    return filled


def test_road_is_the_probability_of_noisily_and_linearly_imputed_images(case):
    _, (probe,) = preset("road")
    levels = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
    assert (probe.levels, probe.noise) == (levels, 0.01)
    small = replace(case, images=F.avg_pool2d(case.images, 2))
    grey = resized(scaled(small.maps), small)
    means = []
    for map_of_order in (grey, 1 - grey):
        scores = []
        for level in levels:
            filled = [
                imputed(image.double().numpy(), (m >= np.quantile(m, 1 - level)))
                for image, m in zip(small.images, map_of_order[:, 0].double().numpy(), strict=True)
            ]
            scores.append(of_raw(small, torch.from_numpy(np.stack(filled)).float()))
        means.append(torch.stack(scores).mean(0))
    values = ours("road", small, noise=0.0, tolerance=1e-6)
    same(values[Column("ROAD-MoRF")], means[0], 1e-4)
    same(values[Column("ROAD-LeRF")], means[1], 1e-4)
    same(values[Column("ROAD")], (means[1] - means[0]) / 2, 1e-4)
    with_noise = ours("road", small)[Column("ROAD-MoRF")]
    assert 0 < (with_noise - means[0]).abs().max() < 0.02


def test_torch_cam_is_the_drop_of_logits_under_masked_normalised_images(case):
    masked = case.normalized * resized(scaled(case.maps), case)
    with torch.no_grad():
        p, q = (case.net(x).double().gather(1, case.targets[:, None])[:, 0]
                for x in (case.normalized, masked))  # fmt: skip
    assert (p > 0).all()
    values = ours("torch-cam", case)
    same(values[Column("AD", 1.0)], 100 * torch.relu(p - q) / (p + 1e-7))
    same(values[Column("IC", 1.0)], 100.0 * (p < q))


def test_grad_cam_lib_is_the_drop_of_probabilities_under_maps_scaled_twice(case):
    grey = scaled(resized(scaled(case.maps), case))
    p, q = probability(case, case.normalized), probability(case, case.normalized * grey)
    values = ours("grad-cam-lib", case)
    same(values[Column("drop", 1.0)], 100 * (p - q).clip(min=0))
    same(values[Column("IC", 1.0)], 100.0 * (q > p))
