"""Mixture-of-head attention: which heads a token uses, how much, and what it costs to leave them out."""

import pytest
import timm
import torch
import torch.nn.functional as F

from xattn.attention import (
    Inputs,
    SoftmaxOperator,
    converted_copy,
    create_attention,
    create_mechanism,
    record,
)
from xattn.explainers.relevance.rollout import rollout_step

HEADS, WIDTH, N = 6, 4, 17
DIM = HEADS * WIDTH
FORMS = [(1, None), (2, 1), (2, 4), (0, 3), (3, 2)]


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(key_heads=HEADS, n=N, **more):
    q, x = random(2, HEADS, n, WIDTH), random(2, n, DIM, seed=3)
    k, v = (random(2, key_heads, n, WIDTH, seed=i) for i in (1, 2))
    return Inputs(q, k, v, x, **more)


def moh(zero=False, **options):
    torch.manual_seed(0)
    layer = create_mechanism("moh", DIM, HEADS, **options).double()
    for parameter in layer.parameters():
        parameter.data = torch.zeros_like(parameter) if zero else torch.randn_like(parameter)
    return layer


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("shared", [0, 1, 2, HEADS])
def test_all_heads_with_a_zero_router_are_multi_head_attention(shared, key_heads, causal):
    asked = inputs(key_heads, causal=causal)
    layer = moh(zero=True, shared=shared, active=HEADS - shared or None)
    k, v = (x.repeat_interleave(HEADS // key_heads, 1) for x in (asked.k, asked.v))
    expected = F.scaled_dot_product_attention(asked.q, k, v, is_causal=causal)
    assert torch.allclose(layer.attend(asked), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shared, active", FORMS)
def test_gates_are_what_their_equations_say(shared, active):
    layer, x = moh(shared=shared, active=active), inputs().x
    routed, k = HEADS - shared, layer.active
    assert k == (active or 3)
    weights = {name: (x @ w.T).softmax(-1) for name, w in layer.router.items()}
    g = torch.zeros(2, N, HEADS, dtype=torch.float64)
    b = 2 * weights["share"] if shared else torch.ones(2, N, 2, dtype=torch.float64)
    for image in range(2):
        for n in range(N):
            for i in range(shared):
                share = weights["shared"][image, n, i] if shared > 1 else 1.0
                g[image, n, i] = b[image, n, 0] * shared * share
            p = weights["routed"][image, n]
            chosen = sorted(range(routed), key=lambda i, p=p: -p[i])[:k]
            for i in chosen:
                g[image, n, shared + i] = b[image, n, 1] * k * p[i] / p[chosen].sum()
    found, loss = layer.gates(x)
    assert torch.allclose(found, g.transpose(1, 2))
    used = (g[..., shared:] > 0).double().mean((0, 1))
    assert torch.allclose(loss, routed**2 * (weights["routed"].mean((0, 1)) * used).mean())


@pytest.mark.parametrize("active", [1, 3, 5])
def test_the_balance_loss_is_k_where_heads_are_used_alike(active):
    k = torch.tensor(float(active)).double()
    layer = moh(zero=True, shared=1, active=active)
    assert torch.allclose(layer.gates(inputs().x)[1], k)
    layer.router["routed"].data[:, :5] = 9 * torch.eye(5)
    each = F.one_hot(torch.arange(20) % 5, DIM).double()[
        None
    ]  # tokens of five that prefer their own
    assert torch.allclose(layer.gates(each)[1], k)
    if active == 1:
        assert torch.allclose(layer.gates(each[:, :1])[1], torch.tensor(5.0).double(), rtol=0.01)


def test_a_record_hands_the_weighted_loss_on_to_training():
    layer = create_attention("moh", DIM, HEADS, balance=0.5)
    x = torch.randn(2, N, DIM)
    with record() as calls:
        layer(x)
    (call,) = calls
    loss = layer.mechanism.gates(x)[1]
    assert torch.allclose(call.aux["balance"], 0.5 * loss)
    call.aux["balance"].backward()
    assert layer.mechanism.router["routed"].grad.abs().sum() > 0
    with record() as calls:
        create_attention("moh", DIM, HEADS, shared=HEADS)(x)
    assert calls[0].aux == {}


@pytest.mark.parametrize("shared, active", FORMS)
@pytest.mark.parametrize("key_heads, threads", [(HEADS, 1), (2, 3)])
def test_leaving_heads_out_changes_neither_output_nor_gradients(
    shared, active, key_heads, threads, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # which share a head's rows
    layer, asked = moh(shared=shared, active=active), inputs(key_heads, n=257)
    leaves = [t.requires_grad_() for t in (asked.q, asked.k, asked.v, asked.x)]
    found = []
    for sparse in (True, False):
        operator = layer.operator(asked)
        assert operator.sparse == (layer.active < layer.routed)
        operator.sparse = sparse
        y = operator.matvec(asked.v)
        found.append((y, *torch.autograd.grad(y.square().sum(), [*leaves, *layer.parameters()])))
    for skipping, every in zip(*found, strict=True):
        assert torch.allclose(skipping, every, atol=1e-12)


def test_a_token_passes_no_gradient_to_heads_that_it_leaves_out():
    layer, asked = moh(shared=1, active=2), inputs()
    v = asked.v.requires_grad_()
    operator = layer.operator(asked)
    token = 4
    (grad,) = torch.autograd.grad(operator.matvec(v)[0, :, token].square().sum(), v)
    used = operator.factor[0, :, token] != 0
    assert used.sum() == 3
    assert (grad[0, ~used] == 0).all() and (grad[0, used] != 0).any((-2, -1)).all()


def test_gates_are_maps_of_the_patches():
    layer, asked = moh(), inputs(n=2 + 15, grid=(3, 5), prefix=2)
    with record() as calls:
        layer.attend(asked)
    maps = calls[0].maps
    assert torch.equal(maps["gates"], layer.gates(asked.x)[0][..., 2:].unflatten(-1, (3, 5)))


def test_rollout_weighs_heads_by_their_gates():
    operator, r = moh(shared=1, active=2).operator(inputs()), random(2, 3, N, seed=4).abs()
    softmax, g = operator.operator.rows(torch.arange(N)), operator.factor[..., None]
    fused = (g * softmax).sum(1) / g.sum(1)
    assert torch.allclose(rollout_step(operator, r, 0.0), r @ fused)
    assert torch.allclose(rollout_step(operator, r, 0.5), 0.5 * r + 0.5 * r @ fused)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("kept", [(0, 257), (1, 0), (64, 201)])
def test_any_number_of_rows_may_be_skipped(kept, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    asked = inputs(n=257)
    operator = SoftmaxOperator(asked.q, asked.k)
    keep = torch.zeros(2, HEADS, 257, dtype=torch.bool)
    keep[:, ::2, : kept[0]] = True
    keep[:, 1::2, 257 - kept[1] :] = True
    expected = operator.matvec(asked.v) * keep[..., None]
    assert torch.allclose(operator.matvec_where(asked.v, keep), expected, atol=1e-12)
    half = operator.matvec_where(asked.v, torch.zeros_like(keep))
    assert half.shape == expected.shape and (half == 0).all()


def test_heads_are_left_out_under_autocast_too():
    layer, x = create_attention("moh", DIM, HEADS), torch.randn(1, 260, DIM)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.allclose(y.float(), exact, atol=0.05)


def test_training_the_router_alone_brings_a_converted_network_nearer():
    torch.manual_seed(0)
    names = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "num_heads": HEADS, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **names).eval()
    twin = converted_copy(model, "moh", options={"shared": 1, "active": 3})
    photos = torch.randn(8, 3, 32, 32)
    with torch.no_grad(), record(model) as calls:
        model(photos)
    targets = [call.output for call in calls]
    routers = [p for name, p in twin.named_parameters() if "router" in name]
    optimizer = torch.optim.Adam(routers, 0.05)
    errors = []
    for _ in range(20):
        with record(twin) as calls:
            twin(photos)
        error = sum(F.mse_loss(c.output, y) / y.var() for c, y in zip(calls, targets, strict=True))
        errors.append(error.item())
        loss = error + sum(sum(c.aux.values()) for c in calls) / len(calls)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(routers) == 4 and errors[-1] < 0.98 * errors[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shared": 7}, "shared: got 7; give at most 6, the number of heads"),
        ({"shared": 2, "active": 5}, "active: got 5; give at most 4, the number of routed heads"),
        ({"active": 0}, "active: got 0; give a whole number of at least 1"),
        ({"balance": -1.0}, "balance: got -1.0; give a weight of 0 or more"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        moh(**options)
