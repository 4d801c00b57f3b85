"""FreeSwim: windows of the training size for patches, the whole image for prefix tokens, copied rows."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from xattn.attention import Inputs, convert, create_mechanism, record
from xattn.backbone import load_backbone
from xattn.backbone.resizing import tile_positions

HEADS, WIDTH = 2, 8
DIM = HEADS * WIDTH


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(grid, prefix=0, batch=2, causal=False):
    n = prefix + math.prod(grid)
    q, k, v = (random(batch, HEADS, n, WIDTH, seed=i).requires_grad_() for i in range(3))
    return Inputs(q, k, v, None, grid, prefix, causal=causal)


def freeswim(**options):
    return create_mechanism("freeswim", DIM, HEADS, **options)


def dense(asked, hidden=None, factor=1.0):
    scores = factor * asked.q @ asked.k.transpose(-2, -1) / WIDTH**0.5
    scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1)


def first_key(at, side, length):
    """Where a window of ``side`` begins around ``at``: shifted inwards at the borders."""
    return min(max(at - side // 2, 0), length - side)


def window_mask(grid, sides):
    """(N, N), True where a key lies outside the query's window; keys counted one by one."""
    places = list(
        torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, len(grid)).tolist()
    )
    sides = [min(side, length) for side, length in zip(sides, grid, strict=True)]
    hidden = torch.ones(len(places), len(places), dtype=torch.bool)
    for i, query in enumerate(places):
        low = [first_key(*x) for x in zip(query, sides, grid, strict=True)]
        for j, key in enumerate(places):
            hidden[i, j] = not all(
                a <= y < a + side for a, y, side in zip(low, key, sides, strict=True)
            )
    return hidden


@pytest.mark.parametrize("refresh", [1, 2])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(
    "grid, kernel",
    [((5, 6), 3), ((7, 9), 4), ((3, 8), (4, 2)), ((1, 1), 3), ((11,), 4), ((2, 5, 4), 3)],
)
def test_it_is_what_its_equations_say(grid, kernel, prefix, refresh):
    asked = inputs(grid, prefix)
    sides = (kernel,) * len(grid) if isinstance(kernel, int) else kernel
    sides = (grid[0], *sides[1:]) if len(grid) == 3 else sides
    hidden = F.pad(window_mask(grid, sides), (prefix, 0, prefix, 0), value=False)
    seen, trained = math.prod(grid), math.prod(sides)
    factor = math.sqrt(max(1.0, math.log(seen) / math.log(trained)))
    a = torch.cat(
        [dense(asked, None, factor)[:, :, :prefix], dense(asked, hidden)[:, :, prefix:]], 2
    )
    y = freeswim(kernel=kernel, refresh=refresh).attend(asked)
    assert torch.allclose(y, a @ asked.v, atol=1e-6)
    leaves, g = (asked.q, asked.k, asked.v), random(*y.shape, seed=9)
    expected, found = torch.autograd.grad(a @ asked.v, leaves, g), torch.autograd.grad(y, leaves, g)
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(expected, found, strict=True))


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("kernel", [1, 4, 30])
def test_causal_it_reads_the_last_tokens_of_a_row(kernel, prefix):
    asked = inputs((13,), prefix, causal=True)
    n = prefix + 13
    i = torch.arange(n)
    hidden = (i[:, None] - i >= kernel) & (i >= prefix)
    hidden |= i > i[:, None]
    y = freeswim(kernel=kernel).attend(asked)
    assert torch.allclose(y, dense(asked, hidden) @ asked.v)


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 1)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("options", [{}, {"refresh": 3}, {"log_scale": False}])
def test_on_the_training_grid_and_below_it_is_dense(options, prefix, grid):
    asked = inputs(grid, prefix)
    y = freeswim(kernel=(4, 6), **options).attend(asked)
    assert torch.allclose(y, dense(asked) @ asked.v)


def test_the_scale_keeps_the_entropy_of_the_training_grid():
    """Of keys that are drawn alike: exp(s) of normal scores spreads over a share of them that shrinks
    with s, so more keys need a larger s."""
    q, k = random(1, HEADS, 1, WIDTH), random(1, HEADS, 1 + 64 * 64, WIDTH, seed=1)
    q = q.expand(-1, -1, 1 + 64 * 64, -1)
    entropy = {}
    for side in (8, 64):
        n = 1 + side * side
        for scaled in (True, False):
            asked = Inputs(q[:, :, :n], k[:, :, :n], k[:, :, :n], None, (side, side), 1)
            row = freeswim(kernel=8, log_scale=scaled).operator(asked).rows(torch.tensor([0]))
            entropy[side, scaled] = -(row * row.log()).sum(-1).mean()
    assert entropy[8, True] == entropy[8, False] < entropy[64, True] < entropy[64, False]


# ---------------------------------------------------------------------- in a model


def vit(size=64, depth=4, **options):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=size, embed_dim=DIM, num_heads=HEADS, depth=depth,
        num_classes=3, **options,
    ).eval()  # fmt: skip


