"""Landmark attention: against its definition, its limits, and maps that sum to one."""

import math

import pytest
import torch
import torch.nn.functional as F

from xattn.attention import Blocks, Inputs, Segment, attend, create_mechanism, record
from xattn.attention.mechanisms.landmark import layout

HEADS, WIDTH = 2, 8
DIM = HEADS * WIDTH


def inputs(grid, prefix=0, batch=2, seed=0, causal=False):
    generator = torch.Generator().manual_seed(seed)
    n = prefix + math.prod(grid)
    qkv = torch.randn(3, batch, HEADS, n, WIDTH, generator=generator, dtype=torch.float64)
    return Inputs(*qkv, None, grid, prefix, causal=causal)


def landmark(**options):
    torch.manual_seed(0)
    layer = create_mechanism("landmark", DIM, HEADS, **options).double()
    if layer.landmark == "token":
        layer.token.data.normal_()
    return layer


def dense(asked):
    return F.scaled_dot_product_attention(asked.q, asked.k, asked.v, is_causal=asked.causal)


def row_by_hand(layer, q, k, at_hand, cells):
    """A row of A for one query and head: weights of the tokens ``at_hand`` and of ``cells``, pairs of
    the tokens of a block that are read and all its tokens."""
    last, token = layer.landmark == "last", getattr(layer, "token", None)
    scores, scale = k @ q / WIDTH**0.5, WIDTH**-0.5
    gates = []
    for head, (_, block) in cells:
        if last:
            mark, extra = k[block[-1]], 0.0
        else:
            share = torch.full((len(block),), 1 / len(block), dtype=q.dtype)
            if token is not None:
                share = (scale * k[block] @ token[head]).softmax(0)
            mark, extra = share @ k[block], math.log(len(block))
        gates.append(scale * q @ mark + extra)
    g = torch.cat([scores[at_hand], *(gate.view(1) for gate in gates)]).softmax(0)
    row = torch.zeros(len(k), dtype=q.dtype)
    row = row.index_add(0, torch.tensor(at_hand, dtype=torch.long), g[: len(at_hand)])
    for share, (_, (read, _)) in zip(g[len(at_hand) :], cells, strict=True):
        read = torch.tensor(read)
        row = row.index_add(0, read, share * scores[read].softmax(0))
    return row


