"""Softmax pooling: the definition, and that the fast paths equal it, with first and second derivatives."""

import pytest
import torch

from xattn.kernels.backend import HAS_TRITON
from xattn.kernels.pooling import softmax_pooling

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))
FAST = ["cpu", TRITON]
KINDS = ["products", "products and bias", "scores"]


def inputs(b=2, q=4, groups=2, t=7, d=5, v=6, shared=False, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = normal(1 if shared else b, q, d), normal(b, t, d), normal(b, groups, t, v)
    return (*tensors, normal(b, q, t)), (normal(b, q, v), normal(b, q))


def chosen(args, kind):
    q, k, v, bias = args
    if kind == "scores":
        return None, None, v, bias
    return q, k, v, None if kind == "products" else bias


def run(backend, args, grads, **options):
    """o, lse and all gradients, with a gradient into both outputs."""
    args = [None if a is None else a.detach().clone().requires_grad_() for a in args]
    o, lse = softmax_pooling(*args, backend=backend, **options)
    finite = torch.where(lse.isneginf(), 0.0, lse)
    ((o * grads[0]).sum() + (finite * grads[1]).sum()).backward()
    return [o.detach(), lse.detach(), *(a.grad for a in args if a is not None)]


def plain(q, k, v, bias=None, scale=None):
    scale = scale or (1 if q is None else q.shape[-1] ** -0.5)
    s = bias if q is None else scale * (q @ k.transpose(1, 2)) + (0 if bias is None else bias)
    values = v.repeat_interleave(s.shape[1] // v.shape[1], 1)
    return (s.softmax(-1)[:, :, None] @ values)[:, :, 0], s.logsumexp(-1)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True], ids=["queries of each image", "of all"])
def test_the_definition_and_both_derivatives_in_float64(backend, kind, shared):
    args = chosen(inputs(t=5, d=3, v=2, shared=shared)[0], kind)
    for found, true in zip(softmax_pooling(*args, backend=backend), plain(*args), strict=True):
        torch.testing.assert_close(found, true)
    leaves = [a.requires_grad_() for a in args if a is not None]

    def pool(*given):
        given = iter(given)
        return softmax_pooling(*(None if a is None else next(given) for a in args), backend=backend)

    assert torch.autograd.gradcheck(pool, leaves)
    assert torch.autograd.gradgradcheck(pool, leaves)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"q": 3, "groups": 1, "t": 17, "d": 24, "v": 24, "shared": True},
        {"b": 1, "q": 34, "groups": 2, "t": 71, "d": 70, "v": 65},
        {"b": 3, "q": 5, "groups": 5, "t": 65, "d": 129, "v": 1},
    ],
    ids=["small", "two tiles", "a query a group"],
)
def test_fast_paths_equal_the_float64_reference(backend, kind, sizes):
    args, grads = inputs(**sizes)
    args = chosen(args, kind)
    expected = run("reference", args, grads)
    single = [None if a is None else a.float() for a in args]
    near = run("reference", single, [g.float() for g in grads])
    found = run(backend, single, [g.float() for g in grads])
    for exact, rounded, value in zip(expected, near, found, strict=True):
        limit = 3 * (rounded.double() - exact).abs().max() + 2e-6 * exact.abs().max()
        assert (value.double() - exact).abs().max() <= limit
        assert value.dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("kind", ["products and bias", "scores"])
