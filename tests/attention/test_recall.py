"""How near choices of blocks come to the exact one: against loops, and where the answer is known."""

import math

import pytest
import torch

from xattn.attention import Inputs, create_mechanism
from xattn.attention.operators.base import SoftmaxOperator
from xattn.runtime.measuring import peak_memory

HEADS, WIDTH = 2, 8
DIM = HEADS * WIDTH


def inputs(grid, prefix=0, causal=False, key_heads=HEADS, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    n = prefix + math.prod(grid)
    q = 2 * torch.randn(2, HEADS, n, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    k, v = torch.randn(2, 2, key_heads, n, WIDTH, generator=generator, dtype=torch.float64).to(
        dtype
    )
    return Inputs(q, k, v, q.new_zeros(2, n, DIM), grid, prefix, causal=causal)


def made(name, **options):
    return create_mechanism(name, DIM, HEADS, **options).eval()


def recall_of(layer, asked, **options):
    rest = {"x": asked.x, "causal": asked.causal, **options}
    return layer.recall(asked.q, asked.k, asked.grid, asked.prefix, **rest)


def cells(grid, side):
    """Tokens of each tile, raster order."""
    at = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, len(grid)) // side
    return [(at == c).all(1).nonzero()[:, 0] for c in at.unique(dim=0)]


def forced_by_hand(kind, queries, keys, grid):
    """For each cell of queries the numbers of the cells of keys that are always read."""
    at = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, len(grid))
    found = []
    for own in queries:
        home = next(i for i, c in enumerate(keys) if own[0] in c)
        near = [
            i for i, c in enumerate(keys) if ((at[own][:, None] - at[c]).abs().amax(2) <= 1).any()
        ]
        all_of = {"none": set(), "own": {home}, "near": set(near)}
        found.append(all_of.get(kind, {0, home, max(0, home - 1)}))
    return found


