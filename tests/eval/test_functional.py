"""Masks and metric formulas against definitions and limit cases (heads.md 1.2, 1.4 and 14)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xattn.eval import functional as f
from xattn.eval import metrics as classes

T = torch.tensor
PAIRS = [
    (f.average_drop, classes.AverageDrop),
    (f.increase_in_confidence, classes.IncreaseInConfidence),
    (f.average_drop_in_deletion, classes.AverageDropInDeletion),
    (f.average_gain, classes.AverageGain),
]


def draw(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator), torch.rand(n, generator=generator)


# ---------------------------------------------------------------- formulas


def test_values_of_the_specification():
    assert f.average_drop(T([0.8]), T([0.6])).item() == pytest.approx(25)
    assert f.increase_in_confidence(T([0.8]), T([0.6])).item() == 0
    assert f.average_drop(T([0.8]), T([0.9])).item() == 0
    assert f.increase_in_confidence(T([0.8]), T([0.9])).item() == 100
    assert f.average_gain(T([0.8]), T([0.9])).item() == pytest.approx(50)
    assert f.average_drop_in_deletion(T([0.8]), T([0.2])).item() == pytest.approx(75)
    assert f.average_drop_in_deletion(T([0.4]), T([0.6])).item() == pytest.approx(-50)


def test_rounding_is_no_increase_and_the_margin_is_the_protocols():
    p = T([0.5], dtype=torch.float64)
    assert f.increase_in_confidence(p, p * (1 + 0.9e-6)).item() == 0
    assert f.increase_in_confidence(p, p * (1 + 1.1e-6)).item() == 100
    assert f.increase_in_confidence(p, p * (1 + 0.9e-6), margin=0.0).item() == 100


@settings(max_examples=200)
@given(st.floats(0, 1), st.floats(0, 1))
def test_drop_and_gain_exclude_each_other(p, q):
    p, q = T([p], dtype=torch.float64), T([q], dtype=torch.float64)
    drop, gain = f.average_drop_values(p, q).item(), f.average_gain_values(p, q).item()
    increase = f.increase_in_confidence_values(p, q).item()
    assert 0 <= drop <= 100 and 0 <= gain <= 100 + 1e-9
    assert drop == 0 or gain == 0
    if abs(p - q) > 1e-5 * max(p, q) and p < 1:
        assert (increase == 100) == (gain > 0)
    if increase:
        assert drop == 0


def test_probability_zero_and_one_are_guarded():
    zero, one = T([0.0]), T([1.0])
    assert f.average_drop(zero, zero).item() == 0
    assert f.average_drop_in_deletion(zero, T([0.5])).item() == 0
    assert f.average_gain(one, one).item() == 0
    assert f.increase_in_confidence(one, one).item() == 0
    assert f.average_drop(T([1.0000004]), one).item() == 0  # float32 softmax


def test_nan_and_invalid_maps_leave_the_mean_and_are_counted():
    p, q = T([0.8, 0.8, 0.8, float("nan")]), T([0.6, float("nan"), 0.0, 0.5])
    valid = T([True, True, False, True])
    for function, cls in PAIRS:
        metric = cls()
        metric.update(p, q, valid=valid)
        assert (metric.n.item(), metric.n_invalid.item()) == (1, 3)
        assert metric.compute() == function(p[:1], q[:1]) == function(p, q, valid)
        assert math.isnan(function(p[3:], q[3:]))


@pytest.mark.parametrize(
    ("p", "q", "said"),
    [
        (T([3.0]), T([0.5]), "p: values"),
        (T([0.3]), T([-0.5]), "q: values"),
        (T([0.3, 0.2]), T([0.5]), "shapes"),
    ],
)
def test_logits_and_unequal_lengths_are_refused(p, q, said):
    with pytest.raises(ValueError, match=said):
        f.average_drop(p, q)


def test_valid_has_to_be_bool_per_image():
    with pytest.raises(ValueError, match="valid"):
        f.average_drop(T([0.5]), T([0.5]), T([1]))


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize(("function", "cls"), PAIRS, ids=lambda v: v.__name__)
def test_class_equals_function_and_halves_add_up(function, cls):
    p, q = draw(41)
    valid = torch.arange(41) % 7 != 3
    whole, left, right = cls(), cls(), cls()
    whole.update(p, q, valid=valid)
    left.update(p[:13], q[:13], valid=valid[:13])
    right.update(p[13:], q[13:], valid=valid[13:])
    assert whole.compute() == function(p, q, valid)
    assert whole.total.dtype == torch.float64
    merged = cls()
    for part in (left, right):  # what a sum over two processes does
        for state in ("total", "n", "n_invalid"):
            assert part._reductions[state] is not None
            setattr(merged, state, getattr(merged, state) + getattr(part, state))
    merged._update_count = 2
    assert merged.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)
    assert (merged.n, merged.n_invalid) == (whole.n, whole.n_invalid)


def test_margin_reaches_the_class():
    metric = classes.IncreaseInConfidence(margin=0.5)
    metric.update(T([0.5]), T([0.9]))
    assert metric.compute() == 0


# ---------------------------------------------------------------- masks


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_minmax_fills_the_unit_range_at_any_scale():
    for scale, shift in ((1, 0), (1e-30, 0), (1e30, 0), (1, 100), (-3, 2)):
        scaled, valid = f.minmax(maps(3, 1, 5, 7) * scale + shift)
        assert valid.all()
        assert (scaled.amin((1, 2, 3)) == 0).all() and (scaled.amax((1, 2, 3)) == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_constant_and_non_finite_maps_are_invalid(bad):
    x = maps(4, 1, 3, 5)
    x[1] = 0.7
    x[2, 0, 1, 1] = bad
    scaled, valid = f.minmax(x)
    assert valid.tolist() == [True, False, False, True]
    assert (scaled[1:3] == 0).all() and scaled.isfinite().all()
    assert not f.minmax(torch.zeros(1, 1, 4, 4))[1]
    assert not f.minmax(1 + 1e-8 * maps(1, 1, 4, 4).double())[1], "rounding is no map"


def test_minmax_comes_before_resizing_and_the_other_order_is_another_protocol():
    x = maps(2, 1, 3, 3)
    grey, valid = f.saliency(x, (9, 13))
    assert grey.shape == (2, 1, 9, 13) and valid.all()
    low = f.minmax(x)[0]
    torch.testing.assert_close(
        grey, torch.nn.functional.interpolate(low, (9, 13), mode="bilinear", align_corners=False)
    )
    after, _ = f.saliency(x, (8, 12), normalization="minmax_upsampled")
    before, _ = f.saliency(x, (8, 12))
    assert after.max() == 1 and before.max() < 1


def test_all_ones_is_a_mask_and_stays_exactly_one():
    for size in ((224, 224), (17, 23), (1, 1)):
        grey, valid = f.saliency(torch.ones(1, 1, 7, 7), size, is_mask=True)
        assert (grey == 1).all() and valid.all()
    with pytest.raises(ValueError, match="mask"):
        f.saliency(2 * torch.ones(1, 1, 7, 7), (9, 9), is_mask=True)
    with pytest.raises(ValueError, match="mask"):
        f.saliency(torch.full((1, 1, 7, 7), torch.nan), (9, 9), is_mask=True)


@pytest.mark.parametrize("q", [0.0, 0.15, 0.5, 0.85, 1.0])
def test_quantile_interpolates_linearly(q):
    x = maps(3, 1, 7, 11).flatten(1)
    expected = np.quantile(x.double().numpy(), q, axis=1)
    np.testing.assert_allclose(f.quantile(x, q).numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("level", [1.0, 0.5, 0.15])
def test_threshold_keeps_the_largest_with_their_grey_level(level):
    x = f.minmax(maps(2, 1, 9, 11))[0]
    kept = f.threshold_mask(x, level)
    flat = x.flatten(1).double()
    limit = torch.quantile(flat, 1 - level, dim=1)[:, None]
    expected = torch.where(flat >= limit - 1e-7, flat, 0.0)
    torch.testing.assert_close(kept.flatten(1).double(), expected, rtol=0, atol=0)


def test_ties_keep_everything_by_quantile_and_exactly_the_share_by_kth():
    x = torch.full((1, 1, 10, 10), 0.3)
    assert torch.equal(f.threshold_mask(x, 0.15), x)
    assert (f.threshold_mask(x, 0.15, "kth") > 0).sum() == 15
    sparse = torch.zeros(1, 1, 10, 10)
    sparse[..., 0, :5] = 1
    assert torch.equal(f.threshold_mask(sparse, 0.5), sparse)
    odd = torch.rand(1, 1, 3, 7) + 0.1
    assert (f.threshold_mask(odd, 0.5, "kth") > 0).sum() == 11


def test_a_batch_equals_a_loop_over_its_images():
    x = maps(5, 1, 4, 6)
    x[2] = 1.0
    grey, valid = f.saliency(x, (19, 23))
    kept = f.threshold_mask(grey, 0.15)
    for i in range(5):
        one, ok = f.saliency(x[i : i + 1], (19, 23))
        assert torch.equal(one[0], grey[i]) and ok.item() == valid[i]
        assert torch.equal(f.threshold_mask(one, 0.15)[0], kept[i])


@pytest.mark.parametrize(
    "call",
    [
        lambda: f.minmax(torch.zeros(3, 4, 4)),
        lambda: f.minmax(torch.zeros(1, 3, 4, 4)),
        lambda: f.threshold_mask(torch.zeros(1, 1, 4, 4), 0.0),
        lambda: f.threshold_mask(torch.zeros(1, 1, 4, 4), 0.5, "median"),
        lambda: f.saliency(torch.zeros(1, 1, 4, 4), (8, 8), normalization="softmax"),
    ],
)
def test_wrong_arguments_are_named(call):
    with pytest.raises(ValueError, match=r"^\w+: got"):
        call()
