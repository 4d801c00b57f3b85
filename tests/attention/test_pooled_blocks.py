"""Blocks with pooled keys: where they lie, which a query reads, and which it chooses."""

import math

import pytest
import torch

from xattn.attention import (
    Blocks,
    Inputs,
    Pattern,
    SegmentsOperator,
    SoftmaxOperator,
    pattern_operator,
    tile_order,
)
from xattn.attention.operators.pooled_blocks import pooled_blocks

BATCH, HEADS, WIDTH = 2, 4, 8


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(n, key_heads, prefix=0, **more):
    q = random(BATCH, HEADS, prefix + n, WIDTH)
    k = random(BATCH, key_heads, prefix + n, WIDTH, seed=1)
    return Inputs(q, k, k, prefix=prefix, **more)


def pooled_keys(blocks, asked):
    return blocks.pool(asked.k, asked.prefix).matvec(asked.k)


def cells(blocks):
    """The tokens of every pooled block."""
    runs = blocks.pooling.index.unfold(0, math.prod(blocks.tile), blocks.stride)
    return [[t for t in run.tolist() if t >= 0] for run in runs]


def importance(blocks, asked, keys):
    """What each query block and key head gives to each block that can be chosen, by definition."""
    q = asked.q[:, :, asked.prefix :]
    n, groups = q.shape[2], keys.shape[1]
    index = torch.arange(n) if blocks.order is None else blocks.order.index
    scores = q @ keys.repeat_interleave(HEADS // groups, 1).transpose(-2, -1) / WIDTH**0.5
    if blocks.visible is not None:
        late = torch.tensor([[max(c) > i for c in cells(blocks)] for i in range(n)])
        short = torch.tensor([len(c) < blocks.tile[0] for c in cells(blocks)])
        scores = scores.masked_fill(late | short, -torch.inf)
    p = scores.softmax(-1).nan_to_num(0.0)
    if blocks.overlap is not None:
        p = p @ blocks.overlap.double()
    rows = [[t for t in run.tolist() if t >= 0] for run in index.split(blocks.q_block)]
    sums = torch.stack([p[:, :, row].sum(2) for row in rows], 2)
    return sums.unflatten(1, (groups, -1)).sum(2)


@pytest.mark.parametrize("grid, block", [((5, 6), 2), ((7, 9), 4), ((3, 9), 5), ((4, 4), 1)])
def test_tiles_of_a_grid_hold_every_token_once(grid, block):
    blocks = pooled_blocks(grid, block, block, block)
    side = [min(block, length) for length in grid]
    expected: dict[tuple[int, ...], list[int]] = {}
    for token in range(grid[0] * grid[1]):
        y, x = divmod(token, grid[1])
        expected.setdefault((y // side[0], x // side[1]), []).append(token)
    assert cells(blocks) == [expected[key] for key in sorted(expected)]
    assert blocks.count == len(expected)


@pytest.mark.parametrize("n, block, stride, k_block", [(33, 8, 4, 16), (7, 9, 3, 4), (20, 4, 4, 4)])
def test_the_overlap_of_blocks_in_a_row_is_their_share_of_tokens(n, block, stride, k_block):
    blocks = pooled_blocks((n,), block, stride, k_block)
    starts = [stride * c for c in range(len(cells(blocks)))]
    assert [c for cell in cells(blocks) for c in cell] == [
        t for s in starts for t in range(s, min(s + block, n))
    ]
    assert starts[-1] < n <= starts[-1] + block
    share = torch.tensor(
        [
            [
                sum(t // k_block == m for t in range(s, s + block)) / block
                for m in range(blocks.count)
            ]
            for s in starts
        ]
    )
    if blocks.overlap is None:
        assert torch.equal(share, torch.eye(blocks.count))
    else:
        assert torch.allclose(blocks.overlap, share)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize(
    "grid, block, stride, k_block, causal",
    [
        ((7, 9), 3, 3, 3, False),
        ((40,), 6, 6, 6, False),
        ((40,), 6, 3, 9, False),
        ((40,), 4, 4, 4, True),
        ((40,), 6, 3, 9, True),
    ],
)
def test_queries_choose_the_blocks_to_which_they_give_most(
    grid, block, stride, k_block, causal, forced, key_heads
):
    prefix, s = 2, 4
    blocks = pooled_blocks(grid, block, stride, k_block, prefix, causal)
    asked = inputs(math.prod(grid), key_heads, prefix, causal=causal)
    keys = pooled_keys(blocks, asked)[:, :, prefix:]
    index = blocks.choose(asked, keys, s, forced=forced).index
    value = importance(blocks, asked, keys)
    own = torch.arange(value.shape[2]) * blocks.q_block // blocks.k_block
    for m, mine in enumerate(own.tolist()):
        always = {mine, max(mine - 1, 0), 0} if causal else {mine}
        for b in range(BATCH):
            for h in range(key_heads):
                found = {c for c in index[b, h, m].tolist() if c >= 0}
                row = value[b, h, m].clone()
                if forced:
                    row[list(always)] = torch.inf
                seen = int((row > 0).sum())
                assert found == set(row.topk(min(s, seen)).indices.tolist())
                assert not causal or max(found, default=0) <= mine


def test_a_list_too_short_for_all_forced_blocks_holds_the_own_one():
    blocks = pooled_blocks((20,), 4, 4, 4, 0, True)
    asked = inputs(20, HEADS, causal=True)
    index = blocks.choose(asked, pooled_keys(blocks, asked), 1).index
    assert (index == (torch.arange(20) // 4)[:, None]).all()


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_a_causal_query_reads_the_prefix_and_blocks_that_have_ended(prefix):
    blocks = pooled_blocks((21,), 6, 3, 6, prefix, True)
    asked = inputs(21, 2, prefix, causal=True)
    keys = pooled_keys(blocks, asked)
    operator = blocks.read(asked, keys)
    a = operator.rows(torch.arange(prefix + 21))
    scores = asked.q @ keys.repeat_interleave(2, 1).transpose(-2, -1) / WIDTH**0.5
    for i in range(prefix + 21):
        ended = [3 * c + 6 <= i - prefix + 1 for c in range(keys.shape[2] - prefix)]
        seen = torch.tensor([True] * prefix + [e and i >= prefix for e in ended])
        row = scores[:, :, i].masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        assert torch.allclose(a[:, :, i], row)
    x = random(BATCH, 2, keys.shape[2], 3, seed=4)
    assert torch.allclose(operator.matvec(x), a @ x.repeat_interleave(2, 1))


def test_values_of_blocks_reach_their_tokens():
    blocks = pooled_blocks((5, 7), 3, 3, 3)
    number = blocks.on_tokens(torch.arange(blocks.count))
    assert all((number[cell] == c).all() for c, cell in enumerate(cells(blocks)))
    lists = torch.tensor([[0, 2, -1], [1, 2, 5], [2, -1, -1], [0, 1, 2]], dtype=torch.int32)
    share = blocks.frequency(Blocks(lists[None, None], 9, 9))
    assert torch.equal(share, torch.tensor([[[0.5, 0.5, 1.0, 0.0, 0.0, 0.25]]]))


def test_lists_of_one_call_are_gathered_and_only_those_of_single_queries_become_a_mask():
    for causal, kind in ((False, SegmentsOperator), (True, SoftmaxOperator)):
        blocks = pooled_blocks((24,), 4, 4, 4, 0, causal)
        asked = inputs(24, HEADS, causal=causal)
        chosen = blocks.choose(asked, pooled_keys(blocks, asked), 2)
        assert type(pattern_operator(asked, blocks.pattern(chosen))) is kind


def test_tiles_of_a_grid_that_should_overlap_are_refused():
    with pytest.raises(ValueError, match="stride, select_block: got 2, 4 on a grid"):
        pooled_blocks((8, 8), 4, 2, 4)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_lists_of_a_key_head_serve_its_query_heads(backend, prefix):
    asked = inputs(30, 2, prefix)
    index = random(BATCH, 2, 6, 6, seed=2).argsort(-1)[..., :3].int()
    order = tile_order((5, 6), (2, 3))
    grouped = pattern_operator(asked, Pattern(Blocks(index, 6, 6), order), backend=backend)
    spread = index.repeat_interleave(2, 1)
    full = pattern_operator(
        asked.ungrouped(), Pattern(Blocks(spread, 6, 6), order), backend=backend
    )
    n = prefix + 30
    a = full.rows(torch.arange(n))
    assert torch.allclose(grouped.rows(torch.arange(n)), a)
    for heads in (2, HEADS):
        x = random(BATCH, heads, n, 3, seed=3)
        assert torch.allclose(grouped.matvec(x), a @ x.repeat_interleave(HEADS // heads, 1))
    r = random(BATCH, 2, n, seed=4)
    assert torch.allclose(grouped.vecmat(r), r[:, None] @ a)