@torch.no_grad()
def test_a_model_at_its_training_size_keeps_its_logits():
    net, x = vit(), torch.randn(2, 3, 64, 64)
    before = net(x)
    for options in ({"kernel": 4}, {"kernel": 4, "log_scale": False}):
        convert(net, "freeswim", options=options)
        assert torch.allclose(net(x), before, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("times", [2, 4])
def test_a_model_runs_at_several_times_its_training_size(times):
    net = tile_positions(vit(), (64 * times, 64 * times))
    convert(net, "freeswim", options={"kernel": 4})
    with record(net) as calls:
        logits = net(torch.randn(1, 3, 64 * times, 64 * times))
    assert logits.isfinite().all()
    a = calls[0].operator.rows(torch.arange(1 + 16 * times**2))
    assert ((a[:, :, 1:, 1:] > 0).sum(-1) == 16).all()
    assert calls[0].maps["outside"].shape == (1, HEADS, 4 * times, 4 * times)


@torch.no_grad()
def test_rows_of_prefix_tokens_are_copied_between_the_layers_that_compute_them():
    net = vit(size=128, depth=5)
    convert(net, "freeswim", options={"kernel": 4, "refresh": 3})
    for batch in (2, 1, 2):  # nothing is left from one pass for the next
        with record(net) as calls:
            net(torch.randn(batch, 3, 128, 128, generator=torch.Generator().manual_seed(batch)))
        rows = [call.operator.rows(torch.tensor([0])) for call in calls]
        assert [torch.equal(rows[i], rows[0]) for i in range(5)] == [True] * 3 + [False] * 2
        assert torch.equal(rows[4], rows[3])
        alone = net.blocks[3].attn.mechanism
        q, k = calls[3].operator.terms[0].operator.q, calls[3].operator.terms[0].operator.k
        own = alone.operator(Inputs(q, k, k, None, (8, 8), 1)).rows(torch.tensor([0]))
        assert torch.allclose(own, rows[3])
    rows = [call.operator.rows(torch.arange(1, 65)) for call in calls]
    assert not torch.allclose(rows[0], rows[1])


def test_copied_rows_have_gradients_and_compile_as_one_graph():
    net = vit(size=96, depth=2)
    convert(net, "freeswim", options={"kernel": 4, "refresh": 2})
    x = torch.randn(1, 3, 96, 96)
    expected = net(x)
    weight = net.blocks[0].attn.qkv.weight
    (found,) = torch.autograd.grad(expected.sum(), weight)
    assert found.isfinite().all() and found.abs().sum() > 0
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-5)


def test_repeated_positions_hold_every_trained_one_in_every_window():
    net = vit(size=(64, 48))
    own = net.pos_embed[:, 1:].unflatten(1, (4, 3))
    first = net.pos_embed[:, :1]
    tile_positions(net, (160, 112))
    assert net.patch_embed.grid_size == (10, 7) and torch.equal(net.pos_embed[:, :1], first)
    tiled = net.pos_embed[:, 1:].unflatten(1, (10, 7))
    for y, x in ((0, 0), (3, 2), (6, 4)):
        part = tiled[:, y : y + 4, x : x + 3].flatten(1, 2)
        assert torch.equal(part.sort(1).values, own.flatten(1, 2).sort(1).values)


def test_a_backbone_is_loaded_with_repeated_positions(tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("test_vit", num_classes=3).state_dict()
    torch.save(state, tmp_path / "w.pth")
    side = 2 * timm.create_model("test_vit").patch_embed.img_size[0]
    found = load_backbone("test_vit", tmp_path / "w.pth", input_size=side, tile_positions=True)
    resized = load_backbone("test_vit", tmp_path / "w.pth", input_size=side)
    assert found.preprocessing == resized.preprocessing
    assert found.fingerprint != resized.fingerprint
    assert found.model.pos_embed.shape == resized.model.pos_embed.shape
    grid = [n // 2 for n in found.model.patch_embed.grid_size]
    patches = found.model.pos_embed[0, 1:].unflatten(0, found.model.patch_embed.grid_size)
    assert torch.equal(patches[: grid[0]], patches[grid[0] :])


# ---------------------------------------------------------------------- maps, memory, bad input


def test_maps_show_what_lies_outside_the_window_and_what_prefix_tokens_read():
    asked = inputs((7, 8), 2)
    layer = freeswim(kernel=3)
    with record() as calls:
        layer.attend(asked)
    maps = calls[0].maps
    hidden = F.pad(window_mask((7, 8), (3, 3)), (2, 0, 2, 0), value=False)
    outside = (dense(asked) * hidden).sum(-1)[..., 2:].unflatten(-1, (7, 8))
    assert torch.allclose(maps["outside"], outside.detach())
    full = layer.operator(asked).rows(torch.arange(2)).mean(1)[..., 2:].unflatten(-1, (7, 8))
    assert torch.equal(maps["full"], full.detach())
    with record() as calls:
        freeswim(kernel=3).attend(inputs((7, 8)))
    assert set(calls[0].maps) == {"outside"}


def test_equal_keys_give_means():
    asked = inputs((6, 6), 1)
    equal = asked.replace(k=torch.ones_like(asked.k))
    a = freeswim(kernel=2).operator(equal).rows(torch.arange(37))
    assert torch.allclose(a[:, :, 0], torch.full((2, HEADS, 37), 1 / 37).double())
    assert torch.allclose(a[:, :, 1:].amax(-1), torch.full((2, HEADS, 36), 1 / 5).double())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: freeswim(kernel=0), "kernel: got 0"),
        (lambda: freeswim(refresh=0), "refresh: got 0"),
        (
            lambda: freeswim(kernel=(3, 3, 3)).attend(inputs((8, 8))),
            r"kernel: got \(3, 3, 3\) for a grid \(8, 8\); give one number",
        ),
        (
            lambda: freeswim(kernel=(3, 3)).attend(inputs((9,), causal=True)),
            r"kernel: got \(3, 3\) for a grid \(9,\); give one number",
        ),
        (lambda: freeswim().attend(inputs((8, 8)).replace(grid=None)), "grid: freeswim needs"),
        (lambda: tile_positions(torch.nn.Linear(2, 2), (8, 8)), "tile_positions: Linear has no"),
        (lambda: load_backbone("test_vit", None, tile_positions=True), "tile_positions: needs"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
