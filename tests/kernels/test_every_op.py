"""What holds for every op alike: gradients, half precision, torch's rules, layouts, memory that is not clean.

Each case gives the op's tensors in float64 and a call of it by a backend; gradients are asked of all tensors.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xattn.kernels.backend import HAS_TRITON
from xattn.kernels.block_sparse import block_sparse_attention, window
from xattn.kernels.block_topk import block_topk
from xattn.kernels.causal_product import causal_product
from xattn.kernels.covariance_solve import covariance_solve
from xattn.kernels.flows import flows
from xattn.kernels.grouped import grouped_attention
from xattn.kernels.local_linear import local_linear
from xattn.kernels.op import LAYOUTS
from xattn.kernels.pooling import softmax_pooling
from xattn.kernels.ragged_queries import ragged_attention
from xattn.kernels.softmax import softmax_attention
from xattn.kernels.softplus import softplus_attention
from xattn.kernels.vecmat import gradient_vecmat, vecmat

WIDE = {
    "lse",
    "features",
    "mean",
    "slope",
    "right",
    "ridge",
}  # in float32 where the rest is in half
INDEX = torch.tensor([[0, 3, -1], [1, 2, 4], [5, -1, -1]], dtype=torch.int32)[None, None]


def normal(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def attention(heads=2, key_heads=2, n=21, s=23, bias=None):
    given = {"q": normal(1, heads, n, 16), "k": normal(1, key_heads, s, 16)}
    given["v"] = normal(1, key_heads, s, 24)
    return given if bias is None else {**given, "bias": normal(*bias)}


def weights(**options):
    """Queries and keys, their log-sum-exp, and what the linear ops read beside them."""
    given = attention(n=21, s=21)
    given["features"] = normal(1, 2, 21, 17)[..., :16]
    q, k, features = given["q"], given["k"], given["features"]
    given["mean"], given["lse"] = softmax_attention(q, k, features, **options)
    return given


def solve(x, backend):
    exact = x["q"].dtype == torch.float64
    options = {"iterations": 40, "tolerance": 1e-14} if exact else {"iterations": 4}
    return covariance_solve(**x, causal=True, backend=backend, **options)


def take(given, names):
    return {name: given[name] for name in names.split()}


def lists(x):
    return {**x, "index": INDEX, "q_block": 8, "k_block": 4}


KEEP = (torch.arange(42).reshape(1, 2, 21) % 5 < 2) & (torch.arange(21) > 4)
LINEAR = weights(causal=True)
LSE = take(LINEAR, "q k lse")
CASES = {
    "softmax": (attention(4, 2, bias=(1, 1, 1, 23)), softmax_attention),
    "softmax, a bias of scores": (attention(bias=(1, 2, 21, 23)), softmax_attention),
    "softmax, causal": (attention(4, 2, s=21), lambda **x: softmax_attention(**x, causal=True)),
    "block_sparse": (
        attention(4, 2, n=21, s=21, bias=(1, 2, 21)),
        lambda **x: block_sparse_attention(**lists(x), box=window(21, 9, 9)),
    ),
    "grouped": (
        {**attention(4, 2, n=21, s=21, bias=(1, 2, 21)), "marks": normal(1, 2, 6, 16)},
        lambda **x: grouped_attention(**lists(x), weight=torch.arange(1.0, 7)),
    ),
    "block_sparse, all of the lists": (
        attention(4, 2, n=21, s=21),
        lambda **x: block_sparse_attention(**lists(x)),
    ),
    "grouped, all alike": (
        {**attention(4, 2, n=21, s=21), "marks": normal(1, 2, 6, 16)},
        lambda **x: grouped_attention(**lists(x)),
    ),
    "ragged_queries": (attention(2, 1, s=21), lambda **x: ragged_attention(**x, keep=KEEP)),
    "vecmat": (
        {**LSE, "r": normal(1, 2, 3, 21), "bias": 0.1 * normal(1, 2, 21, 21)},
        lambda **x: vecmat(**x, causal=True),
    ),
    "vecmat, by gradients": (
        {**LSE, "v": LINEAR["v"], "grad": normal(1, 2, 21, 24), "r": normal(1, 1, 21)},
        lambda **x: gradient_vecmat(**x, causal=True),
    ),
    "covariance_solve": (
        {
            **take(LINEAR, "q k features lse mean"),
            "right": normal(1, 2, 21, 16),
            "ridge": normal(1, 2, 21).abs() + 0.5,
        },
        lambda backend, **x: solve(x, backend),
    ),
    "local_linear": (
        {**LINEAR, "slope": normal(1, 2, 21, 16)},
        lambda **x: local_linear(**x, causal=True),
    ),
    "pooling": (
        {"q": normal(1, 6, 16), "k": normal(2, 21, 16), "v": normal(2, 2, 21, 24)}
        | {"bias": normal(2, 6, 21)},
        softmax_pooling,
    ),
    "pooling, of scores": (
        {"v": normal(2, 2, 21, 24), "bias": normal(2, 6, 21)},
        lambda **x: softmax_pooling(None, None, **x),
    ),
    "softplus": (
        take(attention(s=21), "q k v"),
        lambda **x: softplus_attention(**x, scale=0.5, power=3, offset=1.0, causal=True),
    ),
    "causal_product": (
        {"left": normal(2, 21, 5), "right": normal(2, 21, 5), "x": normal(2, 21, 7)},
        causal_product,
    ),
    "flows": ({"q": normal(1, 2, 21, 8).abs(), "k": normal(1, 2, 23, 8).abs()}, flows),
    "flows, causal": (
        {"q": normal(1, 2, 21, 8).abs(), "k": normal(2, 21, 8)[None].abs()},
        lambda **x: flows(**x, causal=True),
    ),
    "block_topk": (
        take(attention(4, 2), "q k"),
        lambda **x: block_topk(**x, s=5, q_block=4, softmax=True),
    ),
}
assert {name.split(",")[0] for name in CASES} == set(LAYOUTS)
WITHOUT_TRITON = {"flows", "flows, causal"}
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
    """The case's tensors in ``dtype``, or those of ``WIDE`` in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    single = {"softplus": {"q", "k"}, "causal_product": set()}.get(name, WIDE)
    return {key: x.to(wide if key in single else dtype) for key, x in CASES[name][0].items()}


def run(name, backend, given):
    """Outputs, and the gradients of a fixed sum of them."""
    leaves = {key: x.detach().requires_grad_() for key, x in given.items()}
    out = CASES[name][1](**leaves, backend=backend)
    out = list(out) if isinstance(out, tuple) else [out]
    if name == "block_topk":
        return [x.detach() for x in out]
    finite = [x.masked_fill(x.isneginf(), 0.0) for x in out]
    total = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in finite)
    return [*(x.detach() for x in finite), *torch.autograd.grad(total, list(leaves.values()))]


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
    if (name, backend, dtype) == ("softplus", "triton", torch.bfloat16):
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
