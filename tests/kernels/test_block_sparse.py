"""Attention over lists of key blocks: limits, boxes, and that the fast paths equal the definition."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from xattn.kernels.backend import HAS_TRITON
from xattn.kernels.block_sparse import block_sparse_attention
from xattn.kernels.block_sparse import cpu as cpu_path
from xattn.kernels.block_sparse.block_lists import check_index, transpose_index
from xattn.kernels.block_sparse.box import Box, causal, neighbourhood, permute, window
from xattn.kernels.block_sparse.reference import box_mask, visible_mask
from xattn.kernels.softmax import softmax_attention

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))
FAST = ["cpu", TRITON]


def lists(generator, batch, heads, rows, s, blocks, holes=0.2):
    """Random rows of different blocks; some entries are empty."""
    order = torch.rand(batch, heads, rows, blocks, generator=generator).argsort(-1)[..., :s]
    index = F.pad(order, (0, s - order.shape[-1]), value=-1)
    return index.masked_fill(torch.rand(index.shape, generator=generator) < holes, -1).int()


def inputs(n, s, d, dv=None, *, heads=(2, 2), bias=None, batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    dv = dv or d
    q, k = normal(batch, heads[0], n, d), normal(batch, heads[1], s, d)
    v, b = normal(batch, heads[1], s, dv), None if bias is None else normal(*bias, s)
    grads = normal(batch, heads[0], n, dv), normal(batch, heads[0], n)
    return (q, k, v, b), grads, generator


def run(backend, args, index, grads, **options):
    """o, lse and all gradients, with a gradient into both outputs."""
    q, k, v, bias = (None if a is None else a.detach().clone().requires_grad_() for a in args)
    o, lse = block_sparse_attention(q, k, v, index, bias=bias, backend=backend, **options)
    finite = torch.where(lse.isneginf(), 0.0, lse)
    ((o * grads[0]).sum() + (finite * grads[1]).sum()).backward()
    return [o, lse, *(a.grad for a in (q, k, v, bias) if a is not None)]


def every_block(n, s, q_block, k_block):
    return torch.arange(-(-s // k_block)).expand(1, 1, -(-n // q_block), -1).int()


def assert_near(found, expected, atol):
    for value, true in zip(found, expected, strict=True):
        assert torch.equal(value.isneginf(), true.isneginf())
        value, true = (x.double().nan_to_num(neginf=0.0) for x in (value, true))
        assert torch.allclose(value, true, rtol=1e-5, atol=atol), (value - true).abs().max()


CASES = [  # n, s, d, dv, heads, list (batch, heads), bias (batch, heads), q_block, k_block, entries, box
    (17, 17, 16, None, (2, 2), (2, 2), None, 4, 4, 3, None),
    (63, 33, 16, 24, (4, 2), (1, 4), (2, 4), 16, 8, 3, None),
    (63, 63, 16, None, (2, 2), (1, 1), (2, 2), 8, 1, 20, lambda: causal(63)),
    (63, 63, 32, None, (4, 2), (1, 2), (1, 1), 16, 16, 3, lambda: window(63, 20, 3)),
    (17, 17, 16, None, (2, 1), (2, 1), None, 1, 5, 2, lambda: causal(17)),
    (21, 21, 16, 24, (8, 2), (2, 2), (1, 2), 3, 4, 4, lambda: causal(21)),
    (
        30,
        30,
        16,
        None,
        (4, 1),
        (1, 4),
        (2, 1),
        7,
        3,
        9,
        lambda: neighbourhood((5, 6), (3, 2), (2, 1), (1, 2)),
    ),
    (201, 197, 64, 16, (1, 1), (1, 1), None, 64, 64, 3, None),
    (197, 197, 128, None, (1, 1), (1, 1), (1, 1), 49, 49, 3, None),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"n{c[0]}-q{c[7]}-k{c[8]}-heads{c[4]}")
@pytest.mark.parametrize("backend", FAST)
def test_fast_paths_equal_the_reference_forward_and_backward(backend, case):
    n, s, d, dv, heads, kind, bias, q_block, k_block, entries, box = case
    batch = 1 if n > 100 else 2
    args, grads, generator = inputs(n, s, d, dv, heads=heads, bias=bias, batch=batch)
    index = lists(generator, *kind, -(-n // q_block), entries, -(-s // k_block))
    index[:, :, 0] = -1  # a query block that reads nothing
    if args[3] is not None:
        args[3][..., 2] = -torch.inf
    options = {"q_block": q_block, "k_block": k_block, "box": box and box()}
    expected = run("reference", args, index, grads, **options)
    if backend == "cpu":
        found = run(backend, args, index, grads, **options)
        assert_near(found, expected, 1e-11)
    single = [None if a is None else a.float() for a in args]
    found = run(backend, single, index, grads, **options)
    assert all(x.dtype == torch.float32 for x in found)
    assert_near(found, expected, 3e-5)
    assert expected[1].isneginf().any() and not any(x.isnan().any() for x in found)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_query_sees_keys_up_to_its_rank_and_its_own(backend, heads):
    args, grads, generator = inputs(37, 37, 16, heads=heads, bias=(2, heads[0]))
    rank = torch.rand(2, heads[0], 37, generator=generator).argsort(-1).int()
    limit = torch.randint(-1, 37, rank.shape, generator=generator).int()
    index = lists(generator, 2, heads[0], 3, 30, 37)
    seen = torch.zeros(2, heads[0], 37, 37, dtype=torch.bool)
    for b, h, i in itertools.product(range(2), range(heads[0]), range(37)):
        for j in index[b, h, i // 16].tolist():
            seen[b, h, i, j] |= 0 <= j <= i and (j == i or bool(rank[b, h, j] <= limit[b, h, i]))
    q, k, v, bias = (a.detach().clone().requires_grad_() for a in args)
    each = [x.repeat_interleave(heads[0] // 2, 1) for x in (k, v)]
    o, lse = softmax_attention(
        q, *each, torch.where(seen, bias[:, :, None], -torch.inf), backend="reference"
    )
    ((o * grads[0]).sum() + (torch.where(lse.isneginf(), 0.0, lse) * grads[1]).sum()).backward()
    options = {
        "q_block": 16, "k_block": 1, "box": causal(37)._replace(rank=rank, limit=limit)
    }  # fmt: skip
    if backend == "triton":
        args, grads = ([a.float() for a in x] for x in (args, grads))
    found = run(backend, args, index, grads, **options)
    assert_near(found, [o, lse, *(a.grad for a in (q, k, v, bias))], 3e-5)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("own", [False, True])
def test_parts_of_a_long_list_add_up(own, monkeypatch):
    from xattn.kernels.block_sparse import triton as kernels

    monkeypatch.setattr(kernels, "PART", 8)
    monkeypatch.setattr(kernels, "TILE", 4)  # units of the lists at a time
    args, grads, generator = inputs(
        32, 288, 16, heads=(2, 1), bias=(1, 2), batch=1, dtype=torch.float32
    )
    index = lists(generator, 1, 2 if own else 1, 32, 2, 9)
    index[..., 0] = torch.where((index == 0).any(-1), index[..., 0], 0)  # read by all
    options = {"q_block": 1, "k_block": 32}
    pointer = transpose_index(index, 9)[0]
    problem = block_sparse_attention.problem(*args[:3], index, **options)
    parts = kernels.split_lists(problem, pointer, 64)
    each = -(-pointer.diff(dim=2).amax(1) // parts.length).clamp_max(-1)
    assert each.max() > 1 and torch.equal(parts.first.diff(dim=1), each)
    unit = torch.arange(9).repeat_interleave(each[0])
    assert torch.equal(parts.unit[0, : len(unit)], unit.int())
    expected = run("reference", [x.double() for x in args], index, grads, **options)
    assert_near(run("triton", args, index, grads, **options), expected, 3e-5)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_selecting_every_block_equals_dense(backend):
    args, grads, _ = inputs(33, 45, 16, dtype=torch.float32)
    options = {"q_block": 8, "k_block": 16}
    found = run(backend, args, every_block(33, 45, 8, 16), grads, **options)
    leaves = [a.detach().requires_grad_() for a in args[:3]]
    o, lse = softmax_attention(*leaves, backend="reference")
    ((o * grads[0]).sum() + (lse * grads[1]).sum()).backward()
    assert_near(found, [o, lse, *(a.grad for a in leaves)], 2e-5)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("backend", FAST)
def test_prefix_tokens_merge_as_a_segment_of_their_own(backend, prefix):
    """Selected patches and prefix keys, merged by lse, are one softmax over both."""
    args, grads, generator = inputs(24, 24 + prefix, 16, heads=(1, 1), batch=1, dtype=torch.float32)
    q, k, v = (a.detach().requires_grad_() for a in args[:3])
    index = lists(generator, 1, 1, 3, 2, 6, holes=0.0)
    parts = [
        block_sparse_attention(
            q, k[:, :, prefix:], v[:, :, prefix:], index, q_block=8, k_block=4, backend=backend
        )
    ]
    if prefix:
        parts.append(softmax_attention(q, k[:, :, :prefix], v[:, :, :prefix], backend=backend))
    share = torch.stack([p[1] for p in parts]).softmax(0)[..., None]
    merged = (share * torch.stack([p[0] for p in parts])).sum(0)
    merged.backward(grads[0])
    seen = torch.zeros(24, 24 + prefix, dtype=torch.bool)
    seen[:, :prefix] = True
    for i, j in itertools.product(range(24), range(24)):
        seen[i, prefix + j] = j // 4 in index[0, 0, i // 8]
    leaves = [a.double().detach().requires_grad_() for a in args[:3]]
    true = F.scaled_dot_product_attention(*leaves, attn_mask=seen)
    true.backward(grads[0].double())
    expected = [true, *(a.grad for a in leaves)]
    assert_near([merged, q.grad, k.grad, v.grad], expected, 2e-5)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_nothing_to_see_gives_zero_minus_infinity_and_no_gradient(backend):
    args, grads, _ = inputs(9, 9, 16, bias=(1, 1), dtype=torch.float32)
    empty = torch.full((1, 1, 3, 2), -1, dtype=torch.int32)
    found = run(backend, args, empty, grads, q_block=4, k_block=4)
    assert (found[1] == -torch.inf).all()
    assert all((x == 0).all() for x in (found[0], *found[2:]))
    hidden = Box(*(torch.full((9, 1), x, dtype=torch.int32) for x in (1, 0, 0)), (1,))
    found = run(backend, args, every_block(9, 9, 4, 4), grads, q_block=4, k_block=4, box=hidden)
    assert (found[1] == -torch.inf).all()
    assert all((x == 0).all() for x in (found[0], *found[2:]))


@pytest.mark.parametrize("shared", [True, False])
def test_chunks_of_any_size_and_a_build_without_the_fused_kernel_agree(shared, monkeypatch):
    args, grads, generator = inputs(37, 37, 16, heads=(4, 2), bias=(2, 2))
    index = lists(generator, *((1, 1) if shared else (2, 2)), 5, 6, 10)
    options = {"q_block": 8, "k_block": 4, "box": causal(37)}
    expected = run("cpu", args, index, grads, **options)
    for problems in (1, 3, 100):  # the last block is read by some chunks and not by others
        size = problems * 6 * 4 * 32 * 8
        monkeypatch.setattr(cpu_path, "FORWARD", size)
        monkeypatch.setattr(cpu_path, "BACKWARD", size)
        assert_near(run("cpu", args, index, grads, **options), expected, 1e-11)
    monkeypatch.setattr(cpu_path.dense, "_fused", lambda *a: None)
    assert_near(run("cpu", args, index, grads, **options), expected, 1e-11)


@pytest.mark.parametrize("boxed", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_lists_of_different_lengths_are_gathered_apart(shared, boxed, monkeypatch):
    args, grads, generator = inputs(40, 40, 16, heads=(4, 2), bias=(2, 2))
    index = lists(generator, *((1, 1) if shared else (2, 2)), 5, 6, 10, holes=0)
    for row, length in enumerate((6, 0, 3, 6, 1)):
        index[:, :, row, :] = index[:, :, row].masked_fill(torch.arange(6) >= length, -1)
    index = index[..., torch.tensor([3, 0, 5, 1, 4, 2])].contiguous()  # holes come anywhere
    options = {"q_block": 8, "k_block": 4, "box": causal(40) if boxed else None}
    expected = run("reference", args, index, grads, **options)
    for together in (0, 2**30):
        monkeypatch.setattr(cpu_path, "TOGETHER", together)
        assert_near(run("cpu", args, index, grads, **options), expected, 1e-11)
    monkeypatch.setattr(cpu_path, "TOGETHER", 0)
    chunks = list(
        cpu_path.Work(
            block_sparse_attention.problem(*args[:3], index, q_block=8, k_block=4)
        ).chunks(2**24)
    )
    assert {chunk.where.shape[2] for chunk in chunks} == {6, 3, 1}
    assert sum(chunk.where.numel() for chunk in chunks) == 2 * 2 * (6 + 1 + 3 + 6 + 1)
    assert [c.where.shape[2] for c in chunks if c.mask is not None] == [1]  # the list of no entry


@pytest.mark.parametrize("pack", [1, 3, 4, 63])
def test_the_transposed_lists_name_the_readers_of_each_block(pack):
    generator = torch.Generator().manual_seed(1)
    index = lists(generator, 2, 2, 7, 5, 9)
    index[1, 1] = -1
    pointer, queries, bits = transpose_index(index, 9, pack)
    groups = -(-9 // pack)
    bits = torch.ones(2, 2, 35) if pack == 1 else bits
    assert pointer.shape == (2, 2, groups + 1) and queries.shape == bits.shape == (2, 2, 35)
    for b, h, g in itertools.product(range(2), range(2), range(groups)):
        i = slice(int(pointer[b, h, g]), int(pointer[b, h, g + 1]))
        found = list(zip(queries[b, h, i].tolist(), bits[b, h, i].tolist(), strict=True))
        expected = []
        for m in range(7):
            read = [x - g * pack for x in index[b, h, m].tolist() if 0 <= x - g * pack < pack]
            if any(x >= 0 for x in read):
                expected.append((m, sum(1 << x for x in read)))
        assert found == expected


def reach(i, x, k, s, d, causal):
    """Neighbours of coordinate i of x, straight from the definition (specs: GNA)."""
    group = [j for j in range(x) if j % d == i % d]
    at, last = i // d, len(group) - 1
    leader = min(at // s * s + (s - 1 if causal else s // 2), last)
    if causal:
        return {group[y] for y in range(len(group)) if y <= at and leader - y < k}
    right = k // 2 + k % 2 - 1
    centre = min(max(leader, k // 2), last - right)
    return {group[y] for y in range(centre - k // 2, centre + right + 1)}


@pytest.mark.parametrize(
    "shape, kernel, stride, dilation, causal",
    [
        ((11,), 4, 1, 2, False),
        ((12,), 3, 2, 3, True),
        ((7, 9), (3, 4), (1, 2), (2, 1), (False, True)),
        ((6, 6), 3, 3, 1, False),
        ((4, 5, 6), (2, 3, 5), (1, 3, 2), (2, 1, 1), (True, False, False)),
    ],
)
def test_a_neighbourhood_is_the_product_of_its_dimensions(shape, kernel, stride, dilation, causal):
    n = len(shape)
    sides = [x if isinstance(x, tuple) else (x,) * n for x in (kernel, stride, dilation, causal)]
    box = neighbourhood(shape, kernel, stride, dilation, causal)
    seen = box_mask(box.low, box.high, box.position, list(box.dilation))
    points = list(itertools.product(*(range(x) for x in shape)))
    for i, point in enumerate(points):
        near = [
            reach(c, x, *(side[t] for side in sides))
            for t, (c, x) in enumerate(zip(point, shape, strict=True))
        ]
        expected = [all(c in r for c, r in zip(other, near, strict=True)) for other in points]
        assert seen[i].tolist() == expected
    if not any(sides[3]):
        assert (seen.sum(1) == torch.tensor(sides[0]).prod()).all()


def test_limits_of_neighbourhoods():
    def seen(*a, **o):
        return box_mask(*(box := neighbourhood(*a, **o))[:3], list(box.dilation))

    assert seen((4, 5), (4, 5)).all()  # the whole grid: dense
    assert torch.equal(seen((7,), 7, causal=True), torch.ones(7, 7).tril().bool())
    blocks = torch.arange(12) // 4
    assert torch.equal(seen((12,), 4, 4), blocks[:, None] == blocks)  # windows
    line = window(9, 8, 2)
    assert torch.equal(box_mask(*line[:3], [1]), torch.ones(9, 9).tril(2).bool())


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_another_order_with_padding_permutes_the_output(backend):
    """Tiles of 4 x 4 of a 6 x 5 grid, padded to 8 x 8: attention in tile order is the same."""
    args, grads, _ = inputs(30, 30, 16, heads=(1, 1), batch=1, dtype=torch.float32)
    box = neighbourhood((6, 5), 3)
    number = F.pad(torch.arange(30).view(6, 5), (0, 3, 0, 2), value=-1)
    order = number.view(2, 4, 2, 4).transpose(1, 2).flatten()
    takes = order.clamp(min=0)
    expected = run(
        "reference", args, every_block(30, 30, 16, 16), grads, q_block=16, k_block=16, box=box
    )
    moved = [a[:, :, takes] for a in args[:3]]
    gradient = [
        torch.where((order < 0).view(1, 1, -1, *[1] * (g.ndim - 3)), 0.0, g[:, :, takes])
        for g in grads
    ]
    found = run(
        backend, (*moved, None), every_block(64, 64, 16, 16), gradient,
        q_block=16, k_block=16, box=permute(box, order),
    )  # fmt: skip
    places = order.argsort(stable=True)[-30:]
    assert_near([x[:, :, places] for x in found], expected, 2e-5)
    padding = (order < 0).nonzero().flatten()
    assert (found[0][:, :, padding] == 0).all() and found[1][:, :, padding].isneginf().all()
    assert all((x[:, :, padding] == 0).all() for x in found[2:])


def test_another_order_keeps_ranks_with_their_tokens():
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(9, generator=generator)
    rank, limit = torch.randint(9, (2, 2, 2, 9), generator=generator).int()
    box = causal(9)._replace(rank=rank, limit=limit)
    x, index = torch.ones(2, 2, 9, 16), torch.zeros(1, 1, 1, 1).int()

    def seen(box):
        return visible_mask(
            block_sparse_attention.problem(x, x, x, index, q_block=9, k_block=9, box=box)
        )

    moved = seen(box)[:, :, order][..., order]
    assert torch.equal(seen(permute(box, order)), moved)
    assert not torch.equal(seen(permute(box._replace(rank=None, limit=None), order)), moved)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: neighbourhood((8, 8), 9), "kernel, dilation: got 9 and 1 on a grid of length 8"),
        (lambda: neighbourhood((8,), 3, dilation=3), "kernel . dilation has to be 1 to 8"),
        (lambda: neighbourhood((8,), 3, stride=4), "stride: got 4; give 1 to the kernel's 3"),
        (lambda: neighbourhood((8, 8), (3, 3, 3)), r"kernel: got \(3, 3, 3\); give one value or 2"),
        (lambda: neighbourhood((2, 2, 2, 2), 1), "shape: got"),
        (lambda: causal(0), "n: got 0"),
        (lambda: window(4, -1, 2), "left, right: got -1, 2"),
        (lambda: permute(causal(4), torch.tensor([0, 4])), r"order: give .* -1 \(padding\) to 3"),
        (lambda: check_index(torch.tensor([[0, 3]]), 3), r"index: got the block 3; give -1 .*to 2"),
        (lambda: check_index(torch.tensor([[-2, 0]]), 3), "index: got the block -2"),
        (lambda: check_index(torch.tensor([[1, 0, 1]]), 3), "index: block 1 is twice in a row"),
    ],
)  # fmt: skip
def test_bad_boxes_and_lists_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(1, 4, 9, 16)}, "k: got shape .* heads that divide its 2"),
        ({"v": torch.zeros(1, 2, 8, 16)}, "v: got shape .*needs the same B, heads and S"),
        ({"k": torch.zeros(1, 2, 9, 16).double()}, "k: got torch.float64"),
        ({"index": torch.zeros(1, 1, 2, 2).int()}, r"index: got shape .*give .* 3, s\)"),
        ({"index": torch.zeros(1, 3, 3, 2).int()}, r"index: got shape"),
        ({"index": torch.zeros(1, 1, 3, 1).long()}, "index: got torch.int64 .*give int32"),
        ({"index": torch.full((1, 1, 3, 1), 3).int()}, "index: got the block 3"),
        ({"index": torch.zeros(1, 1, 3, 2).int()}, "index: block 0 is twice"),
        ({"bias": torch.zeros(1, 1, 8)}, "bias: got shape"),
        ({"bias": torch.zeros(1, 1, 9).long()}, "bias: got torch.int64"),
        ({"q_block": 0}, "q_block, k_block: got 0, 4"),
        ({"box": causal(8)}, r"box.low: got shape \(8, 1\); give \(9, 1\)"),
        ({"box": causal(9)._replace(high=torch.zeros(9, 1))}, "box.high: got torch.float32"),
        ({"box": causal(9)._replace(dilation=(0,))}, "box.dilation: got"),
        (
            {"box": causal(9)._replace(rank=torch.zeros(9).int())},
            r"box.rank: got .*; give \(1, 2, 9\)",
        ),
        (
            {"box": causal(9)._replace(limit=torch.zeros(1, 2, 9).int())},
            "box.rank, box.limit: got one",
        ),
        ({"backend": "cuda"}, "backend: got 'cuda'"),
    ],
)
def test_arguments_that_do_not_match_are_named(change, message):
    q = torch.zeros(1, 2, 9, 16)
    options = {
        "q": q, "k": q, "v": q, "index": torch.zeros(1, 1, 3, 1).int(), "q_block": 4, "k_block": 4,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**options)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_triton_refuses_what_it_has_no_tile_for():
    q, index = torch.zeros(1, 1, 4, 144), torch.zeros(1, 1, 1, 1).int()
    with pytest.raises(ValueError, match="backend='triton': got width 144"):
        block_sparse_attention(q, q, q, index, q_block=4, k_block=4, backend="triton")
