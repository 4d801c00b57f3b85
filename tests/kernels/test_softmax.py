"""Softmax attention: the definition, and that the fast paths equal it, forward and backward."""

import pytest
import torch

from xattn.kernels.backend import HAS_TRITON
from xattn.kernels.softmax import softmax_attention

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))
FAST = ["cpu", TRITON]


def inputs(n, s, d, dv=None, bias=None, batch=2, heads=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k = normal(batch, heads, n, d), normal(batch, heads, s, d)
    v = normal(batch, heads, s, dv or d)
    b = None if bias is None else normal(*bias)
    grads = normal(batch, heads, n, dv or d), normal(batch, heads, n).to(dtype)
    return (q, k, v, b), grads


def run(backend, args, grads, **options):
    """o, lse and all gradients, with a gradient into both outputs."""
    args = [None if a is None else a.detach().clone().requires_grad_() for a in args]
    o, lse = softmax_attention(*args, backend=backend, **options)
    finite = torch.where(lse.isneginf(), 0.0, lse)
    ((o * grads[0]).sum() + (finite * grads[1]).sum()).backward()
    return [o, lse, *(a.grad for a in args if a is not None)]


def dense(q, k, v, bias=None, scale=None):
    s = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = s if bias is None else s + bias
    return s.softmax(-1) @ v, s.logsumexp(-1)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("bias", [None, (2, 1, 1, 6), (1, 2, 5, 6), (2, 2, 5, 6)])
def test_the_definition_and_its_gradients_in_float64(backend, bias):
    args, _ = inputs(5, 6, 4, 3, bias)
    o, lse = softmax_attention(*args, backend=backend)
    expected = dense(*args)
    assert torch.allclose(o, expected[0]) and torch.allclose(lse, expected[1])
    leaves = [a.requires_grad_() for a in args if a is not None]
    assert torch.autograd.gradcheck(
        lambda *a: softmax_attention(*a, backend=backend), leaves, atol=1e-6
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    "n, s, d, dv, bias",
    [
        (17, 17, 16, None, None),
        (63, 33, 24, 40, (1, 2, 63, 33)),
        (1, 197, 64, None, (2, 1, 1, 197)),
        (201, 63, 128, 16, (1, 1, 201, 63)),
    ],
)
def test_fast_paths_equal_the_float64_reference(backend, n, s, d, dv, bias):
    args, grads = inputs(n, s, d, dv, bias, batch=1 if n > 100 else 2)
    expected = run("reference", args, grads)
    single = [None if a is None else a.float() for a in args]
    plain = run("reference", single, [g.float() for g in grads])
    found = run(backend, single, [g.float() for g in grads])
    for exact, near, value in zip(expected, plain, found, strict=True):
        limit = 3 * (near.double() - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (value.double() - exact).abs().max() <= limit
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.float32


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("bias", ["none", "fixed", "hides a row", "a key", "hides a key"])
def test_gradients_of_the_output_alone_equal_the_reference(backend, bias):
    args, (g, _) = inputs(17, 19, 16, bias=(1, 2, 1 if "key" in bias else 17, 19))
    if bias == "hides a row":
        args[3][..., 4, :] = -torch.inf
    if bias == "hides a key":
        args[3][..., 4] = -torch.inf

    def gradients(backend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in args]
        if "key" not in bias:
            leaves.pop()
        fixed = [] if bias == "none" or "key" in bias else [args[3].to(dtype)]
        o, _ = softmax_attention(*leaves, *fixed, scale=0.3, backend=backend)
        return torch.autograd.grad(o, leaves, g.to(dtype))

    exact = gradients("reference", torch.float64)
    for found, true in zip(gradients(backend, torch.float32), exact, strict=True):
        assert torch.allclose(found.double(), true, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_row_without_a_key_gives_zero_and_minus_infinity_and_no_gradient(backend):
    args, grads = inputs(7, 5, 16, dtype=torch.float32)
    bias = torch.zeros(1, 1, 7, 5)
    bias[..., 3, :] = -torch.inf
    bias[..., 4, 1:] = -torch.inf
    o, lse, dq, dk, dv, db = run(backend, (*args[:3], bias), grads)
    assert (o[:, :, 3] == 0).all() and (lse[:, :, 3] == -torch.inf).all()
    assert torch.allclose(o[:, :, 4], args[2][:, :, 0], atol=1e-6)
    for value in (o, dq, dk, dv, db):
        assert value.isfinite().all()
    assert (dq[:, :, 3] == 0).all() and (db[..., 3, :] == 0).all()
    # with every row hidden nothing at all comes through
    hidden = run(backend, (*args[:3], torch.full((1, 1, 1, 5), -torch.inf)), grads)
    assert all((x == 0).all() for x in (hidden[0], *hidden[2:]))


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_segments_merge_exactly_because_lse_has_a_gradient(backend):
    (q, k, v, _), (g, _) = inputs(9, 22, 16, dtype=torch.float32)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    parts = [
        softmax_attention(leaves[0], leaves[1][:, :, i], leaves[2][:, :, i], backend=backend)
        for i in (slice(0, 5), slice(5, 22))
    ]
    lse = torch.stack([p[1] for p in parts])
    share = (lse - lse.logsumexp(0)).exp()[..., None]
    merged = (share * torch.stack([p[0] for p in parts])).sum(0)
    (merged * g).sum().backward()
    whole = run(
        "reference", (q.double(), k.double(), v.double(), None), (g.double(), torch.zeros(2, 2, 9))
    )
    assert torch.allclose(merged.double(), whole[0], atol=1e-6)
    for leaf, true in zip(leaves, whole[2:], strict=True):
        assert torch.allclose(leaf.grad.double(), true, atol=1e-5)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(
    "n, d, heads", [(130, 16, 2), (70, 20, 3)]
)  # strides of 8 elements, and others
@pytest.mark.parametrize("causal", [False, True])
def test_kernels_read_side_by_side_projections_where_they_are(n, d, heads, causal):
    from xattn.kernels.softmax.triton import row_by_row

    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, n, 3, heads, d, generator=generator).requires_grad_()
    given = packed.permute(2, 0, 3, 1, 4).unbind(0)
    assert all(row_by_row(x) is x for x in given)
    grad = torch.randn(2, n, heads * d, generator=generator)

    def merged(tensors, backend):
        o, _ = softmax_attention(*tensors, causal=causal, backend=backend)
        return o.transpose(1, 2).flatten(2)

    o = merged(given, "triton")
    apart = merged([x.contiguous() for x in given], "triton")
    assert torch.equal(o, apart)
    (found,) = torch.autograd.grad(o, packed, grad, retain_graph=True)
    (same,) = torch.autograd.grad(apart, packed, grad, retain_graph=True)
    assert torch.equal(found, same)
    (true,) = torch.autograd.grad(
        merged([x.double() for x in given], "reference"), packed, grad.double()
    )
    assert torch.allclose(found, true, atol=1e-5)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("shape", [(2, 3, 37, 16), (1, 2, 5, 72), (3, 1, 64, 1)])
def test_one_kernel_sums_each_row_of_gradients_times_outputs(shape):
    from xattn.kernels.tiles import delta

    generator = torch.Generator().manual_seed(0)
    o, g = (torch.randn(*shape, generator=generator) for _ in range(2))
    minus = torch.randn(*shape[:3], generator=generator)
    expected = (o.double() * g.double()).sum(-1)
    for grad in (g, g.transpose(1, 2).contiguous().transpose(1, 2), g.mT.contiguous().mT):
        assert torch.allclose(delta(grad, None, o).double(), expected, atol=1e-5)
        assert torch.allclose(delta(grad, minus, o).double(), expected - minus, atol=1e-5)
    assert torch.allclose(delta(o.new_ones(1).expand(shape), None, o), o.sum(-1), atol=1e-5)


def test_rows_in_tiles_and_a_build_without_the_fused_kernel_give_the_same(monkeypatch):
    from xattn.kernels.softmax import cpu

    args, grads = inputs(21, 21, 16, bias=(1, 2, 21, 21), dtype=torch.float32)
    expected = run("cpu", args, grads)
    monkeypatch.setattr(cpu, "TILE", 2 * 2 * 21 * 4)  # four rows a tile
    for found, true in zip(run("cpu", args, grads), expected, strict=True):
        assert torch.allclose(found, true, atol=1e-6)
    monkeypatch.setattr(cpu, "_fused", lambda *a: None)  # a build without the fused kernel
    for found, true in zip(run("cpu", args, grads), expected, strict=True):
        assert torch.allclose(found, true, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": (2, 9, 16)}, r"q: got shape \(2, 9, 16\)"),
        ({"k": (2, 2, 9, 8)}, r"k: got shape .* needs the same B and D, and heads"),
        ({"v": (2, 2, 8, 16)}, r"v: got shape .* needs the same B, heads and S"),
        ({"bias": (2, 2, 9, 8)}, r"bias: got shape .*give \(B or 1"),
        ({"bias": (3, 1, 1, 9)}, r"bias: got shape"),
    ],
)
def test_shapes_that_do_not_match_are_named(change, message):
    shapes = {"q": (2, 2, 9, 16), "k": (2, 2, 9, 16), "v": (2, 2, 9, 16), **change}
    with pytest.raises(ValueError, match=message):
        softmax_attention(**{name: torch.zeros(shape) for name, shape in shapes.items()})


def test_dtypes_and_backends_that_do_not_fit_are_refused():
    q = torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match=r"k: got torch.float64 .*q is torch.float32"):
        softmax_attention(q, q.double(), q)
    with pytest.raises(ValueError, match="backend: got 'cuda'; choose one of auto"):
        softmax_attention(q, q, q, backend="cuda")


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("n, width", [(1, 16), (37, 24), (64, 70)])
def test_two_parts_merge_into_one_softmax(n, width, dtype, error):
    from xattn.kernels.tiles import merge

    (q, k, v, _), _ = inputs(n, 40, width)
    hidden = torch.zeros(n, 40, dtype=torch.float64)
    hidden[::3, :25] = hidden[::2, 25:] = -torch.inf  # rows without a key in one part, or in both
    bias = hidden[None, None]
    whole = softmax_attention(q, k, v, bias, backend="reference")
    parts = [
        softmax_attention(q, k[:, :, at], v[:, :, at], bias[..., at], backend="reference")
        for at in (slice(0, 25), slice(25, 40))
    ]
    o, lse = merge(
        *(x.to(t) for part in parts for x, t in zip(part, (dtype, torch.float32), strict=True))
    )
    assert o.dtype == dtype and torch.allclose(o.double(), whole[0], atol=error)
    assert torch.allclose(lse.double(), whole[1], atol=1e-5)
