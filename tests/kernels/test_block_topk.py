"""The choice of key blocks: against a loop over the definition, and that the paths agree."""

import math

import pytest
import torch

from xattn.kernels.backend import HAS_TRITON
from xattn.kernels.block_topk import block_topk, cpu, reference
from xattn.kernels.block_topk.reference import Problem

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))
ALL = ["reference", "cpu", TRITON]


def lists(generator, batch, heads, rows, entries, blocks, holes=0.3):
    order = torch.rand(batch, heads, rows, blocks, generator=generator).argsort(-1)[..., :entries]
    return order.masked_fill(torch.rand(order.shape, generator=generator) < holes, -1).int()


def plain(q, k, s, *, q_block=1, reduce="sum", softmax=False, spread=None, forced=None, within=None,
          children=None, visible=None, lse=None, scale=None):  # fmt: skip
    """The definition by loops, in float64."""
    (batch, heads, n, d), (key_heads, c) = q.shape, k.shape[1:3]
    rows, group, scale = math.ceil(n / q_block), heads // key_heads, scale or d**-0.5
    table, weights, pooling = spread_table(c, spread)
    m = len(table)
    index = torch.full((batch, key_heads, rows, s), -1, dtype=torch.int32)
    values = torch.full(index.shape, -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(key_heads):
            for r in range(rows):
                own = q[b, h * group : (h + 1) * group, r * q_block : (r + 1) * q_block]
                limit = c if visible is None else int(visible[r])
                t = scale * own.reshape(-1, d) @ k[b, h, :limit].T
                if lse is not None:
                    base = lse[b, h * group : (h + 1) * group, r * q_block : (r + 1) * q_block]
                    t = (t - base.nan_to_num(neginf=0.0).reshape(-1, 1)).exp()
                elif softmax and limit:
                    t = t.softmax(-1)
                t = t.amax(0) if reduce == "max" else getattr(t, reduce)(0)
                scores = {}
                for j in range(m):
                    near = [
                        float(t[x]) * w
                        for x, w in zip(table[j], weights[j], strict=True)
                        if 0 <= x < limit
                    ]
                    if near:
                        mean = sum(near) / (len(near) if pooling == "mean" else 1)
                        scores[j] = max(near) if pooling == "max" else mean
                if within is not None:
                    x = within[
                        b % len(within), h % within.shape[1], r // math.ceil(rows / within.shape[2])
                    ]
                    scores = {j: y for j, y in scores.items() if j // children in x.tolist()}
                if forced is not None:
                    x = forced[b % len(forced), h % forced.shape[1], r].tolist()
                    scores |= {j: math.inf for j in x if j >= 0}
                ranked = sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:s]
                for at, (j, y) in enumerate(ranked):
                    index[b, h, r, at], values[b, h, r, at] = j, y
    return index, values


def spread_table(c, spread):
    """Candidates of each block, their weights, and how they are pooled."""
    *window, pooling = spread or (1, 1, 0, "max")
    if len(window) <= 2:
        table, weights = window[0], window[1] if window[1:] else torch.ones(window[0].shape)
        return table.tolist(), weights.double().tolist(), pooling
    kernel, stride, padding = window
    m = (c + 2 * padding - kernel) // stride + 1
    table = [[j * stride - padding + i for i in range(kernel)] for j in range(m)]
    return table, [[1.0] * kernel] * m, pooling


TABLE = torch.tensor(
    [[0, 3, -1], [5, -1, -1], [-1, -1, -1], [8, 1, 4], [17, 18, 2], [6, 12, 7]], dtype=torch.int32
)
WEIGHTS = torch.tensor([0.5, 1.0, 0.25]).expand(6, 3) + torch.arange(6.0)[:, None]
CASES = {
    "one query, one head": (2, 2, 2, 17, 9, 1, 3, {}),
    "groups and tiles, longer than C": (1, 4, 2, 21, 10, 8, 12, {"reduce": "mean", "visible": True}),
    "max": (2, 2, 1, 13, 20, 4, 4, {"reduce": "max", "forced": 2}),
    "max in parents": (1, 2, 2, 21, 20, 4, 4, {"reduce": "max", "within": 2}),
    "softmax": (2, 4, 2, 11, 19, 4, 5, {"softmax": True, "visible": True}),
    "overlapping windows": (1, 2, 1, 19, 41, 4, 3, {"softmax": True, "spread": (5, 4, 1, "max"), "forced": 3, "visible": True}),
    "a table of windows": (1, 2, 1, 24, 19, 4, 3, {"softmax": True, "spread": (TABLE, "max"), "forced": 3}),
    "a table, visible": (1, 2, 2, 22, 19, 4, 3, {"softmax": True, "spread": (TABLE, "mean"), "visible": True}),
    "a table of sums in parents": (2, 2, 1, 24, 19, 4, 3, {"spread": (TABLE, "sum"), "within": 2}),
    "a table of weighted sums": (1, 4, 2, 24, 19, 4, 3, {"softmax": True, "spread": (TABLE, WEIGHTS, "sum"), "forced": 3}),
    "weighted sums, single queries": (2, 4, 2, 21, 19, 1, 3, {"softmax": True, "spread": (TABLE, WEIGHTS, "sum"), "visible": True}),
    "given log-sum-exp": (2, 4, 2, 24, 19, 4, 5, {"softmax": True, "lse": True}),
    "given log-sum-exp, causal": (1, 4, 2, 22, 19, 4, 5, {"softmax": True, "lse": True, "visible": True, "spread": (5, 4, 1, "max")}),
    "sum of windows": (1, 1, 1, 9, 22, 1, 5, {"spread": (3, 2, 2, "sum"), "within": 2}),
    "mean of windows": (1, 2, 2, 17, 24, 16, 4, {"softmax": True, "reduce": "max", "spread": (4, 3, 0, "mean"), "visible": True}),
    "hierarchical": (2, 2, 2, 33, 70, 2, 4, {"within": 3}),
    "hierarchical, forced, causal": (1, 4, 2, 63, 63, 8, 6, {"reduce": "mean", "within": 2, "forced": 2, "visible": True}),
}  # fmt: skip


def case(name, dtype=torch.float64):
    batch, heads, key_heads, n, c, q_block, s, options = CASES[name]
    generator = torch.Generator().manual_seed(3)
    q, k = (
        torch.randn(batch, h, x, 16, generator=generator, dtype=torch.float64)
        for h, x in ((heads, n), (key_heads, c))
    )
    rows, options = math.ceil(n / q_block), dict(options, q_block=q_block)
    m = len(spread_table(c, options.get("spread"))[0])
    if "forced" in options:
        forced = lists(generator, batch, 1, rows, options["forced"], m)
        forced[:, :, ::3, 0] = forced[:, :, ::3, 1]  # the same one twice
        options["forced"] = forced
    if "within" in options:
        parents = math.ceil(rows / 3)
        options["within"] = lists(
            generator, 1, key_heads, parents, options["within"], math.ceil(m / 3)
        )
        options["children"] = 3
    if "visible" in options:
        options["visible"] = (torch.arange(rows) * c // rows).int()  # the first sees nothing
    if "lse" in options:
        options["lse"] = torch.randn(batch, heads, n, generator=generator, dtype=torch.float64)
        options["lse"][:, :, 0] = -math.inf
    return q.to(dtype), k.to(dtype), s, options


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ALL)
def test_lists_and_scores_follow_the_definition(backend, name):
    q, k, s, options = case(name)
    index, values = plain(q, k, s, **options)
    for dtype in [torch.float32] if backend == "triton" else [torch.float64, torch.float32]:
        if "lse" in options:
            options = options | {"lse": options["lse"].to(dtype)}
        found, scores = block_topk(q.to(dtype), k.to(dtype), s, backend=backend, **options)
        assert found.dtype == torch.int32 and scores.dtype == dtype
        assert torch.equal(found, index)
        assert torch.allclose(scores.double(), values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("backend", ALL)
def test_ties_go_to_the_lowest_number(backend, within):
    generator = torch.Generator().manual_seed(5)
    q = torch.randint(-1, 2, (1, 2, 17, 16), generator=generator).float()
    k = torch.randint(-1, 2, (1, 2, 70, 16), generator=generator).float()
    k *= torch.rand(k.shape, generator=generator) < 0.1
    q[:, :, 3], k[:, :, 5] = -0.0, -0.0  # zeros of both signs are equal
    options = {"scale": 0.5, "q_block": 2}
    if within:  # not in order
        options |= {"within": lists(generator, 1, 1, 3, 4, 14, 0.0), "children": 5}
    found = block_topk(q, k, 9, backend=backend, **options)
    index, values = plain(q.double(), k.double(), 9, **options)
    assert torch.equal(found[0], index) and torch.equal(found[1].double(), values)


@pytest.mark.parametrize("backend", ALL)
def test_forced_blocks_come_first_whatever_else_holds(backend):
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(1, 1, 5, 16, generator=generator),
        torch.randn(1, 1, 12, 16, generator=generator),
    )
    forced = torch.tensor([[9, 4, 9], [11, 10, 2], [-1, -1, -1], [0, -1, 3], [7, 6, 5]]).int()
    nothing = torch.zeros(5, dtype=torch.int32)
    index, scores = block_topk(q, k, 2, forced=forced[None, None], visible=nothing, backend=backend)
    assert index[0, 0].tolist() == [[4, 9], [2, 10], [-1, -1], [0, 3], [5, 6]]
    assert scores[0, 0].isinf().all() and not scores.isnan().any()


@pytest.mark.parametrize("backend", ALL)
def test_levels_that_keep_every_parent_find_what_a_flat_search_finds(backend):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 2, 32, 16, generator=generator)
    k = torch.randn(1, 2, 20, 16, generator=generator)
    every = torch.arange(5).expand(1, 1, 2, 5).int()
    flat = block_topk(q, k, 4, q_block=4, backend=backend)
    level = block_topk(q, k, 4, q_block=4, within=every, children=4, backend=backend)
    assert torch.equal(flat[0], level[0]) and torch.allclose(flat[1], level[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cpu", TRITON])
def test_half_precision_scores_are_summed_in_float32(backend, dtype):
    q, k, s, options = case("hierarchical", dtype)
    index, scores = block_topk(q, k, s, backend=backend, **options)
    exact = plain(q.double(), k.double(), s, **options)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores.double(), exact[1], atol=1e-4)
    assert (index == exact[0]).float().mean() > 0.98


@pytest.mark.parametrize(
    "name",
    [
        "hierarchical, forced, causal",
        "overlapping windows",
        "max",
        "a table of windows",
        "given log-sum-exp",
    ],
)
def test_chunks_of_any_size_agree(name, monkeypatch):
    q, k, s, options = case(name)
    expected = block_topk(q, k, s, backend="cpu", **options)
    for tile in (1, 2000):
        monkeypatch.setattr(cpu, "TILE", tile)
        found = block_topk(q, k, s, backend="cpu", **options)
        assert torch.equal(found[0], expected[0]) and torch.allclose(found[1], expected[1])


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_scores_have_a_gradient_and_the_choice_has_none(softmax, reduce):
    generator = torch.Generator().manual_seed(2)
    q, k = (
        torch.randn(1, h, n, 3, generator=generator, dtype=torch.float64).requires_grad_()
        for h, n in ((4, 5), (2, 7))
    )
    visible = torch.tensor([0, 4, 7], dtype=torch.int32)

    def scores(q, k):
        options = (
            None,
            None,
            visible,
            None,
            None,
            None,
            1,
            2,
            reduce,
            softmax,
            [3, 2, 1],
            "mean",
            1,
            0.7,
            "",
        )
        found = reference.scores(Problem(q, k, *options))
        return torch.where(found.isneginf(), 0.0, found)

    assert torch.autograd.gradcheck(scores, (q, k))
    index, values = block_topk(q, k, 2, q_block=2)
    assert not index.requires_grad and not values.requires_grad


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(1, 3, 6, 16)}, "k: got shape .* heads that divide its 2"),
        ({"k": torch.zeros(1, 2, 6, 16).double()}, "k: got torch.float64"),
        ({"s": 0}, "s, q_block: got 0, 4"),
        ({"reduce": "min"}, "reduce: got 'min'; choose one of sum, mean, max"),
        ({"spread": (3, 1, 1, "min")}, "spread: got 'min'"),
        ({"spread": (3, 1, 3, "max")}, "spread: got kernel 3, stride 1, padding 3 for 6"),
        ({"spread": (9, 1, 1, "max")}, "spread: got kernel 9"),
        ({"forced": torch.zeros(1, 1, 2, 1).int()}, r"forced: got shape .*give \(1 or 1, 1 or 2, 3"),
        ({"forced": torch.full((1, 1, 3, 1), 6).int()}, r"forced: got the block 6; give -1 \(none\) to 5"),
        ({"within": torch.zeros(1, 1, 3, 1).int()}, "children: got None"),
        ({"children": 2}, "children: got 2; give the number .* only then"),
        ({"within": torch.zeros(1, 1, 3, 2).int(), "children": 2}, "within: block 0 is twice"),
        ({"within": torch.full((1, 1, 3, 1), 3).int(), "children": 2}, "within: got the block 3"),
        ({"visible": torch.zeros(9).int()}, r"visible: got shape \(9,\); give \(3,\)"),
        ({"visible": torch.zeros(3)}, "visible: got torch.float32 .*give int32"),
        ({"spread": (torch.zeros(3).int(), "max")}, r"spread: got a table of shape \(3,\)"),
        ({"spread": (torch.full((2, 2), 6).int(), "max")}, "spread: got the block 6; .*to 5"),
        ({"spread": (torch.zeros(2, 2), "max")}, "spread: got torch.float32"),
        ({"spread": (torch.zeros(2, 2).int(), torch.zeros(2, 1), "sum")}, r"spread: got weights .*2, 1"),
        ({"spread": (torch.zeros(2, 2).int(), torch.zeros(2, 2), "max")}, "'max'; give those of .*'sum'"),
        ({"lse": torch.zeros(1, 2, 9)}, r"lse: got shape .*softmax=False; give \(1, 2, 9\)"),
        ({"lse": torch.zeros(1, 2, 6), "softmax": True}, r"lse: got shape \(1, 2, 6\)"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_match_are_named(change, message):
    options = {"q": torch.zeros(1, 2, 9, 16), "k": torch.zeros(1, 2, 6, 16), "s": 2, "q_block": 4}
    with pytest.raises(ValueError, match=message):
        block_topk(**(options | change))


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_triton_refuses_what_it_has_no_tile_for():
    q = torch.zeros(1, 1, 300, 16)
    with pytest.raises(ValueError, match="backend='triton': got s = 257"):
        block_topk(q, q, 257, backend="triton")
    with pytest.raises(ValueError, match="backend='triton': got torch.float64"):
        block_topk(q.double(), q.double(), 2, backend="triton")
