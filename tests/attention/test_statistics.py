"""Statistics of attention against their definitions on the dense A, in float64, on odd grids."""

import math

import pytest
import torch

from xattn.attention import Inputs, SoftmaxOperator, create_mechanism
from xattn.attention.base import MECHANISMS
from xattn.attention.operators import base as operators
from xattn.attention.statistics import (
    indicators,
    kept_keys,
    mean_row_divergence,
    row_distance,
    row_divergence,
    row_entropy,
    sample_queries,
    statistics,
    uniform_distance,
)

GRIDS = [(3, 5), (7, 4), (1, 9), (5, 5)]
PREFIXES = [0, 2]


def operator(grid, prefix, batch=2, heads=3, seed=0, sharpness=3.0):
    n = grid[0] * grid[1] + prefix
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, heads, n, 6, generator=generator).double() for _ in range(2))
    return SoftmaxOperator(sharpness * q, k)


def dense(op):
    """A by its definition."""
    return (op.scale * op.q @ op.k.transpose(-2, -1)).softmax(-1)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("grid", GRIDS)
def test_they_are_what_loops_over_the_dense_matrix_give(grid, prefix):
    op = operator(grid, prefix)
    a, (height, width) = dense(op), grid
    found = statistics(op, grid, prefix)
    for b in range(2):
        for h in range(3):
            entropies, distances = [], []
            for i in range(height * width):
                row = a[b, h, prefix + i].tolist()
                entropies.append(-sum(p * math.log(p) for p in row))
                away = [
                    math.dist(divmod(i, width), divmod(j, width)) for j in range(height * width)
                ]
                mass = sum(row[prefix:])
                distances.append(sum(p * d for p, d in zip(row[prefix:], away, strict=True)) / mass)
            assert found.entropy[b, h].item() == pytest.approx(sum(entropies) / len(entropies))
            assert found.distance[b, h].item() == pytest.approx(sum(distances) / len(distances))
    torch.testing.assert_close(found.received, a[:, :, prefix:].mean(2))
    torch.testing.assert_close(found.prefix_mass, a[:, :, prefix:, :prefix].sum(-1).mean(-1))
    assert found.queries == height * width


@pytest.mark.parametrize("prefix", PREFIXES)
def test_blocks_of_rows_change_nothing_and_hold_no_more_rows_than_they_say(prefix, monkeypatch):
    grid, op = (5, 7), operator((5, 7), prefix)
    whole = statistics(op, grid, prefix)
    n, asked, rows = op.shape[2], [], op.rows
    monkeypatch.setattr(operators, "TILE", 2 * 3 * n * 4)  # four rows of 2 images, 3 heads
    monkeypatch.setattr(op, "rows", lambda index: asked.append(len(index)) or rows(index))
    blocks = statistics(op, grid, prefix)
    assert max(asked) == 4 and sum(asked) == 35
    for name in ("entropy", "distance", "received"):
        torch.testing.assert_close(getattr(blocks, name), getattr(whole, name))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("grid", GRIDS)
def test_uniform_attention_has_the_limits(grid, prefix):
    n = grid[0] * grid[1] + prefix
    found = statistics(SoftmaxOperator(*torch.zeros(2, 1, 2, n, 4).double()), grid, prefix)
    assert found.entropy.mean().item() == pytest.approx(math.log(n))
    assert found.distance.mean().item() == pytest.approx(uniform_distance(grid))
    assert found.prefix_mass.mean().item() == pytest.approx(prefix / n)
    tokens, shares = found.sinks(3)
    assert shares.tolist() == [pytest.approx([1 / n] * 3)] and tokens.min() >= prefix


def test_a_patch_that_all_attend_to_is_the_sink():
    grid, prefix = (3, 5), 2
    op = operator(grid, prefix, sharpness=0.1)
    op = SoftmaxOperator(op.q, op.k, bias=40 * (torch.arange(17) == 9).double()[None, None, None])
    tokens, shares = statistics(op, grid, prefix).sinks(2)
    assert tokens[:, 0].tolist() == [9, 9]
    assert (shares[:, 0] > 0.999).all() and (shares[:, 1] < 1e-3).all()


def test_a_head_that_rests_on_the_class_token_is_not_called_local():
    rows = torch.zeros(1, 10).double()
    rows[0, 0], rows[0, 9] = 0.99, 0.01  # of patch (0, 0), to the class token and patch (2, 2)
    away = row_distance(rows, torch.tensor([1]), (3, 3), 1)
    assert away.item() == pytest.approx(math.sqrt(8))
    rows[0, 9] = 0
    assert row_distance(rows, torch.tensor([1]), (3, 3), 1).isnan().all()


