"""LSSA and LSSAR: their equations, their limits, and rows on which they could fail."""

import math

import pytest
import torch
import torch.nn.functional as F

from xattn.attention import Inputs, create_attention, create_mechanism, record

HEADS, WIDTH = 2, 8
DIM = HEADS * WIDTH


def inputs(n=17, s=None, dtype=torch.float64, **more):
    generator = torch.Generator().manual_seed(n)
    q, k, v = (
        torch.randn(2, HEADS, tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        for tokens in (n, s or n, s or n)
    )
    return Inputs(q, k, v, **more)


def mechanism(name="lssar", **options):
    return create_mechanism(name, DIM, HEADS, **options)


def matrix(name, asked, **options):
    operator = mechanism(name, **options).operator(asked)
    return operator.rows(torch.arange(asked.q.shape[2]))


def published(asked, power=None, floor=0.0):
    """A, or W if there is a power, from the equations, row by row."""
    q, k = F.normalize(asked.q, dim=-1), F.normalize(asked.k, dim=-1)
    out = torch.zeros(*asked.q.shape[:3], k.shape[2], dtype=q.dtype)
    for i in range(q.shape[2]):
        n = i + 1 if asked.causal else k.shape[2]
        s = math.log(WIDTH) * math.log(n) * (q[:, :, i : i + 1] @ k[:, :, :n].transpose(-2, -1))
        a = torch.log1p(s.exp())
        a = a / (a.sum(-1, keepdim=True) + floor)
        if power is not None:
            offset = 0.0 if asked.causal and i < 3 else 1.0
            b = (n * a - offset).clamp_min(0) ** power
            a = b / (b.sum(-1, keepdim=True) + floor)
        out[:, :, i, :n] = a[:, :, 0]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("eps_style, floor", [("none", 0.0), ("reference", 1e-8)])
@pytest.mark.parametrize("n", [5, 31, 64])
@pytest.mark.parametrize("power", [None, 1, 3, 15])
def test_output_and_gradients_are_those_of_the_equations(n, power, eps_style, floor, causal):
    asked = inputs(n, causal=causal)
    leaves = [x.requires_grad_() for x in (asked.q, asked.k, asked.v)]
    own = {} if power is None else {"power": power}
    layer = mechanism("lssa" if power is None else "lssar", eps_style=eps_style, **own)
    found, expected = layer.attend(asked), published(asked, power, floor) @ asked.v
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9)
    for y, other in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(y, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("causal", [False, True])
def test_a_power_of_one_without_offset_is_lssa(causal):
    asked = inputs(causal=causal)
    plain = matrix("lssa", asked)
    assert torch.allclose(matrix("lssar", asked, power=1, offset=0.0), plain, rtol=0, atol=1e-14)
    assert (plain.sum(-1) - 1).abs().max() < 1e-12 and (plain >= 0).all()


@pytest.mark.parametrize("name", ["lssa", "lssar"])
def test_lengths_of_queries_and_keys_and_the_scale_change_nothing(name):
    asked = inputs()
    y = mechanism(name).attend(asked)
    other = asked.replace(q=asked.q * 7, k=asked.k / 3, scale=0.3)
    assert torch.allclose(mechanism(name).attend(other), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 17, 257])
def test_constant_rows_are_even(n, dtype):
    asked = inputs(n, dtype=dtype)
    asked = asked.replace(k=asked.k[:, :, :1].expand_as(asked.k))
    w = matrix("lssar", asked)
    assert torch.allclose(w, torch.full_like(w, 1 / n), rtol=1e-3)
    q = asked.q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(mechanism().attend(asked.replace(q=q)).sum(), q)
    assert grad.isfinite().all()


def test_the_floor_of_the_published_form_empties_constant_rows_and_damps_flat_ones():
    asked = inputs()
    same = asked.replace(k=asked.k[:, :, :1].expand_as(asked.k))
    assert (matrix("lssar", same, eps_style="reference").sum(-1) < 1e-6).all()
    near = asked.replace(k=asked.k[:, :, :1] + 0.2 * asked.k)
    damped = mechanism(eps_style="reference").operator(near)
    assert not damped.stochastic and (damped.row_sums() < 0.999).any()
    assert torch.allclose(matrix("lssar", near).sum(-1), torch.ones(2, HEADS, 17).double())


def test_one_token_and_the_first_causal_one_read_themselves():
    one = inputs(1)
    for name in ("lssa", "lssar"):
        assert torch.allclose(mechanism(name).attend(one), one.v)
        causal = inputs(9, causal=True)
        assert torch.allclose(mechanism(name).attend(causal)[:, :, 0], causal.v[:, :, 0])


def test_keys_that_are_cut_still_learn_through_the_mean():
    asked = inputs()
    k = asked.k.requires_grad_()
    cut = matrix("lssar", asked, power=3)[0, 0, 4] == 0
    y = mechanism(power=3).attend(asked)[0, 0, 4]
    (grad,) = torch.autograd.grad((y * torch.arange(WIDTH)).sum(), k)
    assert cut.any() and (grad[0, 0, cut].abs().sum(-1) > 0).all()


def test_small_weights_of_opposite_keys_are_exact_in_single_precision():
    q = torch.zeros(1, HEADS, 300, WIDTH)
    q[..., 0] = 1
    asked = Inputs(q, -q, torch.randn_like(q))
    a = matrix("lssa", asked)
    assert torch.allclose(a, torch.full_like(a, 1 / 300), rtol=1e-4)


def test_half_precision_is_computed_in_single():
    asked = inputs(65, dtype=torch.bfloat16)
    exact = asked.replace(q=asked.q.double(), k=asked.k.double(), v=asked.v.double())
    y = mechanism().attend(asked)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.double(), mechanism().attend(exact), rtol=0.01, atol=0.01)
    assert mechanism().operator(asked).rows(torch.tensor([0])).dtype == torch.float32


@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_values_that_are_no_numbers_pass_through(place):
    asked = inputs()
    broken = getattr(asked, place).clone()
    broken[0, 0, 3] = torch.nan
    y = mechanism().attend(asked.replace(**{place: broken}))
    assert y[0, 0, 3].isnan().any() and y[1].isfinite().all()


@pytest.mark.parametrize("prefix", [0, 2])
def test_maps_are_multiples_of_the_mean(prefix):
    layer = create_attention("lssar", DIM, HEADS)
    with record() as calls, torch.no_grad():
        layer(torch.randn(2, prefix + 15, DIM), (3, 5), prefix)
    maps, w = calls[0].maps, calls[0].operator.rows(torch.arange(prefix + 15))
    assert torch.allclose(
        maps["received"], w.sum(2).mean(1)[:, None, prefix:].unflatten(-1, (3, 5)), atol=1e-5
    )
    assert ("first" in maps) == (prefix > 0)
    if prefix:
        expected = (prefix + 15) * w[:, :, 0, prefix:].unflatten(-1, (3, 5))
        assert torch.allclose(maps["first"], expected, atol=1e-4)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("lssar", {"power": 0}, "power: got 0; give a whole number of at least 1"),
        ("lssar", {"offset": 1.5}, "offset: got 1.5; give a share of the mean from 0 to 1"),
        ("lssa", {"eps_style": "some"}, "eps_style: got 'some'; choose one of none, reference"),
    ],
)
def test_what_does_not_fit_is_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        mechanism(name, **options)


def test_heads_of_one_channel_are_refused():
    with pytest.raises(ValueError, match="num_heads: got 4 for dim 4; give heads of at least 2"):
        create_mechanism("lssa", 4, 4)
