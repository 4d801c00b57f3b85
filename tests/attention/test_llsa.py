"""Log-linear sparse attention: against its equations, its limits, and what its pyramid holds."""

import math

import pytest
import torch
import torch.nn.functional as F

from xattn.attention import Inputs, create_mechanism, record, z_order
from xattn.attention.operators.pyramid import PyramidOperator, pyramid
from xattn.attention.order import tile_order

HEADS, WIDTH = 2, 8
DIM = HEADS * WIDTH


def inputs(grid, prefix=0, batch=2, causal=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = prefix + math.prod(grid)
    shape = (3, batch, HEADS, n, WIDTH)
    q, k, v = torch.randn(shape, generator=generator, dtype=torch.float64).unbind(0)
    return Inputs(q, k, v, None, grid, prefix, causal=causal)


def llsa(**options):
    return create_mechanism("llsa", DIM, HEADS, **options)


def cells(grid, block, levels):
    """For each level the tokens of every block, in raster order of blocks, empty ones left out."""
    at = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, len(grid))
    sides = torch.tensor([min(block, n) for n in grid])
    found = []
    for level in range(levels + 1):
        cell = at // sides**level
        found.append([(cell == c).all(1).nonzero()[:, 0] for c in cell.unique(dim=0)])
    return found


def defined(asked, selected, block, levels, enrich=True):
    """A from its equations, by loops."""
    grid, prefix = asked.grid, asked.prefix
    batch, heads, n, _ = asked.q.shape
    blocks = cells(grid, block, levels)
    q, k = asked.q[:, :, prefix:], asked.k[:, :, prefix:]

    def parent(c, level):
        (found,) = (m for m, own in enumerate(blocks[level + 1]) if blocks[level][c][0] in own)
        return found

    out = []
    for b in range(batch):
        for h in range(heads):
            lists = {}
            for level in range(levels, 0, -1):
                own = blocks[level]
                keys = torch.stack([k[b, h, c].mean(0) for c in own])
                first = [c[:1] if asked.causal else c for c in own]
                queries = torch.stack([q[b, h, c].mean(0) for c in first])
                for m in range(len(own)):
                    near = range(len(own))
                    if level < levels:
                        up = lists[level + 1, parent(m, level)]
                        near = [c for c in near if parent(c, level) in up]
                    score = {c: float(queries[m] @ keys[c]) for c in near}
                    if asked.causal:
                        score = {c: s for c, s in score.items() if c < m} | {m: math.inf}
                    lists[level, m] = sorted(score, key=lambda c: -score[c])[:selected]
            rows = torch.zeros(n, n, dtype=q.dtype)
            for i in range(n):
                entries = [(k_, [j], 0.0) for j, k_ in enumerate(asked.k[b, h, :prefix])]
                if i < prefix:
                    entries += [(asked.k[b, h, j], [j], 0.0) for j in range(prefix, n)]
                    entries = [e for e in entries if not asked.causal or e[1][0] <= i]
                    spread(rows, i, asked.q[b, h, i], entries)
                    continue
                t = i - prefix
                at = [next(m for m, c in enumerate(level) if t in c) for level in blocks]
                for m in lists[1, at[1]]:
                    tokens = [int(j) for j in blocks[1][m] if not asked.causal or j <= t]
                    entries += [(k[b, h, j], [prefix + j], 0.0) for j in tokens]
                for level in range(1, levels + 1 if enrich else 1):
                    for c, own in enumerate(blocks[level]):
                        seen = (
                            level == levels or parent(c, level) in lists[level + 1, at[level + 1]]
                        )
                        if seen and not (asked.causal and c >= at[level]):
                            mean, where = k[b, h, own].mean(0), (prefix + own).tolist()
                            entries.append((mean, where, math.log(len(own))))
                spread(rows, i, asked.q[b, h, i], entries)
            out.append(rows)
    return torch.stack(out).view(batch, heads, n, n)


def spread(rows, i, q, entries):
    scores = torch.stack([q @ key / WIDTH**0.5 + log for key, _, log in entries])
    for p, (_, where, _) in zip(scores.softmax(0), entries, strict=True):
        rows[i, where] += p / len(where)


SHAPES = [((4, 6), 0, False), ((5, 7), 1, False), ((1, 9), 2, False), ((13,), 5, False), ((19,), 0, True), ((16,), 2, True)]  # fmt: skip


@pytest.mark.parametrize("grid, prefix, causal", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {"block": 2, "levels": 2, "selected": 2},
        {"block": 2, "levels": 3, "selected": 1},
        {"block": 3, "levels": 1, "selected": 2, "enrich": False},
    ],
    ids=["two levels", "three levels", "without means"],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_it_is_what_its_equations_say(grid, prefix, causal, options, backend):
    asked = inputs(grid, prefix, batch=1, causal=causal)
    layer = llsa(**options, backend=backend)
    levels = layer._pyramid(asked).levels
    a = defined(asked, options["selected"], options["block"], levels, options.get("enrich", True))
    operator = layer.operator(asked)
    assert torch.allclose(operator.rows(torch.arange(asked.q.shape[2])), a, atol=1e-10)
    assert torch.allclose(layer.attend(asked), a @ asked.v, atol=1e-10)


