"""Routing attention: balanced clusters, their attention, and how centroids move."""

import pytest
import timm
import torch
import torch.nn.functional as F

from xattn.attention import (
    Inputs,
    convert,
    create_attention,
    create_mechanism,
    fit_centroids,
    record,
)
from xattn.attention.mechanisms.routing import means

HEADS, WIDTH = 2, 8


def inputs(n, prefix=0, causal=False, grad=False, batch=2):
    generator = torch.Generator().manual_seed(n)
    qkv = torch.randn(3, batch, HEADS, n, WIDTH, generator=generator, dtype=torch.float64)
    q, k, v = (x.clone().requires_grad_(grad) for x in qkv)
    return Inputs(q, k, v, prefix=prefix, causal=causal)


def routing(**options):
    torch.manual_seed(0)
    return create_mechanism("routing", HEADS * WIDTH, HEADS, **options).double()


def naive(layer, asked, w):
    """From the equations, a token at a time."""
    q, k, prefix, n = asked.q, asked.k, asked.prefix, asked.q.shape[2]
    if layer.shared:
        k = F.normalize(q, dim=-1)
    rows = []
    for b in range(q.shape[0]):
        for h in range(HEADS):
            near_q, near_k = (
                F.normalize(x[b, h, prefix:], dim=-1) @ layer.centroid[h].T for x in (q, k)
            )
            if layer.shared or asked.causal:
                near_q = near_k = near_q if layer.shared else near_q + near_k
            scores = asked.scale * q[b, h] @ k[b, h].T
            if layer.shared:
                own = torch.eye(n, dtype=torch.bool)
                own[:prefix] = False
                scores = scores.masked_fill(own, 0) + own * (scores.diagonal()[:, None] - 5e4)
            if asked.causal:
                scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
            a = torch.zeros(n, n, dtype=q.dtype)
            if prefix:
                a = torch.cat([scores[:prefix].softmax(-1), a[prefix:]])
            sums, count = [torch.zeros(n).double() for _ in range(n)], [0] * n
            for c in range(layer.clusters):
                members = (near_q[:, c].topk(w).indices + prefix).tolist()
                keys = [*range(prefix), *(near_k[:, c].topk(w).indices + prefix).tolist()]
                hidden = torch.full((n,), -torch.inf, dtype=q.dtype)
                hidden[keys] = 0
                for i in members:
                    sums[i] = sums[i] + (scores[i] + hidden).softmax(-1)
                    count[i] += 1
            body = [sums[i] / max(1, count[i]) for i in range(prefix, n)]
            rows.append(torch.cat([a[:prefix], torch.stack(body)]))
    return torch.stack(rows).unflatten(0, (q.shape[0], HEADS))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("n, prefix, clusters", [(9, 0, 2), (21, 1, 4), (18, 5, 3)])
