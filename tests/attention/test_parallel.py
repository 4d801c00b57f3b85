"""Parallel cross-attention: limit cases, operators and maps of each stream, explainers, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from xattn.attention import ParallelCrossAttention, record, stream_shares, token_maps
from xattn.attention.record import replace_products
from xattn.explainers.relevance.engine import Engine

DIM, HEADS, GRID = 24, 3, (3, 5)
WIDTHS, LENGTHS = (10, 7, 24), (4, 6, 1)
N = GRID[0] * GRID[1]


def layer(widths=WIDTHS, trained=True, seed=0, **options):
    torch.manual_seed(seed)
    made = ParallelCrossAttention(DIM, HEADS, widths, **options).double()
    if trained:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made


def given(batch=2, prefix=0, seed=1, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(batch, prefix + N, DIM)
    return x, [draw(batch, n, width) for n, width in zip(lengths, WIDTHS, strict=True)]


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


# ---------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("shared", [False, True], ids=["own queries", "one query"])
def test_it_is_the_sum_of_cross_attention_to_each_stream(shared):
    made = layer(shared_query=shared)
    x, streams = given()
    expected = made.bias.expand_as(x)
    for s, c in enumerate(streams):
        q = made.q[0 if shared else s](x)
        read = F.scaled_dot_product_attention(*map(heads, (q, made.k[s](c), made.v[s](c))))
        expected = expected + read.transpose(1, 2).flatten(2) @ made.proj[s].weight.T
    torch.testing.assert_close(made(x, streams), expected)
    assert sum(p.numel() for p in made.q.parameters()) == (1 if shared else 3) * DIM * (DIM + 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_at_the_start_it_is_the_first_stream_bit_for_bit(dtype):
    made = layer(trained=False).to(dtype)
    alone = ParallelCrossAttention(DIM, HEADS, WIDTHS[:1]).to(dtype)
    alone.load_state_dict({k: made.state_dict()[k] for k in alone.state_dict()})
    x, streams = given()
    x, streams = x.to(dtype), [c.to(dtype) for c in streams]
    assert torch.equal(made(x, streams), alone(x, streams[:1]))
    made(x, streams).square().sum().backward()
    assert made.proj[1].weight.grad.abs().max() > 0, "an added stream can learn"


@pytest.mark.parametrize("empty", ["None", "no token", "masked"])
def test_an_empty_stream_adds_nothing(empty):
    made = layer()
    x, streams = given()
    alone = layer(WIDTHS[:1])
    alone.load_state_dict({k: made.state_dict()[k] for k in alone.state_dict()})
    masks = [None] * 3
    for s in (1, 2):
        if empty == "masked":
            masks[s] = torch.zeros(2, LENGTHS[s], dtype=torch.bool)
        else:
            streams[s] = None if empty == "None" else streams[s][:, :0]
    assert torch.equal(made(x, streams, masks), alone(x, streams[:1]))
    for s, operator in enumerate(made.operators(x, streams, masks)[1:], 1):
        keys = LENGTHS[s] if empty == "masked" else 0
        assert operator.shape == (2, HEADS, N, keys)
        assert not operator.rows(torch.arange(N)).any() and not operator.row_sums().any()
        assert operator.vecmat(x.new_ones(2, 1, N)).shape == (2, HEADS, 1, keys)
        assert token_maps(operator, GRID).shape == (2, keys, *GRID)


def test_without_a_stream_that_says_anything_only_the_bias_is_left():
    x, _ = given()
    made = layer()
    assert torch.equal(made(x, [None] * 3), made.bias.expand_as(x))
    assert not layer(bias=False)(x, [None] * 3).any()


def test_a_softmax_over_all_tokens_is_the_streams_weighted_by_their_shares():
    made = layer(shared_query=True)
    x, streams = given()
    operators = made.operators(x, streams)
    pi = stream_shares(operators)
    torch.testing.assert_close(pi.sum(-1), torch.ones(2, HEADS, N, dtype=torch.float64))
    keys = torch.cat([heads(made.k[s](c)) for s, c in enumerate(streams)], 2)
    values = torch.cat([heads(made.v[s](c)) for s, c in enumerate(streams)], 2)
    together = F.scaled_dot_product_attention(heads(made.q[0](x)), keys, values)
    parts = [a.matvec(heads(made.v[s](streams[s]))) for s, a in enumerate(operators)]
    torch.testing.assert_close(sum(pi[..., [s]] * y for s, y in enumerate(parts)), together)
    nothing = stream_shares(made.operators(x, [streams[0], None, streams[2]]))
    assert not nothing[..., 1].any() and not nothing.isnan().any()


def test_no_prediction_depends_on_the_batch():
    made = layer()
    x, streams = given(batch=3)
    masks = [torch.arange(4) < torch.tensor([[4], [1], [0]]), None, None]
    whole = made(x, streams, masks)
    for i, length in enumerate((4, 1, 0)):
        own = [c[i : i + 1] for c in streams]
        own[0] = own[0][:, :length]
        torch.testing.assert_close(made(x[i : i + 1], own), whole[i : i + 1])


def test_a_stream_of_batch_1_serves_all_images():
    made = layer()
    x, streams = given()
    one = [streams[0][:1], streams[1][:1], streams[2]]
    mask = [torch.tensor([[True, False, True, True]]), None, None]
    both = [c.expand(2, -1, -1) for c in one]
    torch.testing.assert_close(
        made(x, one, mask), made(x, both, [mask[0].expand(2, -1), None, None])
    )


# ---------------------------------------------------------------------- operators and maps


@pytest.mark.parametrize("prefix", [0, 2])
def test_each_stream_has_an_operator_a_call_and_a_map_for_each_of_its_tokens(prefix):
    made = layer()
    x, streams = given(prefix=prefix)
    masks = [None, torch.arange(6) < torch.tensor([[6], [2]]), None]
    with record() as calls:
        y = made(x, streams, masks, GRID, prefix)
    torch.testing.assert_close(y, made(x, streams, masks))
    assert [call.operator.shape[3] for call in calls] == list(LENGTHS)
    for s, (call, operator) in enumerate(
        zip(calls, made.operators(x, streams, masks), strict=True)
    ):
        a = operator.rows(torch.arange(prefix + N))
        torch.testing.assert_close(call.output, a @ heads(made.v[s](streams[s])))
        r = torch.rand(2, 2, prefix + N, dtype=torch.float64)
        torch.testing.assert_close(
            operator.vecmat(r), torch.einsum("brn,bhns->bhrs", r, a).detach()
        )
        maps = call.maps["tokens"]
        assert maps.shape == (2, LENGTHS[s], *GRID)
        torch.testing.assert_close(maps.flatten(2), a[:, :, prefix:].mean(1).mT.detach())
        torch.testing.assert_close(maps.sum(1), torch.ones(2, *GRID, dtype=torch.float64))
    assert not calls[1].maps["tokens"][1, 2:].any(), "a masked token is read nowhere"


def test_maps_need_a_grid_of_two_dimensions():
    made = layer()
    x, streams = given()
    with record() as calls:
        made(x, streams)
        made(x, streams, grid=(N,))
    assert all(call.maps == {} for call in calls)


def test_an_empty_stream_is_no_call():
    made = layer()
    x, streams = given()
    with record() as calls:
        made(x, [streams[0], None, streams[2]])
    assert [call.operator.shape[3] for call in calls] == [4, 1]


def test_gradients_are_right():
    made = layer()
    x, streams = given(batch=1)
    some = [t.requires_grad_() for t in (x, *streams)]
    assert torch.autograd.gradcheck(lambda x, *c: made(x, c), some, fast_mode=True)
    made(x, streams).square().sum().backward()
    # A stream of one token is read in full, whatever the query is.
    inert = ("q.2.weight", "q.2.bias", "k.2.weight")
    for name, parameter in made.named_parameters():
        assert bool(parameter.grad.abs().max() > 1e-9) == (name not in inert), name


def test_relevance_goes_to_values_queries_and_keys_by_the_rule_of_softmax():
    made = layer(bias=False)
    x, streams = (t for t in given(batch=1))
    some = [t.requires_grad_() for t in (x, *streams)]
    rules = Engine()
    with replace_products(rules), rules:
        y = made(x, streams)
        score = y.sum()
    slopes = torch.autograd.grad(score, some)
    assert rules.attended == 3 and not rules.notes
    plain = torch.autograd.grad(made(x, streams).sum(), some)
    # The stream of one token has nothing but values, which get half.
    torch.testing.assert_close(slopes[3], plain[3] / 2)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 25}, "dim, num_heads: got 25, 3"),
        ({"widths": ()}, "widths: got none"),
        ({"widths": (8, 0)}, "widths: got 0"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    sizes = {"dim": DIM, "num_heads": HEADS, "widths": WIDTHS, **change}
    with pytest.raises(ValueError, match=f"^{message}"):
        ParallelCrossAttention(**sizes)


def test_streams_that_do_not_fit():
    made = layer()
    x, streams = given()
    wide = [streams[0], streams[1][..., :6], streams[2]]
    yes = torch.ones(2, 4, dtype=torch.bool)
    for args, message in (
        ((x, wide), r"streams: stream 1 has \(2, 6, 6\); give \(2 or 1, S, 7\)"),
        ((x, [streams[0][0], *streams[1:]]), r"streams: stream 0 has \(4, 10\)"),
        ((x, [torch.cat([c, c[:1]]) for c in streams]), r"streams: stream 0 has \(3, 4, 10\)"),
        ((x, streams[:2]), "streams: got 2; give 3, with None for an empty stream"),
        ((x, streams, [yes]), "masks: got 1; give 3"),
        (
            (x, streams, [yes[:, :3], None, None]),
            "masks: the mask of stream 0 is torch.bool of shape",
        ),
        ((x, streams, [yes.double(), None, None]), "masks: the mask of stream 0 is torch.float64"),
        (
            (x, [None, *streams[1:]], [yes, None, None]),
            r"masks: .*\(2, 4\); give bool \(2 or 1, 0\)",
        ),
        ((x[..., :5], streams), r"x: got \(2, 15, 5\); give \(B, N, 24\)"),
        ((x, streams, None, (4, 4)), "grid: "),
    ):
        with pytest.raises(ValueError, match=f"^{message}") as found:
            made(*args)
        assert "\n" not in str(found.value)
