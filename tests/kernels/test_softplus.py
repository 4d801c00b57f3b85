"""Softplus attention with l1 norms: the definition, and that the fast paths equal it."""

import math

import pytest
import torch
import torch.nn.functional as F

from xattn.kernels.backend import HAS_TRITON
from xattn.kernels.softplus import softplus_attention

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))
FORMS = [
    {"power": 15, "offset": 1.0},
    {},
    {"power": 3, "offset": 1.0, "causal": True},
    {"power": 2, "offset": 0.5, "eps": 1e-3, "causal": True},
    {"eps": 1e-2},
    {"power": 1, "offset": 1.0, "eps": 1e-3},
]


def inputs(n=37, s=None, d=8, dv=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k = (F.normalize(normal(1, 1, tokens, d), dim=-1) for tokens in (n, s or n))
    return q, k, normal(1, 1, s or n, dv or d), normal(1, 1, n, dv or d)


def run(backend, dtype, given, **options):
    q, k, v, g = given
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [q.to(wide), k.to(wide), v.to(dtype)]
    leaves = [x.clone().requires_grad_() for x in leaves]
    y = softplus_attention(*leaves, scale=math.log(8), backend=backend, **options)
    assert y.dtype == dtype
    return [y.detach(), *torch.autograd.grad(y, leaves, g.to(dtype))]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_the_definition_has_right_gradients(options):
    leaves = [x.requires_grad_() for x in inputs(7, d=3)[:3]]
    for backend in ("reference", "cpu"):
        assert torch.autograd.gradcheck(
            lambda *x, backend=backend: softplus_attention(
                *x, scale=1.0, backend=backend, **options
            ),
            leaves,
            fast_mode=True,
        )


@pytest.mark.parametrize("backend", ["cpu", TRITON])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_fast_paths_equal_the_float64_reference(backend, options):
    others = None if options.get("causal", False) else 45
    shapes = [inputs(33, others, 24, 20)]
    if backend == "cpu":  # the interpreter is slow
        shapes += [inputs(37), inputs(1, d=16)]
    for given in shapes:
        exact = run("reference", torch.float64, given, **options)
        found = run(backend, torch.float32, given, **options)
        for value, true in zip(found, exact, strict=True):
            assert torch.allclose(value.double(), true, atol=1e-5 * max(1, float(true.abs().max())))


@pytest.mark.parametrize("backend", ["reference", "cpu", TRITON])
def test_many_tiles_of_rows_and_equal_keys(backend, monkeypatch):
    from xattn.kernels.softplus import cpu

    monkeypatch.setattr(cpu, "TILE", 250)
    given = inputs(35, d=16, dtype=torch.float32)
    exact = run("reference", torch.float64, given, power=15, offset=1.0)
    found = run(backend, torch.float32, given, power=15, offset=1.0)
    assert torch.allclose(found[0].double(), exact[0], atol=1e-5)
    assert torch.allclose(found[2].double(), exact[2], atol=1e-4 * float(exact[2].abs().max()))
    q, k, v, g = given
    same = run(backend, torch.float32, (q, k[:, :, :1].expand_as(k), v, g), power=15, offset=1.0)
    assert torch.allclose(same[0], v.mean(2, keepdim=True).expand_as(v), atol=1e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"power": 0}, "power: got 0; give at least 1"),
        ({"offset": 2.0}, "offset, eps: got 2.0, 0.0"),
        ({"causal": True}, "causal: got 5 queries and 6 keys"),
        ({"backend": "gpu"}, "backend: got 'gpu'"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    q, k, v, _ = inputs(5, 6)
    with pytest.raises(ValueError, match=message):
        softplus_attention(q, k, v, scale=1.0, **change)


def test_queries_of_half_precision_and_grouped_keys_are_refused():
    q, k, v, _ = (x.repeat(1, 2, 1, 1) for x in inputs(5))
    with pytest.raises(ValueError, match=r"q: got torch.float16; give float32 or float64"):
        softplus_attention(q.half(), k.half(), v.half(), scale=1.0)
    with pytest.raises(ValueError, match="k: got 1 heads for 2"):
        softplus_attention(q, k[:, :1], v[:, :1], scale=1.0)
