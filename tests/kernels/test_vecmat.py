"""Row vectors times attention, plain and gradient-weighted: the definition and the fast paths."""

import pytest
import torch

from xattn.kernels.backend import HAS_TRITON
from xattn.kernels.softmax import softmax_attention
from xattn.kernels.vecmat import cpu, gradient_vecmat, vecmat

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))
FAST = ["cpu", TRITON]


def inputs(n, s, d, r=1, *, heads=2, batch=2, shared=True, dv=None, bias=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    given = {"q": normal(batch, heads, n, d), "k": normal(batch, heads, s, d)}
    given["v"], given["grad"] = normal(batch, heads, s, dv or d), normal(batch, heads, n, dv or d)
    given["r"] = normal(*((batch, r, n) if shared else (batch, heads, r, n)))
    given["bias"] = None if bias is None else normal(*bias)
    attention = (given["q"], given["k"], given["v"], given["bias"])
    given["lse"] = softmax_attention(*attention, backend="reference")[1]
    return given


def call(given, weighted, backend, reduce="mean"):
    plain = {name: x for name, x in given.items() if name not in ("v", "grad")}
    if weighted:
        return gradient_vecmat(**given, backend=backend)
    return vecmat(**plain, reduce=reduce, backend=backend)


def run(given, weighted, backend, reduce="mean"):
    """The result, and the gradients of a fixed sum of it, by name."""
    leaves = {
        name: None if x is None else x.detach().clone().requires_grad_()
        for name, x in given.items()
    }
    out = call(leaves, weighted, backend, reduce)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    grads = {n: x.grad for n, x in leaves.items() if x is not None and x.grad is not None}
    return {"out": out.detach(), **grads}


def dense(given, weighted, reduce="mean"):
    """From the N x S matrix that softmax gives."""
    s = given["q"] @ given["k"].transpose(-2, -1) * given["q"].shape[-1] ** -0.5
    a = (s if given["bias"] is None else s + given["bias"]).softmax(-1)
    if weighted:
        a = (a * (given["grad"] @ given["v"].transpose(-2, -1))).clamp(min=0)
    r = given["r"] if given["r"].ndim == 4 else given["r"][:, None]
    out = r @ a
    return out.mean(1) if reduce == "mean" else out


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_it_is_the_row_vector_times_dense_attention(backend, weighted, shared):
    given = inputs(17, 19, 16, 3, shared=shared, bias=(1, 2, 1, 19))
    expected = dense(given, weighted)
    single = {name: None if x is None else x.float() for name, x in given.items()}
    found = call(single, weighted, backend)
    assert found.shape == (2, 3, 19) and found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-5)
    if not weighted:
        heads = call(single, False, backend, "none")
        assert torch.allclose(heads.double(), dense(given, False, "none"), atol=1e-5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "n, s, d, dv, r, bias",
    [
        (17, 63, 16, 16, 1, (2, 1, 1, 63)),
        (63, 17, 24, 40, 16, (1, 2, 63, 17)),
        (1, 197, 64, 16, 2, None),
        (201, 33, 128, 64, 5, None),
    ],
)
def test_fast_paths_equal_the_float64_reference(backend, weighted, n, s, d, dv, r, bias):
    given = inputs(n, s, d, r, batch=1 if bias is None else 2, dv=dv, bias=bias)
    expected = run(given, weighted, "reference")
    single = {name: None if x is None else x.float() for name, x in given.items()}
    plain, found = run(single, weighted, "reference"), run(single, weighted, backend)
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        limit = 3 * (plain[name].double() - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (found[name].double() - exact).abs().max() <= limit, name


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_row_without_a_key_adds_nothing_and_has_no_gradient(backend, weighted):
    bias = torch.zeros(1, 1, 7, 5, dtype=torch.float64)
    given = inputs(7, 5, 16)
    bias[..., 3, :], bias[..., 4, 1:] = -torch.inf, -torch.inf
    given["bias"] = bias
    given["lse"] = softmax_attention(given["q"], given["k"], given["v"], bias)[1]
    assert (given["lse"][:, :, 3] == -torch.inf).all()
    single = {name: x.float() for name, x in given.items()}
    found = run(single, weighted, backend)
    assert all(x.isfinite().all() for x in found.values())
    assert (found["q"][:, :, 3] == 0).all() and (found["bias"][..., 3, :] == 0).all()
    assert (found["lse"][:, :, 3] == 0).all()
    without = {**single, "r": single["r"].clone()}
    without["r"][..., 3] = 0
    assert torch.allclose(call(without, weighted, backend), found["out"], atol=1e-6)
    # without a bias as well, where -inf comes from the caller alone
    single.update(bias=None, lse=torch.full_like(single["lse"], -torch.inf))
    assert all((x == 0).all() for x in run(single, weighted, backend).values())


@pytest.mark.parametrize("bias", [None, (2, 1, 1, 23), (1, 3, 21, 23), (2, 3, 21, 23)])
def test_tiles_of_any_size_give_the_same(bias, monkeypatch):
    given = inputs(21, 23, 16, 2, heads=3, bias=bias)
    expected = [run(given, weighted, "reference") for weighted in (False, True)]
    for queries, keys in ((4, 5), (30, 40), (21, 23), (1024, 512)):
        monkeypatch.setattr(cpu, "QUERIES", queries)
        monkeypatch.setattr(cpu, "KEYS", keys)
        for weighted in (False, True):
            found = run(given, weighted, "cpu")
            for name, value in expected[weighted].items():
                assert torch.allclose(found[name], value), (queries, keys, name)
    for extent in (2, 3, 21, 23), (1, 2, 21, 23), (1, 1, 8, 23):  # as on GPUs of any memory
        monkeypatch.setattr(cpu, "_extent", lambda p, extent=extent: extent)
        for weighted in (False, True):
            found = run(given, weighted, "cpu")
            for name, value in expected[weighted].items():
                assert torch.allclose(found[name], value), (extent, name)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(2, 2, 9, 8)}, r"k: got shape .* needs the same B and D, and heads"),
        ({"lse": torch.zeros(2, 2, 8)}, r"lse: got \(2, 2, 8\) .*give \(2, 2, 9\)"),
        ({"lse": torch.zeros(2, 2, 9, dtype=torch.int64)}, r"lse: got .*torch.int64"),
        ({"r": torch.zeros(2, 9)}, r"r: got shape \(2, 9\); give \(2, R, 9\)"),
        ({"r": torch.zeros(2, 17, 9)}, r"r: got shape .* R of 1 to 16, and more rows in several"),
        ({"r": torch.zeros(2, 3, 1, 9)}, r"r: got shape"),
        ({"r": torch.zeros(2, 1, 9, dtype=torch.bool)}, r"r: got torch.bool"),
        ({"bias": torch.zeros(3, 1, 1, 9)}, r"bias: got shape"),
        ({"grad": torch.zeros(2, 2, 9, 8)}, r"grad: got \(2, 2, 9, 8\) .*give \(2, 2, 9, 16\)"),
        ({"grad": torch.zeros(2, 2, 9, 16).double()}, r"grad: got .*torch.float64"),
    ],
)
def test_what_does_not_match_is_named(change, message):
    given = {**inputs(9, 9, 16, dtype=torch.float32), **change}
    with pytest.raises(ValueError, match=message):
        call(given, True, "cpu")
    if "grad" not in change:
        with pytest.raises(ValueError, match=message):
            call(given, False, "cpu")


def test_an_unknown_reduction_and_float64_on_triton_are_refused():
    given = inputs(9, 9, 16)
    with pytest.raises(ValueError, match="reduce: got 'max'; choose 'mean' or 'none'"):
        call(given, False, "cpu", "max")
    with pytest.raises(ValueError, match="backend='triton': got torch.float64"):
        call(given, False, "triton")