def test_rows_that_see_no_key_count_as_nothing():
    rows = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.0]]).double()
    assert row_entropy(rows).tolist() == pytest.approx([0, math.log(2)])
    with pytest.raises(ValueError, match="negative"):
        row_entropy(-rows)


def test_some_queries_give_the_mean_over_just_these():
    grid, prefix = (5, 3), 1
    op = operator(grid, prefix)
    queries = torch.tensor([3, 1, 12])
    found, rows = statistics(op, grid, prefix, queries), dense(op)[:, :, queries]
    torch.testing.assert_close(found.entropy, row_entropy(rows).mean(-1))
    torch.testing.assert_close(found.distance, row_distance(rows, queries, grid, prefix).mean(-1))
    torch.testing.assert_close(found.received, rows.mean(-2))
    assert found.queries == 3


def test_samples_are_patches_without_repetition_and_all_where_there_are_few():
    some = sample_queries(tokens=105, prefix=5, most=17)
    assert len(some.unique()) == 17 and some.min() >= 5 and some.max() <= 104
    assert torch.equal(some, some.sort().values)
    assert torch.equal(some, sample_queries(tokens=105, prefix=5, most=17))
    assert sample_queries(tokens=12, prefix=2, most=10).tolist() == list(range(2, 12))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("entry", MECHANISMS.entries(), ids=lambda entry: entry.name)
def test_they_read_every_mechanism(entry, prefix):
    grid, op = (5, 7), operator((5, 7), prefix, seed=1)
    mechanism = create_mechanism(entry.name, 18, 3, **entry.cases[0]).double()
    x = torch.randn(op.q.shape[0], op.q.shape[2], 18, dtype=torch.float64)
    with torch.no_grad():
        made = mechanism.operator(Inputs(op.q, op.k, op.k, x, grid, prefix))
    if made.signed:
        pytest.skip("entropy needs weights of at least 0")
    a = made.rows(torch.arange(35 + prefix))
    found = statistics(made, grid, prefix)
    torch.testing.assert_close(found.entropy, row_entropy(a[:, :, prefix:]).mean(-1))
    shares = (a / a.sum(-1, keepdim=True)).nan_to_num(0.0)  # rows need not sum to 1
    torch.testing.assert_close(found.received, shares[:, :, prefix:].mean(-2))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_kept_keys_of_a_neighbourhood_are_its_window_and_the_prefix(prefix):
    grid, op = (5, 7), operator((5, 7), prefix, sharpness=0.3)
    mechanism = create_mechanism("gna", 18, 3, kernel=3).double()
    made = mechanism.operator(Inputs(op.q, op.k, op.k, None, grid, prefix))
    kept = kept_keys(made.rows(torch.tensor([prefix + 2 * 7 + 3])))[:, :, 0]
    assert kept[..., :prefix].all()
    window = torch.zeros(5, 7, dtype=torch.bool)
    window[1:4, 2:5] = True
    assert (kept[..., prefix:].unflatten(-1, grid) == window).all()


def test_misfits_are_refused_by_name():
    op = operator((3, 5), 1)
    with pytest.raises(ValueError, match=r"grid, prefix: got 4 x 4 and 1"):
        statistics(op, (4, 4), 1)
    with pytest.raises(ValueError, match="queries"):
        statistics(op, (3, 5), 1, torch.tensor([0]))
    with pytest.raises(ValueError, match="queries"):
        statistics(op, (3, 5), 1, torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match="count"):
        statistics(op, (3, 5), 1).sinks(0)
    with pytest.raises(ValueError, match="most"):
        sample_queries(10, 1, 0)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_divergence_of_rows_is_that_of_the_dense_matrices(prefix, monkeypatch):
    teacher, student = operator((3, 5), prefix), operator((3, 5), prefix, seed=1)
    p, other = dense(teacher), dense(student)
    expected = (p * (p / other).log()).sum(-1)
    monkeypatch.setattr(operators, "TILE", 1)
    assert torch.allclose(mean_row_divergence(teacher, student), expected.mean(-1))
    some = torch.tensor([0, 7, 2])
    found = mean_row_divergence(teacher, student, some)
    assert torch.allclose(found, expected[..., some].mean(-1))
    assert torch.allclose(mean_row_divergence(teacher, teacher), torch.zeros(2, 3).double())


def test_the_divergence_ignores_the_rows_scale_and_hidden_keys_of_the_first():
    p, other = torch.rand(2, 4, 9).double(), torch.rand(2, 4, 9).double()
    p[..., :3] = 0
    by_torch = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(probs=x) for x in (p, other))
    )
    assert torch.allclose(row_divergence(5 * p, other / 3), by_torch)
    other[..., :3] = 0  # keys that neither reads
    assert row_divergence(p, other).isfinite().all()


