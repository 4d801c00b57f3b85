"""Operators made of others answer every question as the dense matrix of their formula does."""

import pytest
import torch

from xattn.attention import (
    GatedOperator,
    LowRankOperator,
    PoolOperator,
    ProductOperator,
    SoftmaxOperator,
    SumOperator,
    tile_order,
)

BATCH, HEADS, N, WIDTH = 2, 3, 29, 4


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def softmax(keys=N, queries=N, seed=0):
    q, k = (
        random(BATCH, HEADS, queries, WIDTH, seed=seed),
        random(BATCH, HEADS, keys, WIDTH, seed=9),
    )
    return SoftmaxOperator(q, k)


def matrix(operator):
    return operator.rows(torch.arange(operator.shape[2]))


def check(operator, expected):
    """All questions to ``operator``, whose matrix is ``expected``."""
    a = matrix(operator)
    assert operator.shape == a.shape and torch.allclose(a, expected, atol=1e-12)
    x = random(BATCH, HEADS, a.shape[3], 5, seed=3)
    assert torch.allclose(operator.matvec(x), a @ x, atol=1e-12)
    r = random(BATCH, 2, a.shape[2], seed=4)
    product = torch.einsum("brn,bhns->bhrs", r, a)
    assert torch.allclose(operator.vecmat(r), product, atol=1e-12)
    assert torch.allclose(operator.vecmat(r, "mean"), product.mean(1), atol=1e-12)
    assert torch.allclose(operator.row_sums(), a.sum(-1), atol=1e-12)
    grad = random(BATCH, HEADS, a.shape[2], 5, seed=5)
    e = (a * (grad @ x.transpose(-2, -1))).clamp_min(0).mean(1)
    assert torch.allclose(operator.gradient_vecmat(x, grad, r), r @ e, atol=1e-12)
    assert operator.signed or (a >= 0).all()
    if operator.stochastic:
        assert torch.allclose(a.sum(-1), torch.ones(()).double())
    half = operator.apply(lambda x: x.float() if x.is_floating_point() else x)
    assert torch.allclose(half.vecmat(r.float()).double(), product, atol=1e-4)


def test_a_sum_adds_matrices():
    one, two = softmax(), softmax(seed=1)
    check(SumOperator([one, two]), matrix(one) + matrix(two))
    with pytest.raises(ValueError, match=r"terms: got shapes .* give terms of one shape"):
        SumOperator([one, softmax(keys=5)])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_a_gate_scales_rows(sparse, signed):
    g = random(BATCH, HEADS, N, seed=2)
    g = g if signed else g.clamp_min(0)
    one = softmax()
    check(GatedOperator(one, g, signed=signed, sparse=sparse), g[..., None] * matrix(one))
    with pytest.raises(ValueError, match=r"factor: got shape \(2, 3\); give"):
        GatedOperator(one, g[..., 0])


