"""Segments, orders and block lists: unions equal one softmax, and orders come back."""

import pytest
import torch
import torch.nn.functional as F

from xattn.attention import (
    Blocks,
    LowRankOperator,
    Segment,
    attend,
    pool,
    select,
    tile_order,
    visible_blocks,
    z_order,
)
from xattn.kernels.block_sparse.box import causal, neighbourhood, permute, window


def tensors(n, s, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 2, n, 16, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, s, 16, generator=generator, dtype=torch.float64)
    return q, k, v


@pytest.mark.parametrize("with_offset", [False, True])
def test_a_union_of_segments_is_one_softmax_over_all_their_keys(with_offset):
    q, k, v = (x.requires_grad_() for x in tensors(17, 40))
    bias = torch.randn(1, 2, 9, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(2, 2, 17, dtype=torch.float64, requires_grad=with_offset)
    index = torch.tensor([[0, 2, -1], [3, 1, 0], [2, -1, -1]], dtype=torch.int32)[None, None]
    parts = [
        Segment(k[:, :, :16], v[:, :, :16], Blocks(index, 6, 4), offset=offset if with_offset else None),
        Segment(k[:, :, 16:25], v[:, :, 16:25], bias=bias, shift=0.7),
        Segment(k[:, :, 25:], v[:, :, 25:], rule=window(17, 3, 0)._replace(position=causal(15).position)),
    ]  # fmt: skip
    o, lse = attend(q, parts)
    seen = torch.zeros(17, 40, dtype=torch.bool)
    for block, row in enumerate(index[0, 0]):
        for entry in row[row >= 0]:
            seen[6 * block : 6 * block + 6, 4 * entry : 4 * entry + 4] = True
    seen[:, 16:25] = True
    i, j = torch.arange(17)[:, None], torch.arange(15)
    seen[:, 25:] = (j <= i) & (j >= i - 3)
    full = torch.zeros(1, 2, 17, 40, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    full = full + F.pad(bias + 0.7, (16, 15))[:, :, None]
    if with_offset:
        full = full + F.pad(offset[..., None].expand(-1, -1, -1, 16), (0, 24))
    scores = q @ k.transpose(-2, -1) / 4 + full
    assert torch.allclose(lse, scores.logsumexp(-1))
    expected = scores.softmax(-1) @ v
    assert torch.allclose(o, expected)
    leaves = (q, k, v, bias, offset) if with_offset else (q, k, v, bias)
    found = torch.autograd.grad(o.square().sum() + lse.sum(), leaves)
    true = torch.autograd.grad(expected.square().sum() + scores.logsumexp(-1).sum(), leaves)
    for a, b in zip(found, true, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_rows_that_no_segment_serves_are_zero_and_without_gradient():
    q, k, v = (x.requires_grad_() for x in tensors(8, 8))
    nothing = torch.tensor([[0], [-1]], dtype=torch.int32)[None, None]
    parts = [Segment(k, v, Blocks(nothing, 4, 4)), Segment(k, v, Blocks(nothing, 4, 4))]
    o, lse = attend(q, parts)
    assert (o[:, :, 4:] == 0).all() and lse[:, :, 4:].isneginf().all()
    for grad in torch.autograd.grad(o.square().sum(), (q, k, v)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("grid, tile", [((14, 14), 8), ((5, 7), (2, 3)), ((9,), 4), ((3, 4, 5), 2)])
def test_a_tile_order_visits_tiles_and_comes_back(grid, tile):
    order = tile_order(grid, tile)
    n = torch.Size(grid).numel()
    x = torch.arange(1.0, n + 1)[:, None]
    moved = order.apply(x)
    assert torch.equal(order.undo(moved), x)
    assert (moved[order.padding] == 0).all() and int(order.padding.sum()) == len(moved) - n
    sides = (tile,) * len(grid) if isinstance(tile, int) else tile
    size = torch.Size(sides).numel()
    at = torch.stack(torch.unravel_index(order.index.clamp(min=0), grid), -1)
    cell = at // torch.tensor(sides)
    for run, padding in zip(cell.split(size), order.padding.split(size), strict=True):
        assert (run[~padding] == run[~padding][:1]).all()


def test_z_order_interleaves_the_bits_of_the_coordinates():
    order = z_order((4, 4))
    y, x = torch.unravel_index(order.index, (4, 4))
    code = sum(((y >> b & 1) << (2 * b + 1)) + ((x >> b & 1) << (2 * b)) for b in range(2))
    assert torch.equal(code, torch.arange(16))
    odd = z_order((3, 5))  # two squares of 4 x 4 side by side
    assert len(odd.index) == 32 and set(odd.index[16:].tolist()) == {-1, 4, 9, 14}
    assert len(z_order((1, 5000)).index) == 8192 and torch.equal(
        odd.undo(odd.index, 0), torch.arange(15)
    )
    assert torch.equal(z_order((1, 1)).index, torch.tensor([0]))


@pytest.mark.parametrize("k_block", [1, 8])
@pytest.mark.parametrize(
    "rule",
    [
        causal(30),
        window(30, 2, 5),
        neighbourhood((6, 7), 3),
        neighbourhood((6, 7), 3, dilation=2, causal=(True, False)),
        permute(neighbourhood((5, 5), 3, stride=2), tile_order((5, 5), 4).index),
    ],
    ids=["causal", "window", "2-D", "dilated", "padded"],
)
def test_visible_blocks_hold_all_keys_that_are_seen(rule, k_block):
    blocks = visible_blocks(rule, 8, k_block)
    low, high, position, dilation, *_ = rule
    inside = (low[:, None] <= position) & (position <= high[:, None])
    inside &= (position - low[:, None]) % torch.tensor(dilation) == 0
    seen = inside.all(-1)
    for block, row in enumerate(blocks.index[0, 0]):
        entries = row[row >= 0].long()
        assert len(entries.unique()) == len(entries)
        read = torch.zeros(seen.shape[1], dtype=torch.bool)
        for entry in entries:
            read[entry * k_block : (entry + 1) * k_block] = True
        needed = seen[block * 8 : block * 8 + 8].any(0)
        assert not (needed & ~read).any()
    if k_block == 1 and dilation == (1,):  # exact in one dimension
        assert int((blocks.index >= 0).sum()) == sum(int(s.any(0).sum()) for s in seen.split(8))


def test_pooled_keys_choose_the_blocks_that_a_dense_ranking_would():
    q, k, _ = tensors(24, 32)
    pooled = pool(k, 8)
    assert torch.allclose(pooled, k.unflatten(2, (4, 8)).mean(3))
    blocks, scores = select(q, pooled, 2, q_block=8, k_block=8, reduce="mean")
    dense = (q @ pooled.transpose(-2, -1) / 4).unflatten(2, (3, 8)).mean(3)
    best = dense.topk(2, -1)
    assert torch.equal(blocks.index.long(), best.indices) and torch.allclose(
        scores.double(), best.values
    )
    assert (blocks.q_block, blocks.k_block) == (8, 8)
    assert pool(k, 8, 4).shape[2] == 7


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: attend(torch.zeros(1, 1, 4, 8), []), "segments: got none"),
        (lambda: attend(torch.zeros(1, 1, 4, 8), [Segment(torch.zeros(1, 1, 4, 8))]), "without values"),
        (lambda: tile_order((4, 4), (2, 2, 2)), "tile: got .*give 2 positive"),
        (lambda: tile_order((0, 4), 2), "grid: got"),
        (lambda: pool(torch.zeros(1, 1, 4, 8), 5), "block, stride: got 5"),
        (
            lambda: attend(
                torch.zeros(1, 1, 4, 8),
                [Segment(*torch.zeros(2, 1, 1, 4, 8), Blocks(torch.tensor([[[[0, 0]]]]).int(), 4, 2))],
            ),
            "index",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_low_rank_operator_answers_as_its_matrix(dtype):
    generator = torch.Generator().manual_seed(0)
    left = torch.rand(2, 2, 9, 3, generator=generator).to(dtype)
    right = torch.rand(2, 2, 3, 7, generator=generator).to(dtype)
    operator = LowRankOperator(left, right)
    a = left.double() @ right.double()
    near = 1e-10 if dtype == torch.float64 else 0.05
    x, r = torch.rand(2, 2, 7, 4, generator=generator).to(dtype), torch.ones(2, 1, 9)
    assert torch.allclose(operator.matvec(x).double(), a @ x.double(), atol=near)
    assert torch.allclose(operator.rows(torch.tensor([8, 0])).double(), a[:, :, [8, 0]], atol=near)
    assert torch.allclose(operator.row_sums().double(), a.sum(-1), atol=near)
    found = operator.vecmat(r, "mean")
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(found.double(), a.sum(2, keepdim=True).mean(1), atol=1e-5)
