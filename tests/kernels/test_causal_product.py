"""Causal low-rank products: equal to a masked matrix, linear in memory, and blind to later tokens."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xattn.kernels.backend import ENTRIES, HAS_TRITON
from xattn.kernels.causal_product import causal_product, cpu
from xattn.kernels.causal_product.reference import Problem
from xattn.runtime.measuring import peak_memory

SPAN = cpu.CHUNK * cpu.STEPS


def inputs(n, f, m, *, leading=(2, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    widths = (f, f, m)
    made = (torch.randn(*leading, n, w, generator=generator, dtype=torch.float64) for w in widths)
    return [x.to(dtype) for x in made]


def masked(left, right, x, reverse=False):
    a = left @ right.transpose(-2, -1)
    return (a.triu() if reverse else a.tril()) @ x


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 197, SPAN, SPAN + 1, 2 * SPAN - 33])
def test_it_is_the_masked_matrix_times_the_values(backend, reverse, n):
    given = inputs(n, 5, 7)
    found = causal_product(*given, reverse=reverse, backend=backend)
    assert torch.allclose(found, masked(*given, reverse))


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n, f, m", [(1, 5, 7), (64, 16, 16), (150, 70, 65), (197, 33, 130)])
def test_kernels_equal_the_masked_matrix(n, f, m, reverse, monkeypatch):
    def run(dtype, backend):
        leaves = [t.to(dtype).requires_grad_() for t in given]
        out = causal_product(*leaves, reverse=reverse, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    given = inputs(n, f, m, leading=(2,))
    for entries in (2**27, 1):  # all heads at once, and one at a time
        path = "xattn.kernels.causal_product.triton.tile_entries"
        monkeypatch.setattr(path, lambda *_, entries=entries: entries)
        for found, true in zip(
            run(torch.float32, "triton"), run(torch.float64, "reference"), strict=True
        ):
            assert (found.double() - true).abs().max() <= 1e-5 * true.abs().max()


@pytest.mark.parametrize("leading", [(), (5,), (3, 70), (2, 1, 3)])
def test_any_leading_dimensions_and_strides(leading):
    left, right, x = inputs(100, 4, 3, leading=leading)
    assert torch.allclose(causal_product(left, right, x), masked(left, right, x))
    strided = [t.transpose(-2, -1).contiguous().transpose(-2, -1) for t in (left, right, x)]
    assert torch.allclose(causal_product(*strided), masked(left, right, x))
    one = x[..., :1].expand_as(x)
    assert torch.allclose(causal_product(left, right, one), masked(left, right, one))


@pytest.mark.parametrize("reverse", [False, True])
def test_sums_over_chunks_on_a_gpu_are_those_on_a_cpu(reverse):
    sums, carried = torch.randn(2, 5, 3, 4).double(), torch.randn(2, 3, 4).double()
    for found, true in zip(
        cpu.cumulative_sums(sums, carried, reverse),
        cpu._running_sums(sums, carried, reverse),
        strict=True,
    ):
        assert torch.allclose(found, true)


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that is no view."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and func._schema.returns[0].alias_info is None:
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize("heads, n, f", [(4, 2**20, 64), (2**14, 256, 64), (2, 64, 2**12)])
def test_on_a_gpu_few_enough_chunks_for_its_memory_are_multiplied_at_once(heads, n, f):
    left, x = (torch.empty(heads, n, w, dtype=torch.float64, device="meta") for w in (f, 1))
    with Largest() as made:
        cpu.forward(Problem(left, left, x, False, "cpu"))
    assert n * heads < made.most <= ENTRIES


def test_the_transposed_product_is_a_reversed_one():
    left, right, _ = inputs(70, 4, 1)
    r = torch.randn(2, 3, 6, 70, dtype=torch.float64)
    found = causal_product(right, left, r.transpose(-2, -1), reverse=True).transpose(-2, -1)
    assert torch.allclose(found, r @ (left @ right.transpose(-2, -1)).tril())


@pytest.mark.parametrize("n", [45, SPAN + 40])
def test_no_gradient_and_no_bit_comes_from_later_tokens(n):
    given = inputs(n, 4, 3, dtype=torch.float32)
    i = n - 20
    leaves = [x.clone().requires_grad_() for x in given]
    whole = causal_product(*leaves)
    for grad in torch.autograd.grad(whole[..., : i + 1, :].sum(), leaves):
        assert (grad[..., i + 1 :, :] == 0).all() and (grad[..., i, :] != 0).any()
    for x in given[1:]:
        x[..., i + 1 :, :] *= 1000
    assert torch.equal(causal_product(*given)[..., : i + 1, :], whole[..., : i + 1, :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype):
    given = inputs(2 * SPAN, 4, 1, dtype=dtype)
    given[1], given[2] = given[1].abs(), given[2].abs() + 0.5  # sums far beyond 8 bits
    exact = masked(*(x.double() for x in given))
    leaves = [x.requires_grad_() for x in given]
    found = causal_product(*leaves)
    assert found.dtype == dtype
    error = (found.double() - exact).abs() / (exact.abs() + 1e-2 * exact.abs().max())
    assert error.max() < torch.finfo(dtype).eps
    assert all(x.dtype == dtype for x in torch.autograd.grad(found.sum(), leaves))


def test_autocast_leaves_its_sums_alone():
    given = inputs(70, 4, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(causal_product(*given), causal_product(*given))
        found = causal_product(*given)
    assert torch.equal(found, causal_product(*given)) and found.dtype == torch.float32


def test_memory_grows_with_tokens_and_not_with_their_square():
    def peak(n):
        leaves = [x.requires_grad_() for x in inputs(n, 8, 8, leading=(2,), dtype=torch.float32)]
        g = torch.ones_like(leaves[0])
        return peak_memory(lambda: torch.autograd.grad(causal_product(*leaves), leaves, g))

    assert peak(8 * SPAN) < 3 * peak(4 * SPAN) < 9 * 4 * 2 * 8 * 4 * SPAN * 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"left": torch.zeros(4)}, r"left: got shape \(4,\)"),
        ({"right": torch.zeros(2, 9, 5)}, r"right: got shape \(2, 9, 5\); left has \(2, 9, 4\)"),
        ({"x": torch.zeros(2, 8, 3)}, r"x: got shape \(2, 8, 3\); left needs \(2, 9, m\)"),
        ({"x": torch.zeros(2, 9, 3).double()}, "x: got torch.float64"),
        (
            {name: torch.zeros(2, 9, 4).double() for name in ("left", "right", "x")}
            | {"backend": "triton"},
            "backend='triton': got torch.float64",
        ),
        ({"backend": "gpu"}, "backend: got 'gpu'"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    given = {"left": torch.zeros(2, 9, 4), "right": torch.zeros(2, 9, 4), "x": torch.zeros(2, 9, 3)}
    with pytest.raises(ValueError, match=message):
        causal_product(**{**given, **change})