def test_hidden_tokens_count_nothing_and_a_row_without_tokens_is_zero(backend, kind):
    (q, k, v, bias), grads = inputs(dtype=torch.float32)
    bias[0, 1] = -torch.inf
    bias[:, :, 3] = -torch.inf
    o, lse, *slopes = run(backend, chosen((q, k, v, bias), kind), grads)
    assert (o[0, 1] == 0).all() and lse[0, 1] == -torch.inf
    assert all(x.isfinite().all() for x in slopes)
    by_scores, by_values = slopes[-1], slopes[-2]
    assert (by_scores[0, 1] == 0).all() and (by_scores[:, :, 3] == 0).all()
    assert (by_values[:, :, 3] == 0).all()
    rest = [0, 1, 2, 4, 5, 6]
    fewer = chosen((q, k[:, rest], v[:, :, rest], bias[:, :, rest]), kind)
    torch.testing.assert_close(softmax_pooling(*fewer, backend=backend)[0], o)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_scores_that_are_no_number_are_not_taken_for_hidden_ones(backend):
    (_, _, v, bias), _ = inputs(dtype=torch.float32)
    bias[0, 0, 0] = torch.nan
    o, lse = softmax_pooling(None, None, v, bias, backend=backend)
    assert o[0, 0].isnan().all() and lse[0, 0].isnan() and o[1].isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_the_graph_may_be_used_twice_as_attention_training_does(backend):
    args, (g, _) = inputs(dtype=torch.float32)
    leaves = [a.requires_grad_() for a in args]
    loss = (softmax_pooling(*leaves, backend=backend)[0] * g).sum()
    (first,) = torch.autograd.grad(loss, leaves[3], retain_graph=True)
    loss.backward()
    torch.testing.assert_close(leaves[3].grad, first)


def test_frozen_tokens_get_no_gradient_computed(monkeypatch):
    from xattn.kernels.pooling import cpu

    (q, k, v, _), (g, _) = inputs(dtype=torch.float32)
    seen = []
    backward = cpu.backward

    def spy(*args):
        out = backward(*args)
        seen.append((args[-1], set(out)))
        return out

    monkeypatch.setattr(cpu, "backward", spy)
    (softmax_pooling(q.requires_grad_(), k, v, backend="cpu")[0] * g).sum().backward()
    assert seen == [({"q"}, {"q"})]


def test_chunks_and_layouts_of_memory_change_nothing(monkeypatch):
    from xattn.kernels.pooling import cpu

    args, grads = inputs(b=5, dtype=torch.float32)
    expected = run("cpu", args, grads)
    monkeypatch.setattr(cpu, "CHUNK", 2 * 4 * 7)  # two images at a time, then one
    turned = [x.transpose(-2, -1).contiguous().transpose(-2, -1) for x in args]
    for found, true in zip(run("cpu", turned, grads), expected, strict=True):
        torch.testing.assert_close(found, true)


def test_many_versions_of_one_image_are_a_batch():
    (_, _, v, bias), _ = inputs(b=1, dtype=torch.float64)
    versions = torch.stack([bias, bias + torch.arange(7), -bias])
    pool = torch.vmap(lambda s: softmax_pooling(None, None, v, s)[0])
    expected = torch.stack([softmax_pooling(None, None, v, s)[0] for s in versions])
    torch.testing.assert_close(pool(versions), expected)
    (q, k, v, bias), _ = inputs(shared=True)
    both = torch.vmap(lambda x, s: softmax_pooling(q, x, v, s)[0])(
        torch.stack([k, -k]), versions[:2].expand(-1, 2, -1, -1)
    )
    torch.testing.assert_close(both[1], softmax_pooling(q, -k, v, versions[1].expand(2, -1, -1))[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"v": torch.zeros(2, 7, 6)}, r"v: got torch.float32 of shape \(2, 7, 6\)"),
        ({"k": None}, "q, k, bias: give queries and keys"),
        ({"q": None, "k": None, "bias": None}, "q, k, bias: give queries and keys"),
        ({"k": torch.zeros(2, 6, 5)}, r"k: got shape \(2, 6, 5\); v needs \(2, 7, D\)"),
        ({"q": torch.zeros(3, 4, 5)}, r"q: got shape \(3, 4, 5\); keys .* need \(2 or 1, Q, 5\)"),
        ({"q": torch.zeros(2, 4, 5).double()}, "q: got torch.float64"),
        ({"bias": torch.zeros(2, 1, 7)}, r"bias: got shape \(2, 1, 7\) .*give \(2, 4, 7\)"),
        ({"bias": torch.zeros(2, 4, 7).bool()}, "bias: got torch.bool; give floating point"),
        ({"v": torch.zeros(2, 3, 7, 6)}, "v: got 3 groups for 4 queries; give a divisor"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    q, k, v, bias = inputs(dtype=torch.float32)[0]
    with pytest.raises(ValueError, match=message):
        softmax_pooling(**{"q": q, "k": k, "v": v, "bias": bias, **change})