@pytest.mark.parametrize("bias", [None, 1, 257])
def test_rows_of_gates_that_are_zero_are_left_out_with_the_right_gradients(bias, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # which share a head's rows
    n = 257  # enough keys for it to pay
    q, k, v = (random(BATCH, HEADS, n, WIDTH, seed=i).requires_grad_() for i in range(3))
    g = random(BATCH, HEADS, n, seed=6).clamp_min(0)
    g[0, 0] = 0  # a head that no token uses
    b = None if bias is None else random(1, HEADS, bias, n, seed=7)
    found = []
    for sparse in (False, True):
        operator = GatedOperator(SoftmaxOperator(q, k, bias=b, every_row=True), g, sparse=sparse)
        y = operator.matvec(v)
        found.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for dense, skipping in zip(*found, strict=True):
        assert torch.allclose(dense, skipping, atol=1e-12)


@pytest.mark.parametrize("stride", [None, 2, 5])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_pooling_takes_means_or_weighted_sums_of_runs(stride, prefix, weighted):
    weight = random(HEADS, 4, seed=8) if weighted else None
    like = random(BATCH, HEADS, N, WIDTH)
    operator = PoolOperator(like, 4, stride, weight=weight, prefix=prefix)
    step = stride or 4
    count = (N - prefix - 4) // step + 1
    expected = torch.zeros(BATCH, HEADS, count, N, dtype=torch.float64)
    for c in range(count):
        start = prefix + c * step
        expected[:, :, c, start : start + 4] = (
            0.25 if weight is None else weight[:, None].squeeze(1)
        )
    check(operator, expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_pooling_over_tiles_counts_only_real_tokens(weighted):
    grid, prefix = (3, 9), 2
    order = tile_order(grid, 2)
    weight = random(HEADS, 4, seed=8) if weighted else None
    like = random(BATCH, HEADS, prefix + 27, WIDTH)
    operator = PoolOperator(like, 4, weight=weight, order=order, prefix=prefix)
    expected = torch.zeros(BATCH, HEADS, 10, 29, dtype=torch.float64)
    for c, tile in enumerate(order.index.unflatten(0, (10, 4))):
        real = int((tile >= 0).sum())
        for place, token in enumerate(tile.tolist()):
            if token >= 0:
                expected[:, :, c, prefix + token] = 1 / real if weight is None else weight[:, place]
    check(operator, expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_pooling_can_keep_the_prefix_in_front(weighted):
    weight = random(HEADS, 4, seed=8) if weighted else None
    like, order = random(BATCH, HEADS, 2 + 27, WIDTH), tile_order((3, 9), 2)
    plain = PoolOperator(like, 4, weight=weight, order=order, prefix=2)
    kept = PoolOperator(like, 4, weight=weight, order=order, prefix=2, keep_prefix=True)
    first = torch.eye(2, 29, dtype=torch.float64).expand(BATCH, HEADS, -1, -1)
    check(kept, torch.cat([first, matrix(plain)], 2))


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("stride", [2, 3])
def test_each_pooled_token_may_have_weights_of_its_own(stride, heads, prefix):
    like = random(BATCH, HEADS, prefix + 11, 5)
    weight = random(BATCH, heads, (11 - 3) // stride + 1, 3, seed=1)
    expected = torch.zeros(BATCH, HEADS, prefix + weight.shape[2], prefix + 11).double()
    expected[:, :, :prefix, :prefix] = torch.eye(prefix)
    for c in range(weight.shape[2]):
        start = prefix + c * stride
        expected[:, :, prefix + c, start : start + 3] = weight[:, :, c]
    check(PoolOperator(like, 3, stride, weight=weight, prefix=prefix, keep_prefix=True), expected)


def test_heads_of_one_key_head_share_its_pooling_weights():
    weight, few = random(1, 4, seed=8), random(BATCH, 1, N, WIDTH)
    like = few.expand(-1, HEADS, -1, -1)
    grouped = PoolOperator(like, 4, weight=weight)
    repeated = PoolOperator(like, 4, weight=weight.expand(HEADS, -1))
    check(grouped, matrix(repeated))
    assert torch.equal(grouped.matvec(few), grouped.matvec(like)[:, :1])
    assert torch.equal(repeated.matvec(few), repeated.matvec(like))


def test_a_sum_of_gated_products_keeps_every_log_sum_exp():
    one, two, pooled = softmax(), softmax(keys=5), PoolOperator(random(BATCH, HEADS, N, 2), 5, 6)
    gate = torch.rand(BATCH, HEADS, N, dtype=torch.float64)
    operator = SumOperator([GatedOperator(one, gate), ProductOperator([two, pooled])])
    x = random(BATCH, HEADS, N, 3, seed=3)
    assert torch.allclose(operator.matvec_and_keep(x), operator.matvec(x))
    assert one._lse is not None and two._lse is not None


def test_pooled_attention_is_a_product():
    like = random(BATCH, HEADS, N, WIDTH)
    pooled = PoolOperator(like, 5, 3)
    first = softmax(keys=pooled.shape[2])
    operator = ProductOperator([first, pooled])
    assert operator.stochastic and not operator.signed and not operator.causal
    assert ProductOperator([first, pooled], causal=True).causal
    check(operator, matrix(first) @ matrix(pooled))


def test_low_rank_is_two_small_factors():
    left, right = random(BATCH, HEADS, N, 2), random(BATCH, HEADS, 2, 7)
    check(LowRankOperator(left, right), left @ right)
    positive = LowRankOperator(left.abs(), right.abs(), signed=False)
    check(positive, left.abs() @ right.abs())


def test_sums_and_gates_pass_their_terms_facts_on():
    hidden = torch.full((N, N), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    q = random(BATCH, HEADS, N, WIDTH)
    causal = SoftmaxOperator(q, q, bias=hidden, every_row=True)
    causal.causal = True
    gate = torch.ones(BATCH, HEADS, N, dtype=torch.float64)
    assert SumOperator([causal, GatedOperator(causal, gate)]).causal
    assert not SumOperator([causal, softmax()]).causal
    assert SumOperator([causal, LowRankOperator(q, q.transpose(2, 3))]).signed
    assert not GatedOperator(causal, gate).stochastic


@pytest.mark.parametrize("block, stride", [(0, None), (30, None), (4, 0)])
def test_runs_that_do_not_fit_are_named(block, stride):
    with pytest.raises(ValueError, match="block, stride: got"):
        PoolOperator(random(1, 1, N, 2), block, stride)