def test_it_is_what_its_equations_say_with_the_same_gradients(n, prefix, clusters, shared, causal):
    asked = inputs(n, prefix, causal, grad=True)
    layer, w = routing(clusters=clusters, shared=shared), -(-(n - prefix) // clusters)
    operator, expected = layer.operator(asked), naive(layer, asked, w)
    assert torch.allclose(operator.rows(torch.arange(n)), expected, rtol=0, atol=1e-10)
    y, wanted, leaves = operator.matvec(asked.v), expected @ asked.v, (asked.q, asked.k, asked.v)
    assert torch.allclose(y, wanted, rtol=0, atol=1e-10)
    found = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
    right = torch.autograd.grad(wanted.square().sum(), leaves, allow_unused=True)
    for ours, theirs in zip(found, right, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_one_cluster_of_all_tokens_is_dense(prefix, causal):
    asked = inputs(17, prefix, causal)
    expected = F.scaled_dot_product_attention(asked.q, asked.k, asked.v, is_causal=causal)
    assert torch.allclose(routing(clusters=1).attend(asked), expected)


def test_clusters_are_balanced_and_a_token_of_none_has_the_row_zero():
    operator = routing(clusters=6).operator(inputs(36))
    members = operator.subset_counts()
    assert (members.sum(-1) == 36).all() and (members == 0).any()
    sums = operator.row_sums()
    assert torch.allclose(sums, (members > 0).double())


@pytest.mark.parametrize("n, options", [(1, {}), (3, {"clusters": 8}), (5, {"window": 99})])
def test_few_tokens_and_a_window_longer_than_there_are(n, options):
    y = routing(**options).attend(inputs(n))
    assert y.shape == (2, HEADS, n, WIDTH) and y.isfinite().all()


@pytest.mark.parametrize("centroids", ["kept", "call"])
def test_equal_keys_do_not_fail(centroids):
    asked, layer = inputs(12), routing(clusters=3, centroids=centroids)
    same = asked.replace(k=asked.k[:, :, :1].expand(-1, -1, 12, -1))
    assert layer.attend(same).isfinite().all()


def test_the_backward_pass_of_the_commitment_loss_moves_the_centroids():
    layer, asked = routing(clusters=3, decay=0.9, commitment=0.5), inputs(14, 1, grad=True)
    before = layer.centroid.clone()
    loss = layer.operator(asked).aux["commitment"]
    x = [F.normalize(t[:, :, 1:], dim=-1) for t in (asked.q, asked.k)]
    near = [(t @ before.transpose(1, 2)).argmax(-1) for t in x]
    chosen = [before[torch.arange(HEADS)[None, :, None], i] for i in near]
    expected = 0.5 * F.mse_loss(torch.cat(x, 2), torch.cat(chosen, 2))
    assert torch.allclose(loss, expected) and torch.equal(layer.centroid, before)
    gradients = torch.autograd.grad(expected, asked.q, retain_graph=True)[0]
    assert torch.allclose(torch.autograd.grad(loss, asked.q)[0], gradients)
    for h in range(HEADS):
        for c in range(3):
            mine = [t[:, h][i[:, h] == c] for t, i in zip(x, near, strict=True)]
            mean = torch.cat(mine).sum(0)
            new = F.normalize(mean, dim=0) if mean.any() else before[h, c]
            wanted = F.normalize(0.9 * before[h, c] + 0.1 * new, dim=0)
            assert torch.allclose(layer.centroid[h, c], wanted)
    assert torch.allclose(layer.centroid.norm(dim=-1), torch.ones(HEADS, 3).double())


def test_without_training_nothing_moves_and_there_is_no_loss():
    layer = routing(clusters=3).eval()
    assert layer.operator(inputs(9, grad=True)).aux == {}
    call = routing(clusters=3, centroids="call")
    before = call.centroid.clone()
    call.operator(inputs(9, grad=True)).aux["commitment"].backward()
    assert torch.equal(call.centroid, before)


def test_a_centroid_without_tokens_stays():
    x = F.normalize(torch.rand(HEADS, 9, WIDTH).double(), dim=-1)  # no coordinate is negative
    axis = torch.eye(WIDTH).double()[0]
    after = means(x, torch.stack([axis, -axis]).expand(HEADS, 2, WIDTH))
    assert torch.equal(after[:, 1], (-axis).expand(HEADS, WIDTH))
    assert torch.allclose(after[:, 0], F.normalize(x.sum(1), dim=-1))


def test_fitted_centroids_are_the_clusters_of_the_tokens():
    layer = routing(clusters=3)
    centres = F.normalize(torch.randn(HEADS, 3, WIDTH).double(), dim=-1)
    x = centres.repeat_interleave(20, 1) + 0.01 * torch.randn(HEADS, 60, WIDTH).double()
    layer.fit(x[:, torch.randperm(60)], seed=1)
    near = (layer.centroid @ centres.transpose(1, 2)).amax(-1)
    assert (near > 0.9).all()
    with pytest.raises(ValueError, match="x: got 2 tokens; give at least 3"):
        layer.fit(x[:, :2])


def test_a_frozen_vit_gets_centroids_from_its_own_tokens():
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=3).eval()
    x = torch.randn(3, 3, 160, 160)
    with pytest.raises(ValueError, match="model: no layer has routing"):
        fit_centroids(vit, [x])
    convert(vit, "routing", options={"clusters": 4})
    mechanisms = [block.attn.mechanism for block in vit.blocks]
    before = [m.centroid.clone() for m in mechanisms]
    fit_centroids(vit, x.split(2))
    for m, old in zip(mechanisms, before, strict=True):
        assert not torch.equal(m.centroid, old)
        assert torch.allclose(m.centroid.norm(dim=-1), torch.ones(()))
    assert vit(x).isfinite().all()


def test_its_maps_show_clusters():
    layer = create_attention("routing", HEADS * WIDTH, HEADS, clusters=4)
    with record() as calls:
        layer(torch.randn(1, 1 + 15, HEADS * WIDTH), (3, 5), 1)
    maps = calls[0].maps
    assert maps["cluster"].shape == (1, HEADS, 3, 5) and maps["cluster"].max() <= 3
    assert (maps["members"].sum((2, 3)) == 16).all()
    assert (maps["with_class"].sum((2, 3)) == 4).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"clusters": 0}, "clusters: got 0; give a whole number of at least 1"),
        ({"centroids": "fixed"}, "centroids: got 'fixed'; give 'kept' or 'call'"),
        ({"decay": 2.0}, "decay: got 2.0; give a share from 0 to 1"),
        ({"commitment": -1.0}, "commitment: got -1.0; give a weight of 0 or more"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        routing(**options)
