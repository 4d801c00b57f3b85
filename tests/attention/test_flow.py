"""Flow-Attention: its matrix, its two forms, and the sums that are conserved."""

import math

import pytest
import torch

from xattn.attention import Inputs, create_mechanism, record
from xattn.kernels.flows.causal import CHUNK

HEADS, WIDTH = 2, 6
OPTIONS = [{}, {"clamp": None}, {"eps_style": "vision", "clamp": (-0.5, 1.05)}]
SHAPES = [(0, (1,)), (1, (5, 6)), (2, (3, 7)), (5, (9, 9))]


def inputs(n, s=None, size=1.0, **more):
    generator = torch.Generator().manual_seed(0)

    def normal(tokens):
        x = torch.randn(2, HEADS, tokens, WIDTH, generator=generator, dtype=torch.float64)
        return (size * x).requires_grad_()

    return Inputs(normal(n), normal(s or n), normal(s or n), **more)


def flow(**options):
    return create_mechanism("flow", HEADS * WIDTH, HEADS, **options)


def defined(asked, clamp=(-1.0, 1.0), eps_style="core"):
    """A from the equations, with sums over masks."""
    q, k = asked.q.sigmoid(), asked.k.sigmoid()
    n, s = q.shape[2], k.shape[2]
    e, added = 1e-6, 1e-6 if eps_style == "vision" else 0.0
    seen = torch.ones(n, s).double().tril() if asked.causal else torch.ones(n, s).double()
    # each token sums over those that it has seen, of the other kind
    into, out = seen, seen if asked.causal else seen.T

    def count(m):
        return torch.arange(1, m + 1).double() if asked.causal else torch.ones(m).double()

    def total(x, y, weights, mask):
        return ((x + e) * (mask @ (weights[..., None] * y) + e)).sum(-1) + added

    ones_q, ones_k = torch.ones_like(q[..., 0]), torch.ones_like(k[..., 0])
    incoming, outgoing = total(q, k, ones_k, into), total(k, q, ones_q, out)
    refined = total(q, k, count(s) / outgoing, into) / count(n)
    conserved = total(k, q, count(n) / incoming, out) / count(s)
    conserved = conserved if clamp is None else conserved.clamp(*clamp)
    if asked.causal:
        each = conserved.exp()
        competition = count(s) * each / (seen @ each[..., None])[..., 0]
        allocation = refined.sigmoid()
    else:
        competition = s * conserved.softmax(-1)
        allocation = (refined * n / s).sigmoid()
    left = (allocation / incoming)[..., None] * q
    return seen * (left @ (k * competition[..., None]).transpose(-2, -1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=["core", "unclamped", "vision"])
@pytest.mark.parametrize("prefix, grid", SHAPES)
def test_it_is_what_its_equations_say(prefix, grid, options, causal):
    asked = inputs(prefix + math.prod(grid), grid=grid, prefix=prefix, causal=causal)
    layer = flow(**options)
    a, y = defined(asked, **options), layer.attend(asked)
    assert torch.allclose(y, a @ asked.v, atol=1e-6)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    leaves = asked.q, asked.k, asked.v
    expected, found = torch.autograd.grad(a @ asked.v, leaves, g), torch.autograd.grad(y, leaves, g)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(expected, found, strict=True))


@pytest.mark.parametrize("n, s", [(5, 40), (40, 5)])
def test_queries_may_read_keys_of_other_tokens(n, s):
    asked = inputs(n, s, grid=(5, 8) if n == 40 else None)
    layer = flow()
    operator = layer.operator(asked)
    assert torch.allclose(layer.attend(asked), defined(asked) @ asked.v, atol=1e-6)
    shares = operator.context
    assert torch.allclose(shares.competition.sum(-1), torch.full((2, HEADS), float(s)).double())
    assert layer.maps(operator, asked) == {}


def test_about_half_of_the_keys_are_clamped_and_the_operator_says_so():
    asked = inputs(196)
    operator = flow().operator(asked)
    share = operator.logged["saturation"]
    assert 0.3 < share < 0.7 and not share.requires_grad
    assert flow(clamp=None).operator(asked).logged["saturation"] == 0
    wide = flow(clamp=(-1.0, 4.0)).operator(asked)
    assert wide.logged["saturation"] == 0
    with record() as calls:
        flow().attend(asked)
    assert calls[0].operator.logged["saturation"] == share


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_maps_show_what_patches_win_take_and_receive(prefix):
    asked = inputs(prefix + 30, grid=(5, 6), prefix=prefix)
    layer = flow()
    operator = layer.operator(asked)
    maps = layer.maps(operator, asked)
    assert maps["competition"].shape == maps["allocation"].shape == (2, HEADS, 5, 6)
    assert ((maps["allocation"] > 0) & (maps["allocation"] < 1)).all()
    a = defined(asked)
    received = a.sum(2).mean(1)[:, prefix:].unflatten(-1, (5, 6))
    assert torch.allclose(maps["received"][:, 0], received, atol=1e-6)
    if not prefix:
        assert torch.allclose(maps["competition"].mean((-2, -1)), torch.ones(2, HEADS).double())


def test_keys_that_are_not_numbers_do_not_reach_tokens_of_earlier_chunks():
    asked = inputs(70, causal=True)
    k = asked.k.detach().clone()
    k[:, :, 50] = torch.nan
    y = flow().attend(asked.replace(k=k))
    assert y[:, :, :CHUNK].isfinite().all() and y[:, :, 50:].isnan().all()
    assert flow().attend(asked.replace(k=k, causal=False)).isnan().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"clamp": (1.0, -1.0)}, "clamp: got"),
        ({"eps_style": "both"}, "eps_style: got 'both'"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        flow(**options)