def tiles(grid, side):
    """Patches of each tile, in raster order."""
    across = -(-grid[1] // side)
    found = {}
    for y in range(grid[0]):
        for x in range(grid[1]):
            found.setdefault(y // side * across + x // side, []).append(y * grid[1] + x)
    return [found[t] for t in sorted(found)]


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", [(5, 6), (3, 7), (4, 4)])
@pytest.mark.parametrize("kind", ["mean", "token"])
def test_on_a_grid_it_is_what_its_equations_say(grid, prefix, kind):
    asked, layer = inputs(grid, prefix, batch=1), landmark(block=3, landmark=kind)
    leaves = [x.requires_grad_() for x in (asked.q, asked.k, asked.v, *layer.parameters())]
    y = layer.attend(asked)
    cells = [[prefix + t for t in cell] for cell in tiles(grid, 3)]
    rows = []
    for h in range(HEADS):
        for i in range(asked.q.shape[2]):
            own = [cell for cell in cells if i in cell]
            others = [(h, (cell, cell)) for cell in cells if i not in cell]
            at_hand = [*range(prefix), *(own[0] if own else [])]
            rows.append(row_by_hand(layer, asked.q[0, h, i], asked.k[0, h], at_hand, others))
    expected = torch.stack(rows).view(1, HEADS, -1, asked.q.shape[2]) @ asked.v
    assert torch.allclose(y, expected, atol=1e-10)
    g = torch.randn_like(y)
    grads = (torch.autograd.grad(x, leaves, g) for x in (y, expected))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("kind, n", [("mean", 25), ("token", 25), ("last", 25), ("last", 24)])
@pytest.mark.parametrize("selected", [None, 3])
def test_causal_it_is_what_its_equations_say(kind, n, prefix, selected):
    asked = inputs((n,), prefix, batch=1, causal=True)
    layer = landmark(block=4, landmark=kind, selected=selected)
    cells = [[prefix + t for t in range(s, min(s + 4, n))] for s in range(0, n, 4)]

    def read(cell):
        return cell[:-1] if kind == "last" and len(cell) == 4 else cell

    rows = []
    for h in range(HEADS):
        for i in range(prefix + n):
            q, k = asked.q[0, h, i], asked.k[0, h]
            at_hand = [*range(min(prefix, i + 1))]
            before = []
            if i >= prefix:
                at_hand += [j for j in read(cells[(i - prefix) // 4]) if j <= i]
                before = [(h, (read(cell), cell)) for cell in cells[: (i - prefix) // 4]]
                if selected is not None and len(before) >= selected:
                    whole = row_by_hand(layer, q, k, [], before).detach()
                    mass = [float(whole[list(cell)].sum()) for _, (_, cell) in before]
                    best = sorted(range(len(mass)), key=mass.__getitem__, reverse=True)
                    before = [before[c] for c in best[: selected - 1]]
            rows.append(row_by_hand(layer, q, k, at_hand, before))
    expected = torch.stack(rows).view(1, HEADS, -1, prefix + n) @ asked.v
    assert torch.allclose(layer.attend(asked), expected, atol=1e-10)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid, causal", [((5, 6), False), ((23,), False), ((23,), True)])
def test_one_block_is_dense_attention_without_a_landmark(grid, causal, prefix):
    asked = inputs(grid, prefix, causal=causal)
    assert torch.allclose(
        landmark(block=30).attend(asked)[:, :, prefix:], dense(asked)[:, :, prefix:]
    )


def test_a_token_is_the_mean_until_it_learns():
    asked = inputs((5, 6), 1)
    layer = create_mechanism("landmark", DIM, HEADS, block=3, landmark="token")
    assert torch.allclose(layer.double().attend(asked), landmark(block=3).attend(asked))


def test_rows_sum_to_one_and_tiles_hold_the_weights_of_their_landmarks():
    asked, layer = inputs((6, 9), 2), landmark(block=3, selected=3)
    with record() as calls:
        layer.attend(asked)
    a, maps = layer.operator(asked).rows(torch.arange(56)), calls[0].maps
    assert torch.allclose(a.sum(-1), torch.ones(2, HEADS, 56).double())
    assert torch.allclose(maps["tokens"], a[:, :, 0, 2:].unflatten(-1, (6, 9)))
    for cell in tiles((6, 9), 3):
        share = maps["tokens"].flatten(2)[..., cell].sum(-1, keepdim=True)
        assert torch.allclose(maps["tiles"].flatten(2)[..., cell], share.expand(-1, -1, 9))
    assert maps["retrieved"].shape == (2, HEADS, 6, 9)
    assert torch.allclose(maps["retrieved"].mean((2, 3)), torch.full((2, HEADS), 2 / 6))
    with record() as calls:
        landmark(block=3).attend(inputs((6, 9)))
    assert calls[0].maps.keys() == {"tokens", "tiles"}


def test_landmark_tokens_lend_no_value():
    asked, layer = inputs((24,)), landmark(block=4, landmark="last")
    v = asked.v.clone()
    v[:, :, 3::4] = torch.inf
    assert torch.equal(layer.attend(asked.replace(v=v.nan_to_num(posinf=9.0))), layer.attend(asked))


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (3, 1), (5, 5)])
@pytest.mark.parametrize("options", [{}, {"selected": 3}, {"selected": 3, "landmark": "token"}])
def test_equal_keys_on_odd_grids_give_means(grid, options):
    asked, layer = inputs(grid, 1), landmark(block=2, **options)
    same = asked.replace(k=asked.k[:, :, :1].expand_as(asked.k))
    y = layer.attend(same)
    assert y.isfinite().all() and (options or torch.allclose(y[:, :, 0], asked.v.mean(2)))


def test_marks_need_lists_and_no_rule():
    q = torch.randn(1, 1, 6, 4)
    with pytest.raises(ValueError, match="segments: marks need blocks and no rule"):
        attend(q, [Segment(q, q, marks=q[:, :, :2])])
    lists = Blocks(torch.tensor([[[[0, 1]]]], dtype=torch.int32), 6, 3)
    o, lse = attend(q, [Segment(q, q, lists, marks=q[:, :, :2])])
    assert o.shape == q.shape and torch.allclose(lse, (q @ q[:, :, :2].mT / 2).logsumexp(-1))


def test_layouts_of_rows_and_grids_count_their_tokens():
    place = layout((5, 6), 4, False, False)
    assert place.counts.tolist() == [16, 8, 4, 2]
    row = layout((10,), 4, True, True)
    assert row.counts.tolist() == [4, 4, 2] and row.hidden.isneginf().nonzero()[:, 0].tolist() == [
        3,
        7,
    ]
    assert row.others.index[0, 0].tolist() == [[-1, -1], [0, -1], [0, 1]]
    assert layout((2, 2), 4, False, False).others is None


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: landmark(block=0), "block: got 0"),
        (lambda: landmark(selected=0), "selected: got 0"),
        (lambda: landmark(selected=1), "selected: got 1; give at least 2"),
        (
            lambda: landmark(landmark="first"),
            "landmark: got 'first'; choose one of mean, token, last",
        ),
        (lambda: landmark(block=1, landmark="last"), "block: got 1; give at least 2"),
        (
            lambda: landmark(block=4, landmark="last").attend(inputs((4, 4))),
            r"landmark: got 'last' for a grid of \(4, 4\)",
        ),
        (
            lambda: landmark(block=4, landmark="last").attend(inputs((10,))),
            "landmark: got 'last' for 10 tokens in a row; give a multiple of block=4 tokens",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
