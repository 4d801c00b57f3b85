"""What holds for every op alike: gradients, half precision, torch's rules, layouts, memory that is not clean.

Each case gives the op's tensors in float64 and a call of it by a backend; gradients are asked of all tensors.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xattn.eval.bench.op_cases import (
    WITHOUT_TRITON,
    cast_case,
    op_cases,
    outputs_and_gradients,
)
from xattn.kernels.backend import HAS_TRITON, interpreted
from xattn.kernels.op import LAYOUTS

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


CASES = {name: make() for name, make in op_cases(normal).items()}
assert {name.split(",")[0] for name in CASES} == set(LAYOUTS)
TRITON = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def by_backend(*backends, without=()):
    """Every case by each of ``backends`` that it has."""
    return pytest.mark.parametrize(
        "name, backend",
        [
            pytest.param(name, backend, marks=[TRITON] if backend == "triton" else [])
            for name in CASES
            for backend in backends
            if name not in without and not (backend == "triton" and name in WITHOUT_TRITON)
        ],
    )


def tensors_of(name, dtype):
    return cast_case(name, CASES[name][0], dtype)


def run(name, backend, given):
    """Outputs, and the gradients of a fixed sum of them."""
    return outputs_and_gradients(name, CASES[name][1], backend, given)


@by_backend("reference", "cpu", without={"block_topk"})
def test_gradients_are_right(name, backend):
    given = {key: x.requires_grad_() for key, x in tensors_of(name, torch.float64).items()}

    def finite(*tensors):
        out = CASES[name][1](**dict(zip(given, tensors, strict=True)), backend=backend)
        out = out if isinstance(out, tuple) else (out,)
        return tuple(x.masked_fill(x.isneginf(), 0.0) for x in out)

    options = {"fast_mode": True, "atol": 1e-5}
    assert torch.autograd.gradcheck(finite, list(given.values()), **options)
    if name in {"pooling", "causal_product", *WITHOUT_TRITON}:
        assert torch.autograd.gradgradcheck(finite, list(given.values()), **options)


@by_backend("cpu", "triton", without={"covariance_solve", "block_topk"})
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_as_the_definition(name, backend, dtype):
    if interpreted() and (name, backend, dtype) == ("softplus", "triton", torch.bfloat16):
        pytest.skip("the interpreter multiplies the bits of bfloat16 as integers")
    given = tensors_of(name, dtype)
    exact = run(name, "reference", {key: x.double() for key, x in given.items()})
    near, found = (run(name, path, given) for path in ("reference", backend))
    for at, (value, other, true) in enumerate(zip(found, near, exact, strict=True)):
        assert value.dtype == other.dtype
        error = (other.double() - true).abs().max()
        slack = 1e-4 if at == 0 and name.startswith("vecmat") else 1e-2
        assert (value.double() - true).abs().max() <= 3 * error + slack * true.abs().max()
    op = name.split(",")[0]
    if op in ("softmax", "block_sparse", "grouped", "ragged_queries", "pooling"):
        assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    if op == "vecmat":
        assert found[0].dtype == torch.float32


class Asked(TorchDispatchMode):
    """Our ops that run inside, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "xattn" and func._opname.endswith("_forward"):
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


# What differs between the backends; how an op is differentiated and compiled does not.
EACH = ("test_schema", "test_faketensor")


@by_backend("reference", "cpu", "triton")
def test_it_keeps_torchs_rules_and_compiles(name, backend):
    given, call = tensors_of(name, torch.float32), CASES[name][1]
    with Asked() as asked, torch.no_grad():
        call(**given, backend=backend)
    for func, args in asked.calls:
        fields = LAYOUTS[func._opname.removesuffix("_forward")][1]
        leaves = [
            x.detach().clone().requires_grad_(i in fields) if isinstance(x, torch.Tensor) else x
            for i, x in enumerate(args)
        ]
        rules = {} if backend == "cpu" else {"test_utils": EACH}
        torch.library.opcheck(func, tuple(leaves), **rules)
    if backend != "cpu":
        return
    leaves = [x.requires_grad_() for x in given.values()]
    torch._dynamo.reset()

    def first(*tensors):
        out = call(**dict(zip(given, tensors, strict=True)), backend=backend)
        return out[0] if isinstance(out, tuple) else out

    compiled = torch.compile(first, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*leaves), first(*leaves), atol=1e-5)


@TRITON
@pytest.mark.parametrize("name", sorted(set(CASES) - WITHOUT_TRITON))
def test_programs_lie_on_the_first_axis_which_alone_has_room_for_many_heads(name, monkeypatch):
    if not interpreted():
        pytest.skip("grids are noted in Triton's interpreter")
    from triton.runtime.interpreter import InterpretedFunction

    grids, launch = [], InterpretedFunction.__getitem__
    noted = lambda kernel, grid: (grids.append(grid), launch(kernel, grid))[1]  # noqa: E731
    monkeypatch.setattr(InterpretedFunction, "__getitem__", noted)
    run(name, "triton", tensors_of(name, torch.float32))
    assert grids and all(len(grid) == 1 for grid in grids)


def filled(make):
    """``make``, whose new tensors hold nothing of use."""

    def made(*args, **options):
        x = make(*args, **options)
        return x.fill_(torch.nan if x.is_floating_point() else -7)

    return made


@by_backend("cpu", "triton")
def test_memory_needs_no_filling_before_and_two_runs_agree_to_the_bit(name, backend, monkeypatch):
    given = tensors_of(name, torch.float32)
    expected = run(name, backend, given)
    for owner, make in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, make, filled(getattr(owner, make)))
    for found, true in zip(run(name, backend, given), expected, strict=True):
        assert torch.equal(found, true)


@by_backend("cpu", "triton")
def test_any_layout_of_the_inputs_gives_the_same(name, backend):
    given = tensors_of(name, torch.float32)
    for key in {"v", "x"} & set(given):  # all tokens are alike, and lie in one place
        given[key] = given[key][..., :1, :].expand_as(given[key])
    plain = run(name, backend, {key: x.contiguous() for key, x in given.items()})
    for key in set(given) - {"v", "x"}:
        given[key] = given[key].transpose(-2, -1).contiguous().transpose(-2, -1)
    for found, expected in zip(run(name, backend, given), plain, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