@pytest.mark.parametrize("grid, prefix", [((4, 6), 1), ((8, 8), 0), ((16,), 2)])
@pytest.mark.parametrize("levels", [1, 2])
def test_gradients_are_those_of_the_equations_at_every_level(grid, prefix, levels):
    asked = inputs(grid, prefix, batch=1)
    leaves = [x.requires_grad_() for x in (asked.q, asked.k, asked.v)]
    a = defined_by_tensors(asked, 2, 2, levels)
    layer = llsa(block=2, levels=levels, selected=2)
    g = torch.randn(asked.q.shape, dtype=torch.float64)
    found = torch.autograd.grad(layer.attend(asked), leaves, g)
    for x, y in zip(found, torch.autograd.grad(a @ asked.v, leaves, g), strict=True):
        assert torch.allclose(x, y, atol=1e-9)


def defined_by_tensors(asked, selected, block, levels):
    """A as a masked softmax over all tokens and means, with their graph: the choice is the layer's."""
    layer = llsa(block=block, levels=levels, selected=selected)
    made, prefix = layer._pyramid(asked), asked.prefix
    lists = layer.operator(asked).context
    pool = PyramidOperator(asked.k, made, prefix)
    p = pool.rows(torch.arange(pool.shape[2]))
    keys = p @ asked.k
    n, m = asked.q.shape[2], len(made.order.index)
    mask = torch.full((1, HEADS, n, keys.shape[2]), -torch.inf, dtype=torch.float64)
    mask[..., :prefix] = 0.0
    mask[:, :, :prefix, prefix : prefix + m] = made.counts[0].double().log()
    place = made.order.inverse
    for level in range(levels + 1):
        size, log = made.block**level, made.counts[level].double().log()
        start = pool.starts[level]
        for h in range(HEADS):
            for t in range(n - prefix):
                if level == levels:
                    seen = torch.ones(len(log), dtype=torch.bool)
                else:
                    chosen = lists[level + 1][0, h, place[t] // (size * made.block)]
                    seen = torch.isin(torch.arange(len(log)) // made.block, chosen)
                row = mask[0, h, prefix + t, start : start + len(log)]
                row[seen] = log[seen]
    return ((asked.q @ keys.transpose(-2, -1)) / WIDTH**0.5 + mask).softmax(-1) @ p


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(
    "grid, causal", [((5, 6), False), ((1, 1), False), ((9,), False), ((9,), True)]
)
def test_all_blocks_without_means_are_dense(grid, causal, prefix):
    asked = inputs(grid, prefix, causal=causal)
    y = llsa(block=2, levels=2, selected=99, enrich=False).attend(asked)
    expected = F.scaled_dot_product_attention(asked.q, asked.k, asked.v, is_causal=causal)
    assert torch.allclose(y, expected)


def test_k_clamps_to_what_a_level_holds():
    asked = inputs((8, 8))
    context = llsa(block=2, levels=3, selected=5).operator(asked).context
    assert {level: x.shape[-1] for level, x in context.items()} == {3: 1, 2: 4, 1: 5}
    # with every level whole there is nothing to choose, so a larger K is the same
    whole, more = (llsa(block=2, levels=2, selected=k).attend(asked) for k in (16, 400))
    assert torch.equal(whole, more)


def test_levels_are_as_many_as_leave_64_means_at_the_top():
    for grid, levels, top in [
        ((32, 32), 1, 64),
        ((128, 128), 2, 64),
        ((256, 256), 3, 16),
        ((14, 14), 1, 16),
    ]:
        q = torch.zeros(1, 1, math.prod(grid), 8)
        made = create_mechanism("llsa", 8, 1)._pyramid(Inputs(q, q, q, None, grid))
        assert (made.levels, len(made.counts[-1])) == (levels, top)
    assert pyramid((3, 3), 2, 9).levels == 2  # none above one mean


@pytest.mark.parametrize("side, levels", [(2, 3), (4, 2)])
def test_nested_tiles_are_runs_of_z_order(side, levels):
    length = side**levels
    order, z = tile_order((length, length), side, levels), z_order((length, length))
    for level in range(1, levels + 1):
        runs = [x.index.view(-1, side ** (2 * level)).sort(1).values for x in (order, z)]
        assert {tuple(r.tolist()) for r in runs[0]} == {tuple(r.tolist()) for r in runs[1]}
    if side == 2:
        assert torch.equal(order.index, z.index)


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (3, 5), (1,), (4,)])
def test_small_inputs_and_equal_keys(grid):
    asked = inputs(grid)
    assert llsa().attend(asked).isfinite().all()
    asked = asked.replace(k=torch.ones_like(asked.k))
    y = llsa(block=2, levels=1, selected=99).attend(asked)
    assert torch.allclose(y, asked.v.mean(2, keepdim=True).expand_as(y))


def test_maps_are_the_shares_of_the_lists_that_hold_each_block():
    grid = (5, 7)
    asked = inputs(grid, 1)
    layer = llsa(block=2, levels=2, selected=2)
    with record() as calls:
        layer.attend(asked)
    maps, lists = calls[0].maps, layer.operator(asked).context
    made = layer._pyramid(asked)
    assert list(maps) == ["level_1", "level_2"]
    for level in (1, 2):
        real = made.counts[level] > 0
        for t in (0, 9, 34):
            block = int(made.order.inverse[t]) // made.block**level
            share = (lists[level][:, :, real] == block).any(-1).double().mean(-1)
            assert torch.allclose(maps[f"level_{level}"][..., t // 7, t % 7].double(), share)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"selected": 0}, "selected: got 0"),
        ({"block": 1}, "block: got 1; give at least 2 tokens"),
        ({"levels": 0}, "levels: got 0"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        llsa(**options)