def test_the_divergence_has_gradients_also_at_keys_that_are_not_read():
    p, other = torch.rand(4, 9).double(), torch.rand(4, 9).double()
    assert torch.autograd.gradcheck(row_divergence, (p.requires_grad_(), other.requires_grad_()))
    hidden = other.detach().clone()
    hidden[:, 2], hidden[0] = 0, 0
    hidden.requires_grad_()
    found = row_divergence(p, hidden)
    assert (found[1:] > 10 * p[1:, 2] / p[1:].sum(-1)).all()
    assert torch.autograd.grad(found.sum(), hidden)[0].isfinite().all()


def test_divergences_of_what_does_not_match_are_refused():
    one, other = operator((3, 5), 0), operator((3, 5), 1)
    with pytest.raises(ValueError, match=r"student: got shape \(2, 3, 16, 16\); the teacher has"):
        mean_row_divergence(one, other)
    with pytest.raises(ValueError, match=r"queries: give at least one token number, each in 0..14"):
        mean_row_divergence(one, one, torch.tensor([15]))
    with pytest.raises(ValueError, match="rows: got negative entries"):
        row_divergence(torch.rand(2, 3), -torch.rand(2, 3))


# ---------------------------------------------------------------------- eight indicators


def dense_indicators(a, grid, prefix, causal=False):
    """By the definition, from a matrix (B, H, N, N)."""
    n = a.shape[-1]
    pairs = torch.ones(n, n).tril().bool() if causal else torch.ones(n, n).bool()
    places = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    focus = []
    for apart in range(4):
        values = [
            a[..., prefix + i, prefix + j]
            for i, p in enumerate(places)
            for j, q in enumerate(places)
            if max(abs(p[0] - q[0]), abs(p[1] - q[1])) == apart and pairs[prefix + i, prefix + j]
        ]
        focus.append(torch.stack(values).mean(0))
    return (
        -torch.special.xlogy(a, a).sum(-1).mean(-1),
        a.flatten(2).norm(dim=-1),
        a.std(1, correction=0)[:, pairs].mean(-1),
        a[..., : max(1, prefix)].sum(-1).mean(-1),
        torch.stack(focus, -1),
    )


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_indicators_are_those_of_the_matrix(prefix, causal, monkeypatch):
    monkeypatch.setattr("xattn.attention.operators.base.TILE", 500)  # several chunks of rows
    q, k = torch.randn(2, 2, 3, prefix + 20, 8, dtype=torch.float64)
    operator = SoftmaxOperator(q, k, causal=causal)
    expected = dense_indicators(operator.rows(torch.arange(prefix + 20)), (4, 5), prefix, causal)
    found = indicators(operator, (4, 5), prefix)
    for name, value in zip(found.__dataclass_fields__, expected, strict=True):
        torch.testing.assert_close(getattr(found, name), value)


def test_indicators_of_uniform_attention_and_of_none():
    q, k, v = torch.zeros(3, 1, 2, 26, 8)
    uniform = indicators(create_mechanism("uniform", 16, 2).operator(Inputs(q, k, v)), (5, 5), 1)
    assert torch.allclose(uniform.entropy, torch.tensor(26.0).log().double())
    assert torch.allclose(uniform.concentration, torch.ones(1, 2).double())
    assert torch.allclose(uniform.focus, torch.tensor(1 / 26).double()) and uniform.diversity == 0
    alone = indicators(create_mechanism("none", 16, 2).operator(Inputs(q, k, v)), (5, 5), 1)
    assert (alone.entropy == 0).all() and torch.allclose(
        alone.concentration, torch.tensor(26.0).sqrt().double()
    )
    assert alone.focus[0, 0].tolist() == [1, 0, 0, 0]
    assert (
        indicators(SoftmaxOperator(q[:, :, :2], k[:, :, :2]), (2,), 0).focus[0, 0, 2:].isnan().all()
    )


def test_indicators_refuse_signed_attention_and_other_grids():
    q, k, v = torch.randn(3, 1, 2, 26, 8)
    operator = create_mechanism("lla", 16, 2).operator(Inputs(q, k, v))
    with pytest.raises(ValueError, match="operator: its entries may be negative"):
        indicators(operator, (5, 5), 1)
    assert indicators(operator, (5, 5), 1, absolute=True).entropy.isfinite().all()
    with pytest.raises(ValueError, match=r"grid, prefix: got \(5, 5\) and 0"):
        indicators(SoftmaxOperator(q, k), (5, 5), 0)
