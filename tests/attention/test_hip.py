"""HiP attention: its search against its definition, its limits, and the lists that serve several calls."""

import math
from itertools import chain

import pytest
import torch
import torch.nn.functional as F

from xattn.attention import Inputs, create_mechanism, record, z_order
from xattn.attention.mechanisms.hip import layout

HEADS, WIDTH = 2, 8
DIM = HEADS * WIDTH


def inputs(grid, prefix=0, batch=2, seed=0, causal=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    n = prefix + math.prod(grid)
    qkv = torch.randn(3, batch, HEADS, n, WIDTH, generator=generator, dtype=torch.float64)
    return Inputs(*qkv.to(dtype), None, grid, prefix, causal=causal)


def hip(**options):
    return create_mechanism("hip", DIM, HEADS, **options)


def dense(asked):
    return F.scaled_dot_product_attention(asked.q, asked.k, asked.v, is_causal=asked.causal)


def cells_of(grid, block):
    """Tokens of each block in Z-order, and the same for each node of the tree above, as nested lists."""
    index = z_order(grid).index.tolist()
    index += [-1] * (-len(index) % block)
    places = [[t for t in index[i : i + block] if t >= 0] for i in range(0, len(index), block)]
    levels = [places]
    while len(levels[-1]) > 1:
        below = levels[-1]
        levels.append([[*chain(*below[i : i + 4])] for i in range(0, len(below), 4)])
    return levels


def found_by_hand(q, k, levels, s, own):
    """Numbers of the places that the search keeps for one query block and head."""
    mean = q[levels[0][own]].mean(0)
    depth = next(i for i, level in enumerate(levels) if len(level) <= 4 * s)
    nodes = range(len(levels[depth]))
    for level in reversed(levels[: depth + 1]):
        nodes = [c for c in nodes if c < len(level) and level[c]]
        score = {c: float(mean @ k[level[c]].mean(0)) for c in nodes}
        if level is levels[0]:
            score[own] = math.inf
        kept = sorted(score, key=score.get, reverse=True)[:s]
        nodes = [4 * c + i for c in kept for i in range(4)]
    return kept


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid, keep", [((5, 6), 12), ((8, 8), 8), ((16, 7), 8), ((3, 4, 5), 12)])
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_on_a_grid_it_is_what_its_equations_say(grid, keep, prefix, backend):
    asked, block = inputs(grid, prefix), 4
    n, levels = math.prod(grid), cells_of(grid, block)
    hidden = torch.ones(2, HEADS, prefix + n, prefix + n, dtype=torch.bool)
    hidden[..., :prefix, :] = hidden[..., :prefix] = False
    for b in range(2):
        for h in range(HEADS):
            q, k = asked.q[b, h, prefix:], asked.k[b, h, prefix:]
            for own, cell in enumerate(levels[0]):
                if cell:
                    kept = found_by_hand(q, k, levels, keep // block, own)
                    keys = torch.tensor([t for c in kept for t in levels[0][c]]) + prefix
                    hidden[b, h, torch.tensor(cell)[:, None] + prefix, keys] = False
    leaves = [x.requires_grad_() for x in (asked.q, asked.k, asked.v)]
    y = hip(keep=keep, block=block, backend=backend).attend(asked)
    expected = F.scaled_dot_product_attention(*leaves, ~hidden)
    assert torch.allclose(y, expected, atol=1e-10)
    g = torch.randn_like(y)
    grads = (torch.autograd.grad(x, leaves, g) for x in (y, expected))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("search", ["quarters", "halves"])
@pytest.mark.parametrize("grid, prefix, causal", [((7, 9), 2, False), ((63,), 1, True)])
def test_with_room_for_all_keys_it_is_dense(grid, prefix, causal, search):
    asked = inputs(grid, prefix, causal=causal)
    y = hip(keep=63, block=4, search=search).attend(asked)
    assert torch.allclose(y, dense(asked))
    assert torch.equal(hip().attend(asked), create_mechanism("softmax", DIM, HEADS).attend(asked))


@pytest.mark.parametrize("search", ["quarters", "halves"])
def test_one_dominant_block_is_found(search):
    asked = inputs((16, 16))
    k, levels = 0.1 * asked.k, cells_of((16, 16), 4)
    q = asked.q.abs()
    k[:, :, levels[0][37]] = 5.0
    operator = hip(keep=8, block=4, search=search).operator(asked.replace(q=q, k=k))
    # Halves look at the first block of a run only: 36 and 37 lie in runs that begin elsewhere.
    found = (operator.context.lists == 37).any(-1)
    assert found.all() if search == "quarters" else found.float().mean() > 0.01


def test_lists_are_full_hold_what_is_near_and_no_padding():
    asked = inputs((13, 10))
    found = hip(keep=48, block=4, window=1).operator(asked).context.lists
    place = layout((13, 10), 48, 4, 1)
    assert (found >= 0).all() and found.shape[-1] == 12 and place.count == found.shape[2]
    assert (found.sort(-1).values.diff() > 0).all()
    y, x = torch.unravel_index(place.order.index.clamp(min=0), (13, 10))
    y, x = (t.masked_fill(place.order.padding, -9).unflatten(0, (-1, 4)) for t in (y, x))
    for m in range(place.count):
        for other in range(place.count):
            real = (y[m, :, None] >= 0) & (y[other] >= 0)
            away = torch.maximum((y[m, :, None] - y[other]).abs(), (x[m, :, None] - x[other]).abs())
            if (real & (away <= 1)).any():
                assert (found[:, :, m] == other).any(-1).all()


def test_lists_serve_as_many_calls_as_asked_and_until_they_are_forgotten():
    first, second = inputs((9, 10), 1), inputs((9, 10), 1, seed=1)
    layer, anew = hip(keep=12, block=4, refresh=3).eval(), hip(keep=12, block=4)

    def lists(layer, asked):
        return layer.operator(asked).context.lists

    kept = lists(layer, first)
    assert torch.equal(kept, lists(anew, first))
    assert torch.equal(lists(layer, second), kept) and layer.operator(second).selection == 0
    assert torch.equal(lists(layer, second), lists(anew, second))  # the fourth call searches
    layer.forget()
    assert torch.equal(lists(layer, first), kept)
    assert not torch.equal(lists(layer.train(), second), kept)  # training never shares
    other = inputs((10, 9), 1, seed=2)
    assert torch.equal(lists(layer.eval(), other), lists(anew, other))  # nor other shapes


def test_maps_show_what_survived_each_round_and_what_was_read():
    asked = inputs((12, 16), 2)
    layer = hip(keep=16, block=4)
    with record() as calls:
        layer.attend(asked)
    maps, found = calls[0].maps, layer.operator(asked).context
    assert maps["survived"].shape == (2, 2, 12, 16) and maps["selected"].shape == (2, HEADS, 12, 16)
    order = layout((12, 16), 16, 4, 0).order
    share = torch.stack([(found.lists == m).any(-1).float().mean(2) for m in range(48)], -1)
    expected = order.undo(share.repeat_interleave(4, -1), -1).unflatten(-1, (12, 16))
    assert torch.allclose(maps["selected"], expected)
    assert torch.allclose(maps["survived"][:, 1], expected.mean(1), atol=1e-6)
    first = maps["survived"][:, 0]  # quarters of the image stand or fall whole
    assert torch.equal(first[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2), first)
    with record() as calls:
        hip().attend(asked)
    assert calls[0].maps.keys() == {"received"}


@pytest.mark.parametrize("search", ["quarters", "halves"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 40), (3, 1), (9, 9)])
def test_equal_keys_on_odd_grids_give_means(grid, search):
    asked, layer = inputs(grid, 1), hip(keep=8, block=4, window=2, search=search)
    assert layer.attend(asked).isfinite().all()
    same = asked.replace(k=asked.k[:, :, :1].expand_as(asked.k))
    y = layer.attend(same)
    assert y.isfinite().all() and torch.allclose(y[:, :, 0], asked.v.mean(2))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: hip(keep=0), "keep: got 0; give a whole number of at least 1"),
        (lambda: hip(block=0), "block: got 0"),
        (lambda: hip(search="thirds"), "search: got 'thirds'; give 'quarters' or 'halves'"),
        (
            lambda: hip(keep=6, block=6).attend(inputs((8, 8))),
            "block: got 6 on a grid; give a power of 2",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
