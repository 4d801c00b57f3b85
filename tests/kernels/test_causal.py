"""Causal attention and grouped keys: the definition, its limits, and that nothing N x N is stored."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xattn.kernels.backend import HAS_TRITON
from xattn.kernels.softmax import softmax_attention
from xattn.kernels.vecmat import gradient_vecmat, vecmat

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))
FAST = ["cpu", TRITON]
EVERY = ["reference", *FAST]

CASES = [  # tokens, width, width of values, heads, key heads, bias
    (17, 16, None, 4, 2, None),
    (63, 24, 40, 2, 1, (1, 2, 63, 63)),
    (70, 16, 8, 6, 2, (2, 1, 1, 70)),
    (201, 64, None, 1, 1, None),
    (1, 16, None, 2, 2, (1, 2, 1, 1)),
]


def inputs(n, d, dv, heads, key_heads, bias, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    batch = 1 if n > 100 else 2

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k = normal(batch, heads, n, d), normal(batch, key_heads, n, d)
    v, grad = normal(batch, key_heads, n, dv or d), normal(batch, heads, n, dv or d)
    b = None if bias is None else normal(*bias)
    return {"q": q, "k": k, "v": v, "bias": b}, grad


def dense(q, k, v, bias, causal):
    """A V, log-sum-exp and A from the stored matrix."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = q @ k.mT * q.shape[-1] ** -0.5
    s = s if bias is None else s + bias
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -torch.inf)
    a = s.softmax(-1)
    return a @ v, s.logsumexp(-1), a


def leaves(given, dtype):
    return {
        name: None if x is None else x.detach().to(dtype, copy=True).requires_grad_()
        for name, x in given.items()
    }


def assert_near(found, exact, rtol=2e-5):
    for value, true in zip(found, exact, strict=True):
        assert (
            value.detach().double() - true
        ).abs().max() <= rtol * true.detach().abs().max().clamp(min=1)


@pytest.mark.parametrize("lse_grad", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"n{c[0]}-heads{c[3]}over{c[4]}")
@pytest.mark.parametrize("backend", EVERY)
def test_output_and_gradients_are_those_of_masked_attention(backend, case, causal, lse_grad):
    given, grad = inputs(*case)

    def run(attend, dtype):
        x = leaves(given, dtype)
        o, lse = attend(**x, causal=causal)[:2]
        loss = (o * grad.to(dtype)).sum() + (lse.sum() if lse_grad else 0)
        loss.backward()
        return [o, lse, *(y.grad for y in x.values() if y is not None)]

    def attend(**x):
        return softmax_attention(**x, backend=backend)

    exact = run(dense, torch.float64)
    assert_near(run(attend, torch.float32), exact)
    if backend != "triton":
        assert_near(run(attend, torch.float64), exact, 1e-11)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"n{c[0]}-heads{c[3]}over{c[4]}")
