"""Grouped attention: what it is by its equations, its limits, and that the fast paths equal the definition."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from xattn.kernels.backend import HAS_TRITON
from xattn.kernels.grouped import grouped_attention
from xattn.kernels.softmax import softmax_attention

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))
FAST = ["cpu", TRITON]


def lists(generator, batch, heads, rows, s, blocks, holes=0.2):
    """Random rows of different blocks; some entries are empty."""
    order = torch.rand(batch, heads, rows, blocks, generator=generator).argsort(-1)[..., :s]
    index = F.pad(order, (0, s - order.shape[-1]), value=-1)
    return index.masked_fill(torch.rand(index.shape, generator=generator) < holes, -1).int()


def inputs(n, s, d, k_block, *, dv=None, heads=(2, 2), bias=None, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    dv = dv or d
    q, k = normal(batch, heads[0], n, d), normal(batch, heads[1], s, d)
    v, m = normal(batch, heads[1], s, dv), normal(batch, heads[1], -(-s // k_block), d)
    b = None if bias is None else normal(*bias, s)
    return (q, k, v, m, b), (normal(batch, heads[0], n, dv), normal(batch, heads[0], n)), generator


def run(backend, args, index, grads, **options):
    """o, lse and all gradients, with a gradient into both outputs."""
    q, k, v, m, bias = (None if a is None else a.detach().clone().requires_grad_() for a in args)
    o, lse = grouped_attention(q, k, v, m, index, bias=bias, backend=backend, **options)
    finite = torch.where(lse.isneginf(), 0.0, lse)
    ((o * grads[0]).sum() + (finite * grads[1]).sum()).backward()
    return [o, lse, *(a.grad for a in (q, k, v, m, bias) if a is not None)]


def every_block(n, s, q_block, k_block):
    return torch.arange(-(-s // k_block)).expand(1, 1, -(-n // q_block), -1).int()


def assert_near(found, expected, atol):
    for value, true in zip(found, expected, strict=True):
        assert torch.equal(value.isneginf(), true.isneginf())
        value, true = (x.double().nan_to_num(neginf=0.0) for x in (value, true))
        assert torch.allclose(value, true, rtol=1e-5, atol=atol), (value - true).abs().max()


CASES = [  # n, s, d, dv, heads, list (batch, heads), bias (batch, heads), q_block, k_block, entries
    (17, 17, 16, None, (2, 2), (2, 2), None, 4, 4, 3),
    (63, 33, 16, 24, (4, 2), (1, 4), (2, 4), 16, 8, 3),
    (11, 11, 16, None, (4, 2), (1, 2), (1, 1), 1, 5, 2),
    (16, 17, 24, None, (4, 1), (2, 1), (2, 1), 7, 1, 4),
    (101, 70, 64, 16, (1, 1), (1, 1), None, 64, 49, 2),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"n{c[0]}-q{c[7]}-k{c[8]}-heads{c[4]}")
@pytest.mark.parametrize("backend", FAST)
def test_fast_paths_equal_the_reference_forward_and_backward(backend, case):
    n, s, d, dv, heads, kind, bias, q_block, k_block, entries = case
    args, grads, generator = inputs(
        n, s, d, k_block, dv=dv, heads=heads, bias=bias, batch=max(kind[0], (bias or (1,))[0])
    )
    index = lists(generator, *kind, -(-n // q_block), entries, -(-s // k_block))
    index[:, :, 0] = -1  # a query block that reads nothing
    if args[4] is not None:
        args[4][..., 2] = -torch.inf
        args[4][..., k_block : 2 * k_block] = -torch.inf  # a block without a key to see
    weight = torch.rand(args[3].shape[2], generator=generator) + 0.5
    options = {"q_block": q_block, "k_block": k_block, "weight": weight if bias else None}
    expected = run("reference", args, index, grads, **options)
    if backend == "cpu":
        assert_near(run(backend, args, index, grads, **options), expected, 1e-11)
    single = [None if a is None else a.float() for a in args]
    found = run(backend, single, index, grads, **options)
    assert all(x.dtype == torch.float32 for x in found)
    assert_near(found, expected, 3e-5)
    assert expected[1].isneginf().any() and not any(x.isnan().any() for x in found)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_parts_of_a_long_list_add_up(monkeypatch):
    from xattn.kernels.block_sparse import triton as kernels

    monkeypatch.setattr(kernels, "PART", 8)
    args, grads, generator = inputs(
        32, 45, 16, 5, heads=(2, 1), bias=(1, 1), batch=1, dtype=torch.float32
    )
    index = lists(generator, 1, 1, 32, 2, 9)
    index[..., 0] = torch.where((index == 0).any(-1), index[..., 0], 0)  # read by all
    expected = run(
        "reference", [x.double() for x in args], index, grads, q_block=1, k_block=5
    )  # fmt: skip
    assert_near(run("triton", args, index, grads, q_block=1, k_block=5), expected, 3e-5)


def test_the_definition_is_softmax_within_and_over_blocks():
    (q, k, v, m, bias), _, generator = inputs(5, 11, 4, 3, heads=(4, 2), bias=(1, 2))
    index = lists(generator, 2, 2, 3, 3, 4)
    index[:, :, 1] = torch.tensor([3, 0, -1])
    weight = torch.tensor([1.0, 3.0, 0.5, 2.0])
    o, lse = grouped_attention(
        q, k, v, m, index, q_block=2, k_block=3, bias=bias, weight=weight, backend="reference"
    )
    for b, h, i in itertools.product(range(2), range(4), range(5)):
        g = h // 2
        blocks = [c for c in index[b, g, i // 2].tolist() if c >= 0]
        gates = [q[b, h, i] @ m[b, g, c] / 2 + weight[c].log() for c in blocks]
        gates = torch.stack(gates or [q.new_tensor(-torch.inf)])
        assert torch.allclose(lse[b, h, i], gates.logsumexp(0))
        y = torch.zeros(4, dtype=q.dtype)
        for c, share in zip(blocks, gates.softmax(0), strict=False):
            cell = slice(3 * c, 3 * c + 3)
            w = (k[b, g, cell] @ q[b, h, i] / 2 + bias[0, g, cell]).softmax(0)
            y += share * (w @ v[b, g, cell])
        assert torch.allclose(o[b, h, i], y)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_equal_keys_in_a_block_with_their_number_as_weight_give_dense_attention(backend):
    q, k, v = inputs(9, 11, 16, 4, dtype=torch.float32)[0][:3]
    m = k[:, :, ::4]
    k = m.repeat_interleave(4, 2)[:, :, :11]
    found = grouped_attention(
        q, k, v, m, every_block(9, 11, 4, 4), q_block=4, k_block=4,
        weight=torch.tensor([4.0, 4.0, 3.0]), backend=backend,
    )  # fmt: skip
    assert_near(found, softmax_attention(q, k, v, backend="reference"), 2e-5)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_one_block_needs_no_landmark(backend):
    args, grads, _ = inputs(9, 6, 16, 6, dtype=torch.float32)
    index = every_block(9, 6, 4, 6)
    found = run(backend, args, index, grads, q_block=4, k_block=6)
    q, k, v, m = args[:4]
    assert torch.allclose(found[0], softmax_attention(q, k, v)[0], atol=1e-5)
    assert torch.allclose(found[1], (q @ m.mT)[..., 0] / 4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_nothing_to_see_gives_zero_minus_infinity_and_no_gradient(backend):
    args, grads, _ = inputs(9, 9, 16, 4, bias=(1, 1), dtype=torch.float32)
    empty = torch.full((1, 1, 3, 2), -1, dtype=torch.int32)
    found = run(backend, args, empty, grads, q_block=4, k_block=4)
    assert (found[1] == -torch.inf).all()
    assert all((x == 0).all() for x in (found[0], *found[2:]))


@pytest.mark.parametrize("shared", [True, False])
def test_chunks_of_any_size_agree(shared, monkeypatch):
    from xattn.kernels.grouped import cpu as cpu_path

    args, grads, generator = inputs(37, 37, 16, 4, heads=(4, 2), bias=(2, 2))
    index = lists(generator, *((1, 1) if shared else (2, 2)), 5, 6, 10)
    options = {"q_block": 8, "k_block": 4}
    expected = run("cpu", args, index, grads, **options)
    for problems in (1, 3, 100):
        monkeypatch.setattr(cpu_path, "FORWARD", problems * 6 * 4 * 32 * 8)
        monkeypatch.setattr(cpu_path, "BACKWARD", problems * 6 * 4 * 32 * 8)
        assert_near(run("cpu", args, index, grads, **options), expected, 1e-11)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(1, 4, 9, 16)}, "k: got shape .* heads that divide its 2"),
        ({"marks": torch.zeros(1, 2, 2, 16)}, r"marks: got shape .*; give \(1, 2, 3, 16\)"),
        ({"marks": torch.zeros(1, 2, 3, 16).double()}, "marks: got torch.float64"),
        ({"index": torch.zeros(1, 1, 2, 2).int()}, r"index: got shape .*give .* 3, s\)"),
        ({"index": torch.full((1, 1, 3, 1), 3).int()}, "index: got the block 3"),
        ({"index": torch.zeros(1, 1, 3, 2).int()}, "index: block 0 is twice"),
        ({"bias": torch.zeros(1, 1, 8)}, "bias: got shape"),
        ({"weight": torch.ones(2)}, r"weight: got shape \(2,\); give \(3,\)"),
        ({"weight": torch.ones(3).long()}, "weight: got torch.int64"),
        ({"q_block": 0}, "q_block, k_block: got 0, 4"),
        ({"backend": "cuda"}, "backend: got 'cuda'"),
    ],
)
def test_arguments_that_do_not_match_are_named(change, message):
    q = torch.zeros(1, 2, 9, 16)
    options = {
        "q": q, "k": q, "v": q, "marks": torch.zeros(1, 2, 3, 16),
        "index": torch.zeros(1, 1, 3, 1).int(), "q_block": 4, "k_block": 4,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        grouped_attention(**options)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_triton_refuses_what_it_has_no_tile_for():
    q, index = torch.zeros(1, 1, 80, 144), torch.zeros(1, 1, 20, 1).int()
    with pytest.raises(ValueError, match="backend='triton': got width 144"):
        grouped_attention(q, q, q, q[:, :, ::4], index, q_block=4, k_block=4, backend="triton")
    with pytest.raises(ValueError, match="backend='triton': got key blocks of 80"):
        grouped_attention(q, q, q, q[:, :, :1], index, q_block=4, k_block=80, backend="triton")