def by_hand(asked, read, queries, keys, room, always, forced):
    """Recall from its definition; ``read`` (B, H, N, N): whether a query reads a token."""
    q, k, prefix = asked.q, asked.k, asked.prefix
    groups = k.shape[1]
    k = k.repeat_interleave(HEADS // groups, 1)
    scores = asked.scale * q @ k.transpose(-2, -1)
    if asked.causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf)
    a, read = (x[..., prefix:, prefix:] for x in (scores.softmax(-1), read))
    blocks, mass = torch.empty(2, 2, groups, dtype=torch.float64)
    for b in range(2):
        for g in range(groups):
            heads = [h for h in range(HEADS) if h // (HEADS // groups) == g]
            hits, total, mine, best = 0, 0, 0.0, 0.0
            for own, certain in zip(queries, always, strict=True):
                gets = {
                    c: sum(float(a[b, h][own][:, at].sum()) for h in heads)
                    for c, at in enumerate(keys)
                }
                chosen = {c for c, at in enumerate(keys) if read[b, heads[0]][own][:, at].any()}
                left = room
                if not forced:
                    gets = {c: m for c, m in gets.items() if c not in certain}
                    chosen, left = chosen - certain, room - len(certain)
                exact = sorted(gets, key=gets.get, reverse=True)[:left]
                exact = [c for c in exact if gets[c] > 0]
                hits, total = hits + len(chosen & set(exact)), total + len(exact)
                mine += sum(gets[c] for c in chosen)
                best += sum(gets[c] for c in exact)
            blocks[b, g], mass[b, g] = hits / total, mine / best
    return blocks, mass


HIP = {"keep": 24, "block": 4, "window": 1}
INFLLM = {"stride": 1, "dense_below": 0}
NSA = {"window": 3}
CASES = [  # name, options, grid, prefix, causal, sides of query and key blocks, room, always read
    ("hip", HIP, (9, 10), 2, False, 2, 2, 9, "near"),
    ("hip", {**HIP, "search": "halves", "window": 0}, (8, 12), 0, False, 2, 2, 6, "own"),
    ("hip", {"keep": 12, "block": 4}, (39,), 1, True, 4, 4, 3, "own"),
    ("infllm_v2", {**INFLLM, "block": 2, "selected": 4, "local": 0}, (5, 7), 1, False, 2, 2, 4, "own"),
    ("infllm_v2", {**INFLLM, "block": 3, "selected": 5}, (22,), 2, True, 1, 3, 5, "first"),
    ("landmark", {"block": 2, "selected": 3}, (5, 7), 1, False, 2, 2, 3, "own"),
    ("landmark", {"block": 3, "selected": 4}, (22,), 2, True, 1, 3, 4, "own"),
    ("llsa", {"block": 2, "selected": 3, "levels": 2, "enrich": False}, (5, 7), 1, False, 2, 2, 3, "none"),
    ("llsa", {"block": 2, "selected": 3, "levels": 2, "enrich": False}, (19,), 2, True, 2, 2, 3, "own"),
    ("nsa", {**NSA, "block": 2, "selected": 3}, (5, 7), 1, False, 2, 2, 3, "own"),
    ("nsa", {**NSA, "block": 2, "selected": 4, "forced": False}, (8, 6), 0, False, 2, 2, 4, "none"),
    ("nsa", {**NSA, "block": 3, "selected": 5}, (22,), 2, True, 1, 3, 5, "first"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[2]}-{case[3]}")
@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("key_heads", [HEADS, 1])
def test_it_is_what_loops_over_blocks_and_heads_find(case, forced, key_heads):
    name, options, grid, prefix, causal, q_side, k_side, room, always = case
    asked, layer = inputs(grid, prefix, causal, key_heads), made(name, **options).double()
    taken = layer.check_inputs(asked)
    operator = layer.operator(taken)
    read = operator.terms[1].operator if name == "nsa" else operator  # the selected branch
    queries, keys = cells(grid, q_side), cells(grid, k_side)
    always = forced_by_hand(always, queries, keys, grid)
    rows = read.rows(torch.arange(asked.q.shape[2])) > 0
    blocks, mass = by_hand(taken, rows, queries, keys, room, always, forced)
    found = recall_of(layer, asked, forced=forced)
    assert torch.allclose(found.blocks, blocks) and torch.allclose(found.mass, mass)
    assert (found.mass <= 1 + 1e-12).all()


EVERY = [
    ("hip", {"keep": 44, "block": 4, "window": 9}),
    ("infllm_v2", {**INFLLM, "block": 2, "selected": 12}),
    ("landmark", {"block": 2, "selected": 12}),
    ("llsa", {"block": 2, "selected": 12}),
    ("nsa", {**NSA, "block": 2, "selected": 12}),
]


@pytest.mark.parametrize("name, options", EVERY)
@pytest.mark.parametrize("forced", [True, False])
def test_of_everything_chosen_it_is_1(name, options, forced):
    found = recall_of(made(name, **options), inputs((5, 7), 1), forced=forced)
    assert torch.allclose(found.blocks, torch.ones_like(found.blocks))
    assert torch.allclose(found.mass, torch.ones_like(found.mass))


@pytest.mark.parametrize("name, options", [("hip", {}), ("infllm_v2", {}), ("landmark", {})])
def test_where_the_layer_is_dense_it_is_1(name, options):
    found = recall_of(made(name, **options), inputs((5, 7), 1))
    assert (found.blocks == 1).all() and (found.mass == 1).all()


EXACT = [
    ("hip", {"keep": 20, "block": 4}),
    ("infllm_v2", {"dense_below": 0, "block": 2, "stride": 2, "kernel": 2, "selected": 5, "local": 0}),
    ("landmark", {"block": 2, "selected": 5}),
    ("llsa", {"block": 2, "selected": 5, "levels": 1}),
    ("nsa", {**NSA, "block": 2, "selected": 5}),
    ("nsa", {**NSA, "block": 2, "selected": 5, "forced": False}),
]  # fmt: skip


@pytest.mark.parametrize("name, options", EXACT)
def test_with_queries_and_keys_that_are_equal_within_blocks_the_choice_is_exact(name, options):
    """Then the mean key of a block is each of its keys, and all its tokens have the same attention."""
    asked = inputs((8, 8), 1)
    first = torch.arange(64).view(8, 8)[::2, ::2].repeat_interleave(2, 0).repeat_interleave(2, 1)
    first = torch.cat([torch.zeros(1, dtype=torch.long), first.flatten() + 1])
    asked = asked.replace(q=asked.q[:, :, first], k=asked.k[:, :, first])
    found = recall_of(made(name, **options), asked, forced=False)
    assert torch.allclose(found.blocks, torch.ones_like(found.blocks))
    assert torch.allclose(found.mass, torch.ones_like(found.mass))


def test_rows_that_come_in_chunks_add_up(monkeypatch):
    asked, layer = inputs((9, 10), 1), made("llsa", block=2, selected=3)
    whole = recall_of(layer, asked)
    monkeypatch.setattr("xattn.attention.operators.base.TILE", 2000)
    parts = recall_of(layer, asked)
    assert all(torch.allclose(a, b) for a, b in zip(whole, parts, strict=True))


def test_half_precision_is_measured_in_single():
    asked = inputs((9, 10), 1, dtype=torch.bfloat16)
    found = recall_of(made("nsa", block=2, selected=4), asked)
    assert found.blocks.dtype == found.mass.dtype == torch.float32


def test_nothing_is_as_large_as_tokens_by_tokens():
    n = 4096
    asked, layer = inputs((64, 64), dtype=torch.float32), made("llsa", selected=4)
    assert peak_memory(lambda: recall_of(layer, asked)) < 4 * n * n / 2


def test_keys_chosen_by_their_values_are_one_list_for_all_queries():
    asked, layer = inputs((4, 5), 1), made("dma", window=6).double()
    torch.nn.init.ones_(layer.a)
    kept = layer.key_bias(asked.v[:, :, 1:]).topk(6).indices.sort(-1).values
    found = layer.choice(asked)
    assert torch.equal(found.blocks.index[:, :, 0].long(), kept)
    mass = SoftmaxOperator(asked.q, asked.k, asked.scale).rows(torch.arange(1, 21))[..., 1:].sum(2)
    share = mass.gather(-1, kept).sum(-1) / mass.topk(6).values.sum(-1)
    got = layer.recall(asked.q, asked.k, (4, 5), 1, v=asked.v)
    assert torch.allclose(got.mass, share)
    assert made("dma", window=20).double().choice(asked) is None
    causal = layer.choice(asked.replace(causal=True)).blocks
    assert causal.index.shape[2:] == (20, 6) and (causal.index[:, :, 0] >= 0).sum(-1).eq(1).all()
    with pytest.raises(ValueError, match="v: dma chooses keys by their values; give the values"):
        layer.recall(asked.q, asked.k, (4, 5), 1)


def test_a_mechanism_without_a_choice_of_blocks_is_named():
    with pytest.raises(ValueError, match="mechanism: softmax does not choose blocks; give one"):
        recall_of(made("softmax"), inputs((4, 4)))
