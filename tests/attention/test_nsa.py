"""Native sparse attention: its three branches alone, together, causal, and with fewer key heads."""

import math

import pytest
import torch
import torch.nn.functional as F

from xattn.attention import Inputs, create_attention, create_mechanism, record
from xattn.kernels.block_sparse.box import neighbourhood

HEADS, WIDTH = 4, 8
DIM = HEADS * WIDTH


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(grid, prefix=0, key_heads=HEADS, batch=2, causal=False):
    n = prefix + math.prod(grid)
    q, x = random(batch, HEADS, n, WIDTH), random(batch, n, DIM, seed=3)
    k, v = (random(batch, key_heads, n, WIDTH, seed=i) for i in (1, 2))
    return Inputs(q, k, v, x, grid, prefix, causal=causal)


def nsa(gates=None, **options):
    """With random gates, or with those given for all patches and heads."""
    torch.manual_seed(0)
    layer = create_mechanism("nsa", DIM, HEADS, **options).double()
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter)
    if gates is not None:
        layer.gate.weight.data.zero_()
        layer.gate.bias.data = 1000 * (2 * torch.tensor(gates).double() - 1).repeat_interleave(
            HEADS
        )
    return layer


def dense(asked, hidden=None, keys=None, values=None):
    """Softmax attention to all keys, or to those given; rows that see none are 0."""
    k, v = (
        own if given is None else given
        for own, given in ((asked.k, keys), (asked.v, values))
    )  # fmt: skip
    k, v = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
    scores = asked.q @ k.transpose(-2, -1) / WIDTH**0.5
    scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0), v


