"""Attention of some of the queries: those of each head alone are computed, forward and backward."""

import pytest
import torch

from xattn.attention import SoftmaxOperator
from xattn.kernels import ragged_queries
from xattn.kernels.backend import HAS_TRITON
from xattn.kernels.ragged_queries import ragged_attention
from xattn.kernels.softmax import softmax_attention

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))
FAST = ["cpu", TRITON]


def kept(routing, batch, heads, n):
    """(B, H, N): the queries that heads keep."""
    generator = torch.Generator().manual_seed(1)
    score = torch.rand(batch, heads, n, generator=generator)
    if routing == "skewed":  # from every token to almost none
        return score < torch.linspace(1, 0, heads)[:, None] ** 3
    if routing == "all":
        return score >= 0
    if routing == "none":
        return score < 0
    if routing == "empty heads":
        return (score < 0.5) & (torch.arange(heads)[:, None] % 2 == 1)
    keep = score < 0.5
    if routing == "prefix":  # five tokens in front use every head, their patches few
        keep &= score < 0.1
        keep[..., :5] = True
    return keep


def inputs(n, s, d, dv, heads, key_heads, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k = normal(batch, heads, n, d), normal(batch, key_heads, s, d)
    return (q, k, normal(batch, key_heads, s, dv)), (
        normal(batch, heads, n, dv),
        normal(batch, heads, n),
    )


def run(backend, args, keep, grads, **options):
    """o, lse and the gradients by q, k and v, with a gradient into both outputs."""
    args = [x.detach().clone().requires_grad_() for x in args]
    o, lse = ragged_attention(*args, keep, backend=backend, **options)
    ((o * grads[0]).sum() + (lse.where(keep, 0.0) * grads[1]).sum()).backward()
    return [o, lse.where(keep, 0.0), *(x.grad for x in args)]


CASES = [  # queries, keys, width, width of values, heads, key heads, routing, causal
    (17, 17, 16, 16, 4, 4, "half", True),
    (63, 33, 24, 40, 4, 2, "skewed", False),
    (70, 70, 48, 16, 4, 1, "skewed", True),
    (1, 65, 64, 64, 3, 3, "half", False),
    (150, 150, 16, 16, 2, 2, "half", True),
    (1, 1, 16, 16, 2, 2, "all", True),
    (45, 45, 128, 128, 2, 2, "all", False),
    (69, 69, 32, 32, 4, 4, "prefix", False),
    (69, 69, 32, 32, 4, 4, "prefix", True),
    (40, 40, 80, 80, 4, 4, "empty heads", True),
    (33, 20, 96, 8, 2, 2, "empty heads", False),
    (9, 9, 16, 16, 2, 2, "none", False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"n{c[0]}-s{c[1]}-d{c[2]}-{c[6]}-{c[7]}")
@pytest.mark.parametrize("backend", FAST)
def test_fast_paths_equal_the_float64_reference(backend, case):
    *sizes, routing, causal = case
    args, grads = inputs(*sizes)
    keep = kept(routing, 2, sizes[4], sizes[0])
    exact = run("reference", args, keep, grads, causal=causal)
    single = [x.float() for x in args]
    found = run(backend, single, keep, [g.float() for g in grads], causal=causal)
    for value, true in zip(found, exact, strict=True):
        assert value.dtype == torch.float32
        assert (value.double() - true).abs().max() <= 1e-5 * true.abs().max().clamp(min=1)
    assert (found[0][~keep] == 0).all() and (found[2][~keep] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_definition_is_dense_attention_with_rows_left_out(backend, causal):
    args, grads = inputs(9, 9, 4, 3, 4, 2)
    keep = kept("skewed", 2, 4, 9)
    leaves = [x.clone().requires_grad_() for x in args]
    o, lse = softmax_attention(*leaves, causal=causal, backend="reference")
    o, lse = o * keep[..., None], lse * keep
    ((o * grads[0]).sum() + (lse * grads[1]).sum()).backward()
    expected = [o, lse, *(x.grad for x in leaves)]
    found = run(backend, args, keep, grads, causal=causal)
    for value, true in zip(found, expected, strict=True):
        assert torch.allclose(value, true, rtol=0, atol=1e-12)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_the_lists_of_the_kernels_hold_the_queries_in_order():
    from xattn.kernels.ragged_queries.triton import query_lists

    keep = kept("skewed", 2, 4, 37)
    queries, ends = query_lists(keep)
    for image in range(2):
        for head in range(4):
            at = keep[image, head].nonzero()[:, 0]
            assert ends[image, head, -1] == len(at)
            assert torch.equal(queries[image, head, : len(at)].long(), at)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("causal", [False, True])
def test_an_operator_of_this_backend_computes_only_the_rows_that_are_kept(
    backend, causal, monkeypatch
):
    monkeypatch.setattr(
        "xattn.attention.operators.base.FEW", 16
    )  # keys from which rows are left out
    (q, k, v), (grad, _) = inputs(33, 33, 16, 16, 2, 1, torch.float32, batch=1)
    keep, calls = kept("half", 1, 2, 33), []
    given = ragged_queries.Problem
    monkeypatch.setattr(ragged_queries, "Problem", lambda *p: calls.append(p) or given(*p))
    found = []
    for path in (backend, "auto"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        operator = SoftmaxOperator(*leaves[:2], backend=path, causal=causal)
        y = operator.matvec_where(leaves[2], keep)
        found.append([y, *torch.autograd.grad((y * grad).sum(), leaves)])
    assert [p[-1] for p in calls] == [backend]  # "auto" on a CPU has no need of the op
    for value, plain in zip(*found, strict=True):
        assert torch.allclose(value, plain, atol=2e-5)


@pytest.mark.parametrize(
    "keep, message",
    [
        (torch.ones(2, 2, 8).bool(), r"keep: got torch.bool of shape \(2, 2, 8\) on cpu; give"),
        (torch.ones(2, 2, 9), r"keep: got torch.float32 .*give torch.bool of shape \(2, 2, 9\)"),
    ],
)
def test_what_does_not_fit_is_named(keep, message):
    args, _ = inputs(9, 9, 16, 16, 2, 2)
    with pytest.raises(ValueError, match=message):
        ragged_attention(*args, keep)
    with pytest.raises(ValueError, match="causal: got 9 queries and 8 keys"):
        k, v = (x[:, :, :8] for x in args[1:])
        ragged_attention(args[0], k, v, torch.ones(2, 2, 9).bool(), causal=True)
