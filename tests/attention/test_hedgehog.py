"""Hedgehog: its feature maps, its two forms, and the limits in which its matrix is known."""

import pytest
import torch

from xattn.attention import (
    CausalLowRankOperator,
    Inputs,
    LowRankOperator,
    SoftmaxOperator,
    create_mechanism,
)
from xattn.attention.statistics import compare_rows, mean_row_divergence, row_divergence

FEATURES = ["exp", "softmax", "joint", "elu"]
LEARNED = ["exp", "softmax", "joint"]
MAPS = [(feature, {"bias": bias, "width": 5}) for feature in LEARNED for bias in (False, True)]
HEADS, WIDTH = 3, 8


def made(feature="exp", random=True, **options):
    torch.manual_seed(0)
    layer = create_mechanism("hedgehog", HEADS * WIDTH, HEADS, feature=feature, **options).double()
    for parameter in layer.parameters():
        if random:
            parameter.data.normal_()
    return layer


def inputs(n=37, s=None, heads=HEADS, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(heads, tokens):
        return torch.randn(2, heads, tokens, WIDTH, generator=generator, dtype=torch.float64)

    return normal(HEADS, n), normal(heads, s or n), normal(heads, s or n)


def quadratic(layer, q, k, causal=False):
    """A by its definition, from plain feature maps."""

    def phi(x, name):
        if layer.feature == "elu":
            return torch.nn.functional.elu(x) + 1
        u = x @ getattr(layer, f"{name}_map")
        bias = getattr(layer, f"{name}_bias")
        u = u if bias is None else u + bias
        if layer.feature == "exp":
            return torch.cat([u.exp(), (-u).exp()], -1)
        if layer.feature == "softmax":
            return torch.cat([u.softmax(-1), (-u).softmax(-1)], -1)
        return torch.cat([2 * u, -2 * u], -1).softmax(-1)

    a = phi(q, "q") @ phi(k, "k").transpose(-2, -1)
    a = a.tril() if causal else a
    return a / a.sum(-1, keepdim=True)


@pytest.mark.parametrize("feature, options", [("elu", {}), *MAPS])
@pytest.mark.parametrize("causal", [False, True])
def test_the_linear_form_is_the_quadratic_one(feature, options, causal):
    layer = made(feature, **options)
    q, k, v = inputs()
    a = quadratic(layer, q, k, causal)
    assert torch.allclose(layer(q, k, v, causal=causal), a @ v)
    operator = layer.operator(Inputs(q, k, v, causal=causal))
    assert type(operator) is (CausalLowRankOperator if causal else LowRankOperator)
    assert torch.allclose(operator.rows(torch.arange(37)), a)
    assert torch.allclose(operator.row_sums(), torch.ones(()).double())


@pytest.mark.parametrize("feature", LEARNED)
def test_it_starts_as_the_identity_with_separate_weights_for_queries_keys_and_heads(feature):
    layer = made(feature, random=False)
    assert torch.equal(layer.q_map, torch.eye(WIDTH).double().expand(HEADS, -1, -1))
    assert torch.equal(layer.q_map, layer.k_map) and layer.q_bias is None
    q, k, v = inputs()
    before = layer(q, k, v)
    layer.k_map.data[1] *= 2
    changed = (layer(q, k, v) != before).flatten(2).any(-1).all(0)
    assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize("feature", FEATURES)
def test_no_row_is_empty_however_large_the_scores(feature):
    layer = made(feature, random=False).float()
    q, k, v = (x.float() for x in inputs())
    operator = layer.operator(Inputs(300 * q, 300 * k, v))
    rows = operator.rows(torch.arange(37))
    assert torch.allclose(rows.sum(-1), torch.ones(()), atol=1e-4) and rows.isfinite().all()


def test_large_scores_pick_the_nearest_key():
    layer = made("exp", random=False)
    q, k, _ = inputs()
    nearest = torch.cat([q[..., None, :] + k[:, :, None], -q[..., None, :] - k[:, :, None]], -1)
    rows = layer.operator(Inputs(500 * q, 500 * k, k)).rows(torch.arange(37))
    assert torch.equal(rows.argmax(-1), nearest.amax(-1).argmax(-1))


def test_what_patches_receive_sums_to_the_queries_without_a_prefix():
    layer = made()
    q, k, v = inputs(30)
    asked = Inputs(q, k, v, grid=(5, 6))
    received = layer.maps(layer.operator(asked), asked)["received"]
    assert received.shape == (2, 1, 5, 6)
    assert torch.allclose(received.sum((-2, -1)), torch.tensor(30.0).double())
    few = Inputs(q, k[:, :, :20], v[:, :, :20], grid=(5, 6))
    assert layer.maps(layer.operator(few), few) == {}


def test_another_scale_acts_on_the_queries():
    layer = made()
    q, k, v = inputs()
    assert torch.allclose(layer(q, k, v, scale=1.0), layer(q * WIDTH**0.5, k, v))


@pytest.mark.parametrize("feature", LEARNED)
def test_it_learns_softmax_rows_that_elu_cannot_give(feature):
    q, k, v = inputs(24)
    teacher = SoftmaxOperator(3 * q, k)
    target, every = teacher.rows(torch.arange(24)), torch.arange(24)
    layer = made(feature, random=False)
    steps = torch.optim.Adam(layer.parameters(), lr=3e-2)
    for _ in range(60):
        loss = row_divergence(target, layer.operator(Inputs(q, k, v)).rows(every)).mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
    control = made("elu").operator(Inputs(q, k, v))
    assert loss < 0.5 * mean_row_divergence(teacher, control).mean()
    own = compare_rows(teacher, layer.operator(Inputs(q, k, v)))
    series = create_mechanism("based", HEADS * WIDTH, HEADS, form="taylor", width=None)
    for other in (control, series.operator(Inputs(3 * q, k, v))):
        found = compare_rows(teacher, other)
        if other is control or feature == "exp":
            assert own.divergence.mean() < found.divergence.mean()
        gaps = [(x.entropy - x.softmax_entropy).abs().mean() for x in (own, found)]
        assert gaps[0] < gaps[1] and own.order.mean() > found.order.mean()


def test_features_count_as_work():
    q, k, v = inputs(37, 20)
    operator = made(width=5).operator(Inputs(q, k, v))
    assert operator.selection == 5 * (37 + 20) / 2  # as products of half of a pair each
    assert made("elu").operator(Inputs(q, k, v)).selection == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"feature": "relu"}, "feature: got 'relu'; choose one of exp, softmax, joint, elu"),
        ({"width": 0}, "width: got 0"),
        ({"feature": "elu", "bias": True}, "width, bias: the feature map 'elu' has neither"),
        ({"featur": "exp"}, "hedgehog does not take that option .*; did you mean feature"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_mechanism("hedgehog", 24, 3, **options)
