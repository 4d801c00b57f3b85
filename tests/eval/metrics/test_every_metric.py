"""What holds of every metric: bounds, one image at a time, order of the batch, seeds, odd maps."""

import math

import eval_fakes as fakes
import numpy as np
import pytest
import torch
from eval_fakes import FakeBackbone
from hypothesis import given, settings
from hypothesis import strategies as st

from xattn.eval import GROUPS, METRICS, Protocol, create_metric, evaluate, measure
from xattn.eval.annotations import Annotation
from xattn.eval.metric_presets import PRESETS, preset
from xattn.eval.metrics.base import Column

NAMES = sorted(GROUPS)
MEAN = (0.5, 0.4, 0.3)
RANKING = ("insertion-deletion", "irof", "pixel-flipping")


def probe_of(name):
    return create_metric(name, mean=MEAN, **GROUPS[name].cases[0])


def object_at(size, target):
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[:, 4:12, 5:14] = True
    return Annotation({target: mask})


def again(images, targets):
    return fakes.brightness(images, targets)


def values_of(name, images, maps, **options):
    """Each column's values; metrics that explain again ask ``fakes.brightness``, on random weights, too."""
    notes = [object_at(images.shape[-2:], 1) for _ in images]
    return measure(
        probe_of(name),
        FakeBackbone().logits,
        images,
        maps,
        1,
        max_forward_batch=4,
        explain=again,
        explain_randomized=lambda stage, images, targets: again(images, targets),
        annotations=notes,
        **options,
    )


def drawn(seed, n=3):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)  # SLIC finds no regions in noise
    images = torch.nn.functional.interpolate(coarse, (18, 20), mode="bilinear")
    return images, torch.rand(n, 1, 5, 6, generator=generator)