def defined(layer, asked, cells, lists, near):
    """NSA from its definition: pooled ``cells`` of patches, ``lists`` of the patches that each query
    and key head reads, and which patches are ``near`` (N, N)."""
    prefix, n = asked.prefix, asked.q.shape[2]
    tokens = [[i] for i in range(prefix)] + [[prefix + t for t in cell] for cell in cells]
    keys, values = (
        torch.stack([x[:, :, cell].mean(2) for cell in tokens], 2) for x in (asked.k, asked.v)
    )
    every = torch.zeros(n, len(tokens), dtype=torch.bool)
    hidden = torch.ones(2, *asked.q.shape[:2], n, n, dtype=torch.bool)  # selected, near
    hidden[..., :prefix] = False
    hidden[0, :, :, prefix:, prefix:] = ~lists.repeat_interleave(HEADS // lists.shape[1], 1)
    hidden[1, :, :, prefix:, prefix:] = ~near
    hidden[:, :, :, :prefix] = False
    if asked.causal:
        hidden |= torch.ones(n, n, dtype=torch.bool).triu(1)
        every = torch.tensor([[max(c) > i for c in tokens] for i in range(n)])
    parts = [dense(asked, every, keys, values), dense(asked, hidden[0]), dense(asked, hidden[1])]
    g = torch.sigmoid(asked.x @ layer.gate.weight.T + layer.gate.bias)
    g = g.unflatten(2, (3, HEADS)).permute(2, 0, 3, 1)[..., None].clone()
    g[:, :, :, :prefix] = torch.tensor([0.0, 1.0, 0.0]).double().view(3, 1, 1, 1, 1)
    return sum(gate * (a @ v) for gate, (a, v) in zip(g, parts, strict=True))


def best(scores, s, forced):
    """Numbers of the ``s`` best blocks, ``forced`` ones first; blocks that get nothing are out."""
    scores = scores.clone()
    scores[list(forced)] = torch.inf
    return scores.topk(min(s, int((scores > 0).sum()))).indices.tolist()


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", [(5, 6), (7, 9)])
@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_on_a_grid_it_is_what_its_equations_say(grid, prefix, key_heads):
    asked = inputs(grid, prefix, key_heads)
    n, side, s = math.prod(grid), 3, 2
    layer = nsa(block=side, selected=s, window=3)
    where = torch.cartesian_prod(*(torch.arange(length) for length in grid))
    tile = (where // side) @ torch.tensor([-(-grid[1] // side), 1])
    cells = [(tile == t).nonzero()[:, 0].tolist() for t in range(int(tile.max()) + 1)]
    patches = Inputs(*(x[:, :, prefix:] for x in (asked.q, asked.k, asked.v)))
    pooled = torch.stack([patches.k[:, :, cell].mean(2) for cell in cells], 2)
    p = dense(patches, None, pooled)[0].unflatten(1, (key_heads, -1)).sum(2)
    lists = torch.zeros(2, key_heads, n, n, dtype=torch.bool)
    for b in range(2):
        for h in range(key_heads):
            for t, cell in enumerate(cells):
                chosen = best(p[b, h, cell].sum(0), s, {t})
                seen = torch.isin(tile, torch.tensor(chosen))
                lists[b, h, cell] = seen
    low, high, position, *_ = neighbourhood(grid, 3)
    near = ((low[:, None] <= position) & (position <= high[:, None])).all(-1)
    assert torch.allclose(layer.attend(asked), defined(layer, asked, cells, lists, near))


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("block, stride, select_block", [(4, 4, 4), (6, 3, 8)])
@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_causal_it_is_what_its_equations_say(block, stride, select_block, key_heads, prefix):
    n, s, w = 25, 4, 5
    asked = inputs((n,), prefix, key_heads, causal=True)
    layer = nsa(block=block, stride=stride, select_block=select_block, selected=s, window=w)
    starts = range(0, n - block + 1, stride)
    cells = [list(range(start, start + block)) for start in starts]
    patches = Inputs(*(x[:, :, prefix:] for x in (asked.q, asked.k, asked.v)))
    pooled = torch.stack([patches.k[:, :, cell].mean(2) for cell in cells], 2)
    late = torch.tensor([[max(cell) > i for cell in cells] for i in range(n)])
    p = dense(patches, late, pooled)[0].unflatten(1, (key_heads, -1)).sum(2)
    number = torch.arange(n) // select_block
    share = torch.zeros(len(cells), int(number[-1]) + 1).double()
    for c, cell in enumerate(cells):
        share[c] = torch.bincount(number[cell], minlength=share.shape[1]) / block
    lists = torch.zeros(2, key_heads, n, n, dtype=torch.bool)
    for b in range(2):
        for h in range(key_heads):
            for i in range(n):
                own = int(number[i])
                chosen = best(p[b, h, i] @ share, s, {0, max(own - 1, 0), own})
                lists[b, h, i] = torch.isin(number, torch.tensor(chosen))
    i = torch.arange(n)
    near = (i[:, None] - i < w) & (i <= i[:, None])
    assert torch.allclose(layer.attend(asked), defined(layer, asked, cells, lists, near))


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", [(5, 6), (7, 9), (11,)])
@pytest.mark.parametrize(
    "gates, options",
    [
        ((1, 0, 0), {"block": 1}),
        ((0, 1, 0), {"block": 3, "selected": 40, "forced": False}),
        ((0, 1, 0), {"block": 3, "selected": 40, "forced": False, "backend": "cpu"}),
        ((0, 0, 1), {"window": 100}),
    ],
    ids=["blocks of one token", "all blocks", "all blocks, lists", "window over the grid"],
)
def test_each_branch_alone_has_dense_attention_as_its_limit(gates, options, grid, prefix):
    asked = inputs(grid, prefix)
    y = nsa(gates, **options).attend(asked)
    expected = F.scaled_dot_product_attention(asked.q, asked.k, asked.v)
    # The row of a prefix token is that of the second branch, whatever the gates.
    rows = slice(None) if gates[1] else slice(prefix, None)
    assert torch.allclose(y[:, :, rows], expected[:, :, rows])


def test_heads_of_one_key_head_read_the_same_blocks():
    layer = nsa(block=2, selected=2, window=3)
    chosen = layer.operator(inputs((8, 8), 1, key_heads=2)).context
    assert chosen.index.shape == (2, 2, 16, 2)
    assert not torch.equal(chosen.index[:, 0], chosen.index[:, 1])


@pytest.mark.parametrize("grid, causal", [((4, 6), False), ((1, 4), False), ((24,), True)])
def test_learned_pooling_starts_as_the_mean(grid, causal):
    asked = inputs(grid, 1, key_heads=2, causal=causal)
    mean, learned = nsa(block=2, window=3), nsa(block=2, window=3, pooling="conv")
    learned.weight.data.fill_(1.0)
    learned.gate = mean.gate
    y = learned.attend(asked)
    assert torch.allclose(y, mean.attend(asked))
    (grad,) = torch.autograd.grad(y.square().sum(), learned.weight)
    assert grad.isfinite().all() and (grad[:, :, 0] != 0).all()


def test_training_begins_with_what_is_near():
    layer = create_mechanism("nsa", DIM, HEADS).double()
    g = layer.gates(inputs((4, 4), 1))
    expected = torch.sigmoid(torch.tensor([-2.0, -2.0, 2.0]).double())
    assert torch.allclose(g[..., 1:], expected.view(3, 1, 1, 1))
    assert torch.equal(g[:, 0, 0, 0], torch.tensor([0.0, 1.0, 0.0]).double())


@pytest.mark.parametrize("causal", [False, True])
def test_maps_show_what_is_important_selected_and_open(causal):
    grid, prefix, n = (5, 6), 2, 30
    asked = inputs(grid, prefix, key_heads=2, causal=causal)
    layer = nsa(block=2, selected=3, window=3)
    with record() as calls:
        layer.attend(asked)
    operator, maps = layer.operator(asked), calls[0].maps
    read, pool = operator.terms[0].operator.factors
    a = read.rows(torch.arange(prefix, prefix + n))[..., prefix:].mean((1, 2))
    cell = pool.rows(torch.arange(prefix, pool.shape[2]))[0, 0, :, prefix:] > 0
    assert torch.allclose(maps["importance"].flatten(1), a @ cell.double())
    index = operator.context.index
    share = [(index == m).any(-1).double().mean(2) for m in range(len(cell))]
    expected = (torch.stack(share, -1) @ cell.double()).unflatten(-1, grid)
    assert torch.allclose(maps["selected"].double(), expected)
    for name, term in zip(("compressed", "selected", "near"), operator.terms, strict=True):
        assert torch.equal(maps[f"gate_{name}"], term.factor[..., prefix:].unflatten(-1, grid))


def test_tokens_in_a_row_need_no_grid():
    layer = create_attention("nsa", DIM, HEADS, kv_heads=2, block=4, stride=2, select_block=6)
    x = torch.randn(2, 27, DIM)
    assert torch.equal(layer(x, None, 2), layer(x, (25,), 2))
    with record() as calls:
        layer(x, None, 2, causal=True)
    assert calls[0].operator.causal and calls[0].maps == {}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: nsa(block=4, stride=5), "stride: got 5; give at most 4, the length of a block"),
        (lambda: nsa(selected=0), "selected: got 0"),
        *(
            (
                lambda method=method: getattr(nsa(selected=2), method)(inputs((9,), causal=True)),
                "selected: got 2; a causal call of nsa always reads 3 blocks, so give at least 3",
            )
            for method in ("attend", "operator", "choice")
        ),
        (lambda: nsa(pooling="max"), "pooling: got 'max'; give 'mean', 'conv' or 'mlp'"),
        (
            lambda: nsa(block=4, stride=2).attend(inputs((8, 8))),
            "stride, select_block: got 2, 4 on a grid",
        ),
        (lambda: nsa().attend(inputs((8, 8)).replace(x=None)), "x: nsa reads the layer's tokens"),
        (
            lambda: nsa().attend(inputs((2, 2)).replace(x=torch.zeros(2, 4, 5))),
            r"x: got shape \(2, 4, 5\); give \(2, 4, 32\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------- networks, and a choice with gradients


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("grid, causal", [((5, 7), False), ((2, 9), False), ((14,), True)])
def test_networks_pool_what_their_equations_say(grid, causal, key_heads, prefix):
    asked, side = inputs(grid, prefix, key_heads, causal=causal), 3
    layer = nsa((1, 0, 0), block=side, pooling="mlp")
    row = len(grid) == 1
    where = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, len(grid))
    tile = (where // side) @ torch.tensor([1] if row else [-(-grid[1] // side), 1])
    keys, values = [asked.k[:, :, :prefix]], [asked.v[:, :, :prefix]]
    cells = [(tile == t).nonzero()[:, 0] for t in range(int(tile.max()) + 1)]
    for cell in cells:
        block = torch.zeros(2, key_heads, side, side, WIDTH).double()
        at = where[cell] % side
        y, x = (0 * at[:, 0], at[:, 0]) if row else (at[:, 0], at[:, 1])
        k, v = asked.k[:, :, prefix + cell], asked.v[:, :, prefix + cell]
        made = []
        for network in (layer.key_network, layer.value_network):
            block[:, :, y, x] = k + network.place[y, x]
            made.append(network.outer(F.gelu(network.inner(block.flatten(2)))))
        weights = made[1].unflatten(-1, (side, side))[:, :, y, x]
        keys.append((k.mean(2) + made[0])[:, :, None])
        values.append(((1 + weights)[..., None] * v).mean(2, keepdim=True))
    late = None
    if causal:
        ends = [*range(prefix), *((t + 1) * side - 1 + prefix for t in range(len(cells)))]
        late = torch.tensor(ends) > torch.arange(asked.q.shape[2])[:, None]
    a, v = dense(asked, late, torch.cat(keys, 2), torch.cat(values, 2))
    y = layer.attend(asked)[:, :, prefix:]
    assert torch.allclose(y, (a @ v)[:, :, prefix:], atol=1e-6)


def test_networks_start_as_the_mean_and_learn():
    asked = inputs((5, 6), 1, key_heads=2)
    mean = create_mechanism("nsa", DIM, HEADS, block=2, window=3).double()
    layer = create_mechanism("nsa", DIM, HEADS, block=2, window=3, pooling="mlp").double()
    y = layer.attend(asked)
    assert torch.allclose(y, mean.attend(asked))
    for network in (layer.key_network, layer.value_network):
        (grad,) = torch.autograd.grad(y.square().sum(), network.outer.weight, retain_graph=True)
        assert grad.isfinite().all() and grad.abs().sum() > 0


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize(
    "grid, causal, options",
    [
        ((5, 7), False, {"block": 3}),
        ((25,), False, {"block": 6, "stride": 3, "select_block": 8}),
        ((25,), True, {"block": 4}),
        ((25,), True, {"block": 6, "stride": 3, "select_block": 8}),
    ],
)
def test_a_choice_with_gradients_weighs_blocks_by_one_and_learns_their_importance(
    grid, causal, options, key_heads, prefix
):
    asked = inputs(grid, prefix, key_heads, causal=causal)
    leaves = [t.requires_grad_() for t in (asked.q, asked.k, asked.v)]
    layer = nsa((0, 1, 0), selected=3, window=3, differentiable=True, **options)
    plain = nsa((0, 1, 0), selected=3, window=3, **options)
    y = layer.attend(asked)
    assert torch.allclose(y, plain.attend(asked))
    # The same with dense matrices: the scores of a chosen block grow by log(1 + I - I).
    operator, blocks = layer.operator(asked), layer._blocks(asked)
    a = operator.terms[0].operator.factors[0].rows(torch.arange(asked.q.shape[2]))
    keys = layer._pooled(asked, blocks)[0]
    scores = asked.q @ keys.repeat_interleave(HEADS // key_heads, 1).transpose(-2, -1) / WIDTH**0.5
    p = scores.masked_fill(a == 0, -torch.inf).softmax(-1).nan_to_num(0.0)[..., prefix:]
    p = p[:, :, prefix:].unflatten(1, (key_heads, -1)).mean(2)
    if blocks.overlap is not None:
        p = p @ blocks.overlap.double()
    n, size = math.prod(grid), blocks.k_block
    number = torch.arange(n) // size if blocks.order is None else blocks.order.inverse // size
    group = torch.arange(n) if causal else number
    importance = torch.stack([p[:, :, group == g].mean(2) for g in group.tolist()], 2)
    added = importance[..., number] - importance[..., number].detach()
    added = F.pad(added, (prefix, 0, prefix, 0)).repeat_interleave(HEADS // key_heads, 1)
    rows = plain.operator(asked).terms[1].operator.rows(torch.arange(asked.q.shape[2]))
    k, v = (t.repeat_interleave(HEADS // key_heads, 1) for t in (asked.k, asked.v))
    own = (asked.q @ k.transpose(-2, -1) / WIDTH**0.5 + added).masked_fill(rows == 0, -torch.inf)
    expected, g = own.softmax(-1) @ v, random(*y.shape, seed=9)
    assert torch.allclose(y, expected)
    found, true = (torch.autograd.grad(z, leaves, g) for z in (y, expected))
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(found, true, strict=True))
    without = torch.autograd.grad(plain.attend(asked), leaves, g)
    assert not torch.allclose(found[1], without[1])


def test_a_choice_with_gradients_trains_the_network_of_the_keys():
    asked = inputs((6, 6), 1)
    layer = nsa((0, 1, 0), block=2, selected=2, pooling="mlp", differentiable=True)
    y = layer.attend(asked)
    (grad,) = torch.autograd.grad(y.square().sum(), layer.key_network.outer.weight)
    assert grad.isfinite().all() and grad.abs().sum() > 0
    with record() as calls:
        layer.attend(asked)
    assert set(calls[0].maps) >= {"importance", "selected"}