@pytest.mark.parametrize("backend", EVERY)
def test_row_vectors_and_their_gradients_follow_the_definition(backend, case, causal, weighted):
    given, g = inputs(*case)
    r = torch.linspace(-1, 2, given["q"].shape[0] * 3 * case[0], dtype=torch.float64)
    r = r.view(-1, 3, case[0])

    def expected():
        x = leaves(given | {"grad": g, "r": r}, torch.float64)
        grad, r_ = x.pop("grad"), x.pop("r")
        a = dense(**x, causal=causal)[2]
        if weighted:
            v = x["v"].repeat_interleave(a.shape[1] // x["v"].shape[1], 1)
            a = a * (grad @ v.mT).relu()
        out = (r_[:, None] @ a).mean(1)
        out.square().sum().backward()
        return [out, x["q"].grad, x["k"].grad, r_.grad]

    def found(dtype):
        x = leaves(given | {"grad": g, "r": r}, dtype)
        *_, grad, r_ = x.values()
        q, k, v, bias = (x[name] for name in ("q", "k", "v", "bias"))
        lse = softmax_attention(q, k, v, bias, causal=causal, backend="reference")[1]
        options = {"bias": bias, "causal": causal, "backend": backend}
        if weighted:
            out = gradient_vecmat(q, k, v, lse, grad, r_, **options)
        else:
            out = vecmat(q, k, lse, r_, **options)
        out.square().sum().backward()
        return [out, q.grad, k.grad, r_.grad]

    assert_near(found(torch.float32), expected(), 1e-4)
    if backend != "triton":
        assert_near(found(torch.float64), expected(), 1e-11)


@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize("backend", EVERY)
def test_queries_before_the_first_visible_key_have_no_output_and_no_gradient(backend, per_key):
    given, grad = inputs(9, 16, None, 2, 1, None, torch.float32)
    bias = torch.zeros(1, 1, 1 if per_key else 9, 9)
    bias[..., :3] = -torch.inf
    given["bias"] = bias
    x = leaves(given, torch.float32)
    o, lse = softmax_attention(**x, causal=True, backend=backend)
    o.backward(grad)
    assert (o[:, :, :3] == 0).all() and (lse[:, :, :3] == -torch.inf).all()
    assert lse[:, :, 3:].isfinite().all()
    assert (x["q"].grad[:, :, :3] == 0).all() and (x["k"].grad[:, :, :3] == 0).all()
    rest = dense(given["q"][:, :, 3:], given["k"][:, :, 3:], given["v"][:, :, 3:], None, True)
    assert torch.allclose(o[:, :, 3:], rest[0], atol=1e-5)
    assert all(y.grad.isfinite().all() for y in x.values())


class Work(TorchDispatchMode):
    """The most elements that any operation returned, and the sum over batched products."""

    def __init__(self):
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                size = x.untyped_storage().nbytes() // x.element_size()
                self.largest = max(self.largest, size)
                self.products += x.numel() if "bmm" in str(function) else 0
        return out


@pytest.mark.parametrize("lse_grad", [False, True])
@pytest.mark.parametrize("width_v", [8, 5, 24])
def test_no_matrix_is_stored_on_the_cpu_whatever_the_width_of_values(width_v, lse_grad):
    n = 3000
    q, k = torch.randn(1, 2, n, 8), torch.randn(1, 1, n, 8)
    v = torch.randn(1, 1, n, width_v).requires_grad_()
    for causal in (False, True):
        with Work() as work:
            o, lse = softmax_attention(q, k, v, causal=causal)
            (o.sum() + (lse.sum() if lse_grad else 0)).backward()
        assert work.largest <= 2**20 < n * n / 8


def test_hidden_tiles_of_causal_row_vectors_are_skipped():
    n = 3000
    q, k = torch.randn(1, 1, n, 8), torch.randn(1, 1, n, 8)
    r, lse = torch.ones(1, 1, n), torch.zeros(1, 1, n)
    work = []
    for causal in (False, True):
        with Work() as counted:
            vecmat(q, k, lse, r, causal=causal)
        work.append(counted.products)
    assert work[1] <= 0.6 * work[0]


def test_unequal_lengths_and_heads_that_do_not_divide_are_refused():
    q, k = torch.zeros(1, 4, 9, 16), torch.zeros(1, 4, 8, 16)
    lse, r = torch.zeros(1, 4, 9), torch.zeros(1, 1, 9)
    calls = (
        lambda: softmax_attention(q, k, k, causal=True),
        lambda: vecmat(q, k, lse, r, causal=True),
        lambda: gradient_vecmat(q, k, k, lse, q, r, causal=True),
    )
    for call in calls:
        with pytest.raises(ValueError, match="causal: got 9 queries and 8 keys; give as many"):
            call()
    k = torch.zeros(1, 3, 9, 16)
    with pytest.raises(ValueError, match="k: got shape .* heads that divide its 4"):
        softmax_attention(q, k, k)
