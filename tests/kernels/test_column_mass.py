"""Attention received: its definition, its sums, and that no N x S matrix is stored."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xattn.kernels.backend import HAS_TRITON
from xattn.kernels.column_mass import column_mass
from xattn.kernels.softmax import softmax_attention

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))
EVERY = ["reference", "cpu", TRITON]


def inputs(n, s, d=16, bias=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k = normal(2, 2, n, d), normal(2, 2, s, d)
    b = None if bias is None else normal(*bias)
    return q, k, softmax_attention(q, k, k, b, backend="reference")[1], b


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("n, s", [(17, 63), (197, 17), (1, 201)])
def test_it_is_the_weighted_column_sum_of_dense_attention(backend, n, s):
    q, k, lse, bias = inputs(n, s, bias=(1, 2, n, s))
    a = (q @ k.transpose(-2, -1) / 4 + bias).double().softmax(-1)
    found = column_mass(q, k, lse, bias=bias, backend=backend)
    assert found.shape == (2, 2, s) and found.dtype == torch.float32
    assert torch.allclose(found.double(), a.sum(-2), atol=1e-4)
    for shape in ((1, 1, n), (2, 1, n), (1, 2, n), (2, 2, n)):
        w = torch.linspace(-1, 2, torch.Size(shape).numel()).view(shape)
        weighted = column_mass(q, k, lse, weights=w, bias=bias, backend=backend)
        assert torch.allclose(weighted.double(), (w[..., None] * a).sum(-2), atol=1e-4)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_its_sum_is_the_number_of_queries_that_see_a_key(backend, prefix):
    q, k, _, _ = inputs(16 + prefix, 16 + prefix)
    bias = torch.zeros(1, 1, 16 + prefix, 1).repeat(1, 1, 1, 16 + prefix)
    bias[..., 3, :] = -torch.inf
    lse = softmax_attention(q, k, k, bias)[1]
    mass = column_mass(q, k, lse, bias=bias, backend=backend)
    assert torch.allclose(mass.sum(-1), torch.full((2, 2), 15.0 + prefix), atol=1e-4)


@pytest.mark.parametrize("backend", EVERY)
def test_equal_keys_receive_alike(backend):
    q, k, _, _ = inputs(33, 9)
    k = k[:, :, :1].expand_as(k)
    mass = column_mass(q, k, softmax_attention(q, k, k)[1], backend=backend)
    assert torch.allclose(mass, torch.full_like(mass, 33 / 9), atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_gradient_in_float64(backend):
    q, k, lse, bias = inputs(4, 3, 2, (2, 1, 4, 3), torch.float64)
    w = torch.linspace(-1, 1, 4, dtype=torch.float64).view(1, 1, 4)
    leaves = [x.detach().requires_grad_() for x in (q, k, lse, w, bias)]
    assert torch.autograd.gradcheck(
        lambda q, k, lse, w, b: column_mass(q, k, lse, weights=w, bias=b, backend=backend), leaves
    )


@pytest.mark.parametrize("backend", ["cpu", TRITON])
def test_gradients_equal_the_reference(backend):
    q, k, lse, bias = inputs(63, 65, bias=(1, 1, 1, 65))
    grads = []
    for path in ("reference", backend):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, lse, bias)]
        mass = column_mass(*leaves[:3], bias=leaves[3], backend=path)
        mass.square().sum().backward()
        grads.append([x.grad for x in leaves])
    for exact, found in zip(*grads, strict=True):
        assert torch.allclose(found, exact, atol=1e-4 * exact.abs().max())


class Largest(TorchDispatchMode):
    """The most elements that any operation returned."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_the_cpu_path_never_stores_the_matrix():
    from xattn.kernels.vecmat import cpu
    from xattn.kernels.vecmat.reference import Problem

    n = 3000
    q, k = torch.randn(1, 1, n, 8), torch.randn(1, 1, n, 8)
    lse = softmax_attention(q, k, k)[1]
    r, grad = torch.ones(1, 1, 1, n), torch.randn(1, 1, 1, n)
    with Largest() as largest:
        cpu.forward(Problem(q, k, lse, r, None, None, None, 0.5, False, "cpu"))
        weighted = Problem(q, k, lse, r, k, q, None, 0.5, False, "cpu")
        cpu.backward(weighted, (), (grad,), {"q"})
    assert largest.size <= cpu.QUERIES * cpu.KEYS < n * n / 10


@pytest.mark.parametrize(
    "weights, message",
    [
        (torch.ones(9), r"weights: got shape \(9,\); give \(B or 1, H or 1, N\) for \(2, 2, 9\)"),
        (torch.ones(2, 3, 9), r"weights: got shape"),
        (torch.ones(1, 1, 9, dtype=torch.int32), r"weights: got torch.int32"),
    ],
)
def test_weights_that_do_not_match_are_named(weights, message):
    q, k, lse, _ = inputs(9, 9)
    with pytest.raises(ValueError, match=message):
        column_mass(q, k, lse, weights=weights)