@pytest.mark.parametrize("name", NAMES)
def test_every_column_is_described(name):
    for column in probe_of(name).columns:
        assert column.metric in METRICS
        assert Protocol().metric_id(*column, probe_of(name).column_options(column))


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=5)
def test_values_lie_within_their_bounds(name, seed):
    images, maps = drawn(seed, 2)
    for column, values in values_of(name, images, maps).items():
        info = METRICS[column.metric]
        good = values[~values.isnan()]
        assert bool((good >= info.low - 1e-9).all() and (good <= info.high + 1e-9).all()), column


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_a_loop_and_a_permutation_permutes(name):
    images, maps = drawn(3)
    whole = values_of(name, images, maps, seed=4)
    placed = GROUPS[name].by_name or GROUPS[name].metric.compares
    if name in ("infidelity", "monotonicity", "road", "sensitivity") or placed:
        order = [0, 1, 2]  # their noise or masks belong to an image's place
    else:
        order = [2, 0, 1]
    turned = values_of(name, images[order], maps[order], seed=4)
    for column, values in whole.items():
        torch.testing.assert_close(turned[column], values[order], rtol=1e-6, atol=0, equal_nan=True)
    first = values_of(name, images[:1], maps[:1], seed=4)
    for column, values in first.items():
        torch.testing.assert_close(values, whole[column][:1], rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_agree_bit_for_bit_whatever_the_global_generators(name):
    images, maps = drawn(5, 1)
    copies = images.clone(), maps.clone()
    torch.manual_seed(1)
    first = values_of(name, images, maps)
    assert torch.equal(images, copies[0]) and torch.equal(maps, copies[1])
    torch.manual_seed(2)
    np.random.seed(3)
    for column, values in values_of(name, images, maps).items():
        assert torch.equal(values.nan_to_num(), first[column].nan_to_num())


@pytest.mark.parametrize("name", RANKING)
def test_ranking_metrics_ignore_monotone_rescaling(name):
    images, maps = drawn(6)
    grey = torch.nn.functional.interpolate(maps, (18, 20), mode="nearest")
    plain = values_of(name, images, grey)
    squashed = values_of(name, images, 3 * grey**3 + 1) if name != "irof" else plain
    for column, values in plain.items():
        if name == "insertion-deletion":
            torch.testing.assert_close(squashed[column], values, rtol=1e-6, atol=0)
    affine = values_of(name, images, 2 * grey + 1)
    for column, values in plain.items():
        torch.testing.assert_close(affine[column], values, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shade", [0.0, 1.0])
def test_a_constant_mask_does_not_break_a_metric(name, shade):
    images, _ = drawn(7, 1)
    found = values_of(name, images, torch.full((1, 1, 5, 6), shade), is_mask=True)
    for column, values in found.items():
        info = METRICS[column.metric]
        value = float(values)
        assert math.isnan(value) or info.low - 1e-9 <= value <= info.high + 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_constant_and_non_finite_maps_are_invalid(name):
    images, maps = drawn(8)
    maps[0], maps[1, 0, 2, 2] = 3.0, torch.nan
    for values in values_of(name, images, maps).values():
        assert values[:2].isnan().all()


def test_all_metrics_run_together_in_the_engine_as_alone():
    direct = [probe_of(name) for name in NAMES if not probe_of(name).needs_annotation]
    x = fakes.images(5)

    def at_stage(stage, x, t):
        power = len(stage) if isinstance(stage, str) else stage % 5 + 1
        return fakes.brightness(x.flip(-1) ** power, t)

    twins = {"bright": at_stage}
    options = {"max_forward_batch": 4, "progress": False, "randomized": twins}
    rows = {"bright": fakes.Maps(fakes.brightness), "ones": fakes.ones()}
    together = evaluate(FakeBackbone(), rows, x, metrics=direct, **options)
    for probe in direct:
        alone = evaluate(FakeBackbone(), rows, x, metrics=[probe], **options)
        for column in probe.columns:
            for name in rows:
                a, b = (r.methods[name].values[column] for r in (alone, together))
                assert np.array_equal(a, b, equal_nan=True), column


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("insertion-deletion", {"step": 0.5}, "step: got 0.5; give a whole number, at least 1"),
        ("insertion-deletion", {"steps": None}, "steps: got None"),
        ("insertion-deletion", {"deletion_fill": "white"}, "deletion_fill: got 'white'; choose"),
        ("insertion-deletion", {"insertion_fill": "mean"}, "mean: None; insertion_fill='mean'"),
        ("pixel-flipping", {"per_step": 0}, "per_step: got 0"),
        ("pixel-flipping", {"fill": "white"}, "fill: got 'white'; choose one of"),
        ("irof", {"n_segments": 1}, "n_segments: got 1; give at least 2"),
        ("irof", {"compactness": 0.0}, "compactness: got 0.0"),
        ("irof", {"sigma": -1.0}, "sigma: got -1.0"),
        ("irof", {"fill": "mean"}, "mean: None; fill='mean' needs the mean colour"),
        ("monotonicity", {"samples": 0}, "samples: got 0"),
        ("infidelity", {"perturbation": "squares"}, "perturbation: got 'squares'; choose one of"),
        ("infidelity", {"sigma": 0.0}, "sigma: got 0.0"),
        ("infidelity", {"side": 1.5}, "side: got 1.5"),
        ("localization", {"tolerance": math.nan}, "tolerance: got nan"),
        ("localization", {"iou_threshold": 1.5}, "iou_threshold: got 1.5"),
        ("sensitivity", {"radius": 0.0}, "radius: got 0.0"),
        ("randomization", {"stages": 0}, "stages: got 0"),
        ("road", {"levels": (0.0, 0.5)}, "levels: got"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_metric(name, **options)


def test_ids_tell_options_apart():
    base = Protocol()
    one, two = (create_metric("insertion-deletion", mean=MEAN, steps=n) for n in (28, 56))
    column = Column("deletion")
    ids = {base.metric_id(*column, p.column_options(column)) for p in (one, two)}
    assert len(ids) == 2


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_runs_and_has_ids_of_its_own(name):
    protocol, probes = preset(name, MEAN)
    if name == "rise":
        probes = [create_metric("insertion-deletion", mean=MEAN, step=20)]
    rows = {"bright": fakes.Maps(fakes.brightness)}
    options = {"max_forward_batch": 4, "progress": False}
    results = evaluate(
        FakeBackbone(), rows, fakes.images(2), protocol=protocol, metrics=probes, **options
    )
    assert all(np.isfinite(row.mean) for row in results.rows())
    others = {
        row.protocol_id
        for row in evaluate(FakeBackbone(), rows, fakes.images(2), **options).rows()
        if row.metric in ("IC", "drop")
    }
    assert name == "opti-cam" or not others & {row.protocol_id for row in results.rows()}


def test_presets_that_need_the_mean_colour_say_so():
    with pytest.raises(ValueError, match="mean: got None, but preset 'rise'"):
        preset("rise")
    with pytest.raises(ValueError, match="did you mean ttame"):
        preset("t-tame")


# ---------------------------------------------------------------- refusals of the engine


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["localization"]}, "localization needs the positions of objects"),
        ({"metrics": ["localization"], "annotations": object()}, "tensors have none"),
        ({"metrics": ["randomization"]}, "needs maps from randomised networks"),
        ({"metrics": ["masking", "masking"]}, "AD@100, .* requested twice"),
        ({"metrics": ["masking"], "protocol": Protocol(score="logit")}, "score: AD, ADD and AG"),
        ({"metrics": []}, "metrics: got none"),
        ({"metrics": ["maskin"]}, "did you mean masking"),
        ({"again_limit": 0}, "again_limit: got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    rows = {"bright": fakes.Maps(fakes.brightness)}
    with pytest.raises(ValueError, match=message):
        evaluate(FakeBackbone(), rows, fakes.images(2), progress=False, **options)


def test_a_metric_that_fails_to_explain_again_is_named_and_the_rest_is_kept():
    class Once(fakes.Maps):
        def attribute(self, inputs, target):
            if len(inputs) != 4:
                raise RuntimeError("only four at a time")
            return super().attribute(inputs, target)

    rows = {"once": Once(fakes.brightness)}
    options = {"max_forward_batch": 4, "progress": False}
    results = evaluate(
        FakeBackbone(), rows, fakes.images(4), metrics=["masking", "adcc"], **options
    )
    method = results.methods["once"]
    assert np.isnan(method.values[Column("ADCC")]).all()
    assert np.isfinite(method.values[Column("AD", 0.5)]).all()
    assert method.failed[0] == "coherency: RuntimeError: only four at a time"
    assert any("once: metrics failed on 4 images" in w for w in results.warnings())


def test_scores_that_are_not_finite_are_counted_with_a_reason():
    class Overflows(FakeBackbone):
        def logits(self, images):
            logits = super().logits(images)
            return torch.where(images.mean((1, 2, 3))[:, None] < 0.02, torch.inf, logits)

    rows = {"bright": fakes.Maps(fakes.brightness)}
    options = {"max_forward_batch": 4, "progress": False, "protocol": Protocol(score="logit")}
    metrics = [create_metric("insertion-deletion", steps=5)]
    results = evaluate(Overflows(), rows, fakes.images(3), metrics=metrics, **options)
    row = next(r for r in results.rows() if r.metric == "deletion")
    assert (row.n, row.n_invalid) == (0, 3)
    assert results.methods["bright"].failed == dict.fromkeys(range(3), "non-finite score")
