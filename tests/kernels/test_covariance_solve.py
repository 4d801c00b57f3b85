"""Solves with every query's covariance, and local linear attention by their solutions: the fast paths."""

import pytest
import torch

from xattn.kernels.backend import HAS_TRITON
from xattn.kernels.covariance_solve import covariance_solve, rows
from xattn.kernels.local_linear import local_linear
from xattn.kernels.softmax import softmax_attention

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))
FAST = ["cpu", TRITON]
NAMES = ("q", "k", "v", "features", "lse", "mean", "right", "ridge")


def inputs(n, s, d, dv, f, causal=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v, features = (
        normal(1, 2, n, d),
        normal(1, 2, s, d),
        normal(1, 2, s, dv),
        normal(1, 2, s, f),
    )
    mean, lse = softmax_attention(q, k, features, causal=causal, backend="reference")
    right, ridge = normal(1, 2, n, f), 0.5 + torch.rand(1, 2, n, generator=generator).double()
    made = (q, k, v, features, lse, mean, right, ridge)
    return {name: x.to(dtype) for name, x in zip(NAMES, made, strict=True)}


def solve(given, backend, causal=False, **options):
    chosen = {name: given[name] for name in NAMES if name != "v"}
    return covariance_solve(**chosen, causal=causal, backend=backend, **options)


def weigh(given, slope, backend, causal=False):
    chosen = {name: given[name] for name in NAMES if name not in ("right", "ridge")}
    return local_linear(**chosen, slope=slope, causal=causal, backend=backend)


def run(given, backend, causal):
    """Both results, and the gradients of a fixed sum, by name."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    x = solve(leaves, backend, causal, iterations=24, tolerance=1e-6)
    y = weigh(leaves, x, backend, causal)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    return {"x": x.detach(), "y": y.detach(), **{name: t.grad for name, t in leaves.items()}}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    "n, s, d, dv, f, causal",
    [(17, 35, 16, 24, 8, False), (33, 33, 24, 8, 24, True), (1, 1, 16, 16, 16, True)],
)
def test_fast_paths_equal_the_float64_definition(backend, n, s, d, dv, f, causal):
    given = inputs(n, s, d, dv, f, causal)
    expected = run(given, "reference", causal)
    single = {name: x.float() for name, x in given.items()}
    found = run(single, backend, causal)
    for name, exact in expected.items():
        assert (found[name] - exact).abs().max() <= 1e-4 * exact.abs().max() + 1e-6, name


@pytest.mark.parametrize("size, tile", [(3, 1), (7, 2**17), (128, 200)])
def test_tiles_of_any_size_give_the_same(size, tile, monkeypatch):
    given = inputs(21, 21, 6, 5, 4)
    expected = run(given, "reference", False)
    monkeypatch.setattr(rows, "ROWS", size)
    monkeypatch.setattr(rows, "TILE", tile)
    found = run(given, "cpu", False)
    for name, exact in expected.items():
        assert torch.allclose(found[name], exact, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("backend", FAST)
def test_half_precision_is_summed_in_float32(backend):
    given = inputs(17, 19, 16, 16, 16, dtype=torch.float32)
    half = {name: x.half() if name in "qkv" else x for name, x in given.items()}
    wide = {name: x.float() for name, x in half.items()}
    found, exact = run(half, backend, False), run(wide, "reference", False)
    assert found["x"].dtype == torch.float32 and found["y"].dtype == torch.float16
    for name, value in exact.items():
        assert (found[name].float() - value).abs().max() <= 5e-3 * value.abs().max(), name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(1, 1, 9, 4)}, "k: got 1 heads for 2; give as many"),
        (
            {"lse": torch.zeros(1, 2, 8)},
            r"lse: got \(1, 2, 8\) of .*give \(1, 2, 9\) of torch.float32",
        ),
        ({"mean": torch.zeros(1, 2, 9, 3).double()}, "mean: got .*torch.float64"),
        ({"features": torch.zeros(1, 2, 8, 3)}, r"features: got .*give \(1, 2, 9, 3\)"),
    ],
)
def test_what_does_not_match_is_named(change, message):
    given = {**inputs(9, 9, 4, 4, 3, dtype=torch.float32), **change}
    with pytest.raises(ValueError, match=message):
        solve(given, "cpu")
    if "k" not in change:
        with pytest.raises(ValueError, match=message):
            weigh(given, given["right"], "cpu")


def test_numbers_out_of_range_are_refused():
    given = inputs(9, 9, 4, 4, 3)
    with pytest.raises(ValueError, match="iterations, tolerance: got 0, 0.1; give at least 1"):
        solve(given, "cpu", iterations=0, tolerance=0.1)
