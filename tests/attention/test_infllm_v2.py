"""InfLLM v2: against its equations on a grid, in a row and causal, and its limits."""

import math

import pytest
import torch
import torch.nn.functional as F

from xattn.attention import Inputs, create_attention, create_mechanism, record
from xattn.attention.mechanisms.infllm_v2 import key_windows

HEADS, WIDTH = 4, 8
DIM = HEADS * WIDTH


def inputs(grid, prefix=0, key_heads=HEADS, batch=2, causal=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = prefix + math.prod(grid)
    q, k, v = (
        torch.randn(batch, heads, n, WIDTH, generator=generator, dtype=torch.float64)
        for heads in (HEADS, key_heads, key_heads)
    )
    return Inputs(q, k, v, None, grid, prefix, causal=causal)


def infllm(**options):
    return create_mechanism("infllm_v2", DIM, HEADS, **{"dense_below": 0, **options})


def places(grid):
    return torch.cartesian_prod(*(torch.arange(length) for length in grid)).view(-1, len(grid))


def windows_of(grid, kernel, stride):
    """Tokens of each window, which begin every ``stride`` until one reaches the end of a side."""
    at, found = places(grid), []
    counts = [max(0, math.ceil((length - kernel) / stride)) + 1 for length in grid]
    for corner in places(counts) * stride:
        inside = ((at >= corner) & (at < corner + kernel)).all(1)
        found.append(inside.nonzero()[:, 0].tolist())
    return found


def defined(asked, selected, block, stride, kernel, local=1, first=1, coarse=None):
    """The mask (B, H, N, N) of what is seen, from the definition, by loops."""
    grid, prefix = asked.grid, asked.prefix
    batch, heads, n, _ = asked.q.shape
    key_heads = asked.k.shape[1]
    cells = places(grid) // block
    tiles = cells.unique(dim=0)
    number = (cells[:, None] == tiles).all(-1).int().argmax(1)
    windows = windows_of(grid, kernel, stride)
    q, k = asked.q[:, :, prefix:], asked.k[:, :, prefix:]
    scores = {}
    for name, cut in (("fine", windows), ("coarse", coarse)):
        if cut is not None:
            means = torch.stack([k[:, :, w].mean(2) for w in cut], 2)
            means = means.repeat_interleave(heads // key_heads, 1)
            s = q @ means.transpose(-2, -1) / WIDTH**0.5
            if asked.causal:
                length = kernel if name == "fine" else 4 * kernel
                begin = stride * (1 if name == "fine" else 4) * torch.arange(len(cut))
                ended = begin + length <= torch.arange(1, n - prefix + 1)[:, None]
                s = s.masked_fill(~ended, -torch.inf)
            scores[name] = s
    lse = scores.get("coarse", scores["fine"]).logsumexp(-1, keepdim=True)
    p = (scores["fine"] - torch.where(lse.isneginf(), 0.0, lse)).exp()
    p = p.unflatten(1, (key_heads, -1)).sum(2)
    near = (tiles[:, None] - tiles).abs().amax(-1) <= local
    seen = torch.zeros(batch, key_heads, n - prefix, n - prefix, dtype=torch.bool)
    groups = [[i] for i in range(n - prefix)] if asked.causal else [
        (number == t).nonzero()[:, 0].tolist() for t in range(len(tiles))
    ]  # fmt: skip
    for b in range(batch):
        for h in range(key_heads):
            for group in groups:
                r, own = p[b, h, group].sum(0), int(number[group[0]])
                block_score = torch.stack([
                    max((r[c] for c, w in enumerate(windows) if (number[w] == t).any()))
                    for t in range(len(tiles))
                ])  # fmt: skip
                must = near[own].nonzero()[:, 0].tolist()
                if asked.causal:
                    must = [t for t in {*range(first), *must} if t <= own]
                block_score[must] = torch.inf
                count = min(selected, len(tiles), int((block_score > 0).sum()))
                chosen = block_score.sort(descending=True, stable=True).indices[
                    :count
                ]  # blocks share windows
                seen[b, h, group] = torch.isin(number, chosen)
    mask = torch.ones(batch, heads, n, n, dtype=torch.bool)
    mask[:, :, prefix:, prefix:] = seen.repeat_interleave(heads // key_heads, 1)
    return mask.tril() if asked.causal else mask


def masked(asked, mask):
    k, v = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (asked.k, asked.v))
    scores = (asked.q @ k.transpose(-2, -1) / WIDTH**0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    "grid, prefix, key_heads",
    [((6, 9), 0, HEADS), ((7, 10), 1, 2), ((1, 13), 2, 2), ((21,), 5, HEADS)],
)
@pytest.mark.parametrize(
    "options",
    [
        {"block": 2, "stride": 1, "kernel": 2, "selected": 3, "local": 0},
        {"block": 3, "stride": 2, "kernel": 3, "selected": 10, "backend": "cpu"},
        {"block": 2, "stride": 2, "kernel": 2, "selected": 4, "local": 0},
    ],
)
def test_it_is_what_its_equations_say(grid, prefix, key_heads, options):
    asked = inputs(grid, prefix, key_heads)
    leaves = [x.requires_grad_() for x in (asked.q, asked.k, asked.v)]
    own = {key: value for key, value in options.items() if key != "backend"}
    expected = masked(asked, defined(asked, **own))
    found = infllm(**options).attend(asked)
    assert torch.allclose(found, expected, atol=1e-10)
    g = torch.randn(found.shape, dtype=found.dtype)
    for a, b in zip(*(torch.autograd.grad(y, leaves, g) for y in (found, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("prefix, key_heads", [(0, HEADS), (1, 2), (2, 2), (5, HEADS)])
@pytest.mark.parametrize(
    "normaliser, backend", [("exact", "auto"), ("exact", "cpu"), ("coarse", "cpu")]
)
def test_causal_it_is_what_its_equations_say(prefix, key_heads, normaliser, backend):
    asked = inputs((29,), prefix, key_heads, causal=True)
    options = {"selected": 4, "block": 4, "stride": 2, "kernel": 4}
    coarse = windows_of((29,), 16, 8) if normaliser == "coarse" else None
    expected = masked(asked, defined(asked, **options, coarse=coarse))
    layer = infllm(**options, normaliser=normaliser, backend=backend)
    assert torch.allclose(layer.attend(asked), expected, atol=1e-10)


@pytest.mark.parametrize("grid", [(8, 8), (7, 10)])
def test_the_coarse_normaliser_is_that_of_windows_twice_as_long_on_a_grid(grid):
    asked = inputs(grid, 1, key_heads=2)
    options = {"selected": 3, "block": 2, "stride": 1, "kernel": 2, "local": 0}
    expected = masked(asked, defined(asked, **options, coarse=windows_of(grid, 4, 2)))
    assert torch.allclose(
        infllm(**options, normaliser="coarse").attend(asked), expected, atol=1e-10
    )


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(
    "grid, causal", [((5, 6), False), ((7, 9), False), ((11,), False), ((11,), True)]
)
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_choosing_every_block_is_dense(grid, causal, prefix, backend):
    asked = inputs(grid, prefix, causal=causal)
    y = infllm(block=2, stride=1, selected=99, backend=backend).attend(asked)
    expected = F.scaled_dot_product_attention(asked.q, asked.k, asked.v, is_causal=causal)
    assert torch.allclose(y, expected)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_short_inputs_are_dense_to_the_bit(prefix, causal):
    asked = inputs((49,), prefix, causal=causal)
    asked = asked.replace(**{name: getattr(asked, name).float() for name in "qkv"})
    dense = create_mechanism("softmax", DIM, HEADS).attend(asked)
    assert torch.equal(infllm(dense_below=50).attend(asked), dense)
    assert torch.equal(
        dense, F.scaled_dot_product_attention(asked.q, asked.k, asked.v, is_causal=causal)
    )
    assert not torch.equal(infllm(dense_below=49, block=2, selected=4).attend(asked), dense)
    # what counts are the tokens behind the prefix, as a ViT has them at its default
    assert torch.equal(create_mechanism("infllm_v2", DIM, HEADS).attend(asked), dense)


def test_forced_blocks_are_those_around_and_the_first():
    grid = key_windows((6, 8), 2, 1, 2, local=1)
    assert sorted(grid.forced[0, 0, 5].tolist()) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert sorted(grid.forced[0, 0, 0].tolist()) == [-1] * 5 + [0, 1, 4, 5]
    row = key_windows((40,), 4, 2, 4, local=2, first=1, causal=True)
    assert row.forced[0, 0, 30].tolist() == [7, 6, 5, 0]
    assert row.forced[0, 0, 2].tolist() == [0, -1, -1, 0]
    assert row.visible.tolist()[:7] == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("grid", [(9, 14), (5, 3), (23,)])
def test_every_token_is_in_a_window_and_blocks_take_the_windows_over_them(grid):
    kernel, stride, block = 4, 2, 3
    made = key_windows(grid, block, stride, kernel)
    cells = places(grid) // block
    tiles = cells.unique(dim=0)
    windows = windows_of(grid, kernel, stride)
    assert set().union(*windows) == set(range(math.prod(grid)))
    for t, tile in enumerate(tiles):
        expected = [c for c, w in enumerate(windows) if (cells[w] == tile).all(1).any()]
        assert [c for c in made.table[t].tolist() if c >= 0] == expected


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", [(1, 1), (1,), (2, 1), (5, 6), (3,)])
def test_short_inputs_and_equal_keys(grid, causal):
    if causal and len(grid) > 1:
        grid = (math.prod(grid),)
    asked = inputs(grid, causal=causal)
    asked = asked.replace(k=torch.ones_like(asked.k))
    y = infllm(block=64, stride=5, kernel=70, selected=50).attend(asked)
    count = torch.arange(1, y.shape[2] + 1)[:, None]
    mean = asked.v.cumsum(2) / count if causal else asked.v.mean(2, keepdim=True)
    assert torch.allclose(y, mean.expand_as(y))


@pytest.mark.parametrize("prefix", [0, 1])
def test_maps_show_where_windows_get_attention_and_which_blocks_are_read(prefix):
    grid, options = (5, 7), {"block": 2, "stride": 1, "kernel": 3, "selected": 3, "local": 0}
    asked = inputs(grid, prefix, key_heads=2)
    with record() as calls:
        infllm(**options).attend(asked)
    maps = calls[0].maps
    windows = windows_of(grid, 3, 1)
    patches = asked.k[:, :, prefix:]
    means = torch.stack([patches[:, :, w].mean(2) for w in windows], 2).repeat_interleave(2, 1)
    p = (asked.q @ means.transpose(-2, -1) / WIDTH**0.5).softmax(-1)
    holds = torch.zeros(35, len(windows), dtype=torch.float64)
    for c, w in enumerate(windows):
        holds[w, c] = 1.0
    holds /= holds.sum(1, keepdim=True)
    expected = p[:, :, prefix:].mean((1, 2)) @ holds.T
    assert torch.allclose(maps["importance"].double().flatten(1), expected, atol=1e-6)
    if prefix:
        first = p[:, :, 0].mean(1) @ holds.T
        assert torch.allclose(maps["class_importance"].double().flatten(1), first, atol=1e-6)
    assert ("class_importance" in maps) == (prefix > 0)
    mask = defined(asked, **options)[:, ::2, prefix:, prefix:].double()
    tile = (places(grid) // 2) @ torch.tensor([4, 1])
    rows = torch.stack([mask[:, :, (tile == t).nonzero()[0, 0]] for t in range(12)]).mean(0)
    assert torch.allclose(maps["selected"].double().flatten(2), rows)


def test_a_layer_in_a_row_needs_no_grid():
    layer = create_attention("infllm_v2", DIM, HEADS, kv_heads=2, block=4, dense_below=0)
    x = torch.randn(2, 27, DIM)
    assert torch.equal(layer(x, None, 2), layer(x, (25,), 2))
    with record() as calls:
        layer(x, None, 2, causal=True)
    assert calls[0].operator.causal and calls[0].maps == {}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"selected": 0}, "selected: got 0"),
        ({"local": -1}, "local: got -1; give 0 or more"),
        ({"dense_below": -5}, "dense_below: got -5"),
        ({"kernel": 2, "stride": 3}, "kernel: got 2; give at least 3, the stride"),
        ({"normaliser": "none"}, "normaliser: got 'none'; give 'exact' or 'coarse'"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        infllm(**options).attend(inputs((8, 8)))


def test_fewer_blocks_than_are_always_read_are_refused():
    for grid, causal, always in (((8, 8), False, 9), ((24,), False, 3), ((24,), True, 3)):
        layer = infllm(block=2, stride=1, selected=always - 1)
        with pytest.raises(ValueError, match=f"selected: got {always - 1}; give at least {always}"):
            layer.attend(inputs(grid, causal=causal))
