"""Calibrated attention: the closed form is the masked sum, and what sinks lose goes to the others."""

import pytest
import torch
import torch.nn.functional as F

from xattn.attention import Inputs, SoftmaxOperator, create_attention, create_mechanism, record
from xattn.attention.operators.algebra import SumOperator

HEADS, WIDTH = 2, 8


def inputs(n, prefix=0, sink=None, pull=3.0, causal=False, grad=False):
    """Random queries and keys; key ``sink`` lies along the mean direction of the queries."""
    generator = torch.Generator().manual_seed(n)
    q, k, v = torch.randn(3, 2, HEADS, n, WIDTH, generator=generator, dtype=torch.float64)
    q[..., 0] += 4
    for j in [] if sink is None else sink:
        k[:, :, j] = 0
        k[:, :, j, 0] = pull
    q, k, v = (x.requires_grad_(grad) for x in (q, k, v))
    return Inputs(q, k, v, prefix=prefix, causal=causal)


def act(**options):
    return create_mechanism("act", HEADS * WIDTH, HEADS, **options).double()


def naive(asked, alpha, beta, heads=range(HEADS)):
    """From the equations, with N x N matrices."""
    scores = asked.scale * asked.q @ asked.k.transpose(-2, -1)
    n = scores.shape[-1]
    if asked.causal:
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    p = scores.softmax(-1)
    seen = torch.arange(n, 0, -1) if asked.causal else torch.full((n,), n)
    a = p.detach().sum(2) / seen
    out = p.clone()
    for b in range(p.shape[0]):
        for h in heads:
            sinks = [j for j in range(n) if a[b, h, j] > alpha / n and j >= asked.prefix]
            sinks = sinks if asked.prefix else sinks[1:]
            m = p[b, h][:, sinks].sum(-1, keepdim=True)
            row = p[b, h] * (1 - beta * m) / (1 - m)
            row[:, sinks] = beta * p[b, h][:, sinks]
            out[b, h] = row
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("n, prefix", [(7, 0), (30, 1), (41, 5)])
def test_it_is_the_masked_sum_of_its_equations_with_the_same_gradients(n, prefix, beta, causal):
    asked = inputs(n, prefix, sink=(3, n - 3), causal=causal, grad=True)
    layer, leaves = act(alpha=1.5, beta=beta), (asked.q, asked.k, asked.v)
    operator = layer.operator(asked)
    assert operator.context[1].any()
    expected = naive(asked, 1.5, beta)
    assert torch.allclose(operator.rows(torch.arange(n)), expected, rtol=0, atol=1e-10)
    y, wanted = operator.matvec(asked.v), expected @ asked.v
    assert torch.allclose(y, wanted, rtol=0, atol=1e-10)
    found = torch.autograd.grad(y.square().sum(), leaves)
    right = torch.autograd.grad(wanted.square().sum(), leaves)
    for ours, theirs in zip(found, right, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_rows_with_nearly_all_attention_on_sinks_stay_exact():
    asked = inputs(20, 1, sink=(5,), pull=12.0)
    operator = act(alpha=1.5).operator(asked)
    assert isinstance(operator, SumOperator) and len(operator.terms) == 3
    single = asked.replace(q=asked.q.float(), k=asked.k.float(), v=asked.v.float())
    y = act(alpha=1.5).float().operator(single).matvec(single.v)
    assert torch.allclose(y.double(), naive(asked, 1.5, 0.4) @ asked.v, atol=1e-4)


@pytest.mark.parametrize("options", [{"beta": 1.0, "alpha": 1.2}, {"alpha": 29.0}, {"heads": ()}])
def test_nothing_to_damp_is_softmax_attention(options):
    asked = inputs(30, sink=(4,))
    operator = act(**options).operator(asked)
    assert isinstance(operator, SoftmaxOperator)
    expected = F.scaled_dot_product_attention(asked.q, asked.k, asked.v)
    assert torch.allclose(operator.matvec(asked.v), expected)


def test_no_weight_on_sinks_is_attention_without_them():
    asked = inputs(30, 1, sink=(4, 9))
    operator = act(alpha=1.5, beta=0.0).operator(asked)
    sinks = operator.context[1]
    bias = torch.zeros(2, HEADS, 1, 30).double().masked_fill(sinks[:, :, None], -torch.inf)
    expected = F.scaled_dot_product_attention(asked.q, asked.k, asked.v, bias)
    assert operator.hides and torch.allclose(operator.matvec(asked.v), expected)


def test_only_the_heads_that_are_named_change():
    asked = inputs(30, 1, sink=(4,))
    a = act(alpha=1.5, heads=(1,)).operator(asked).rows(torch.arange(30))
    assert torch.allclose(a, naive(asked, 1.5, 0.4, heads=(1,)), atol=1e-10)


def test_without_prefix_the_first_sink_is_left_alone():
    layer = act(alpha=1.5)
    received = torch.tensor([0.01, 0.4, 0.01, 0.4, 0.18]).expand(1, HEADS, 5)
    assert layer.sinks(received, 0)[0, 0].tolist() == [False, False, False, True, False]
    assert layer.sinks(received, 2)[0, 0].tolist() == [False, False, False, True, False]
    assert layer.sinks(received, 1)[0, 0].tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
def test_a_strided_mass_is_the_mean_over_its_queries(prefix, causal):
    asked = inputs(23, prefix, causal=causal)
    softmax = SoftmaxOperator(asked.q, asked.k, causal=causal)
    found = act(stride=4).received_attention(softmax, asked)
    at = [*range(prefix), *range(prefix, 23, 4)]
    rows = softmax.rows(torch.tensor(at))
    seen = torch.tensor([sum(i >= j for i in at) if causal else len(at) for j in range(23)])
    assert torch.allclose(found, rows.sum(2) / seen.clamp_min(1))


def test_every_query_finds_all_sinks_and_a_strided_mass_the_strong_ones():
    asked = inputs(64, 1, sink=(7, 30))
    assert act(alpha=3.0).sink_recall(asked)[0] == act(alpha=3.0).sink_recall(asked)[1] > 0
    found, there = act(alpha=3.0, stride=8).sink_recall(asked)
    assert 0 < found <= there


@pytest.mark.parametrize("n", [1, 2])
def test_few_tokens_equal_keys_and_nan_keys_do_not_fail(n):
    asked = inputs(n)
    expected = F.scaled_dot_product_attention(asked.q, asked.k, asked.v)
    assert torch.allclose(act(alpha=5.0).attend(asked), expected)
    same = inputs(9)
    same = same.replace(k=same.k[:, :, :1].expand(-1, -1, 9, -1))
    assert act().attend(same).isfinite().all()
    assert act().attend(same.replace(k=same.k * torch.nan)).isnan().all()


def test_its_maps_show_what_was_received_and_what_is_left():
    layer = create_attention("act", HEADS * WIDTH, HEADS, alpha=1.1)
    with record() as calls:
        layer(torch.randn(1, 1 + 15, HEADS * WIDTH), (3, 5), 1)
    maps = calls[0].maps
    assert maps["received"].shape == maps["sinks"].shape == (1, HEADS, 3, 5)
    sinks = maps["sinks"].bool()
    assert sinks.any() and (maps["received"][sinks] > 1.1).all()
    plain = maps["received"].mean(1)
    assert maps["calibrated"].shape == (1, 1, 3, 5)
    assert (maps["calibrated"][:, 0] < plain)[sinks.all(1)].all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": 0.0}, "alpha: got 0.0; give a positive number"),
        ({"beta": 1.5}, "beta: got 1.5; give a share from 0 to 1"),
        ({"stride": 0}, "stride: got 0; give a whole number of at least 1"),
        ({"heads": (2,)}, "heads: got 2; give numbers from 0 to 1"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        act(**options)
