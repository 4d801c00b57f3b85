"""Attentive heads against their published equations, library references and limit cases."""

from __future__ import annotations

from copy import copy as shallow
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from attentive_fakes import (
    CLASSES,
    GRID,
    WIDTH,
    cnn,
    make,
    map_patches,
    random_tokens,
    read_by,
    vit,
)
from timm.layers import AttentionPoolLatent
from timm.models.cait import ClassAttn, LayerScaleBlockClassAttn
from timm.models.vision_transformer import Block
from torch import nn

import xattn
from xattn.attention import record
from xattn.blocks.hyper_kernel import plane_product, standardise
from xattn.heads import SimPool, create_head, overlap
from xattn.heads.attentive import ClassMaps
from xattn.heads.cross_attention import CrossAttention
from xattn.heads.pullback import chain, mlp, residual, root

N = GRID[0] * GRID[1]


def double(name, backbone=None, prefix=1, **options):
    """A head in float64 and its tokens: references are then met to rounding."""
    head = make(name, backbone, **options).double()
    return head, random_tokens(head, dtype=torch.float64, prefix=prefix)


def vector(head, tokens):
    """The pooled vector (B, Z)."""
    with torch.no_grad():
        return head.pooled(head.attend(tokens))


def attention(head, tokens):
    with torch.no_grad():
        return head.weights(head.attend(tokens).scores)


def copy(target, source):
    with torch.no_grad():
        target.copy_(source)


# ---------------------------------------------------------------- efficient probing


def test_ep_is_the_published_projection_then_pooling():
    for reduction in (1, 2):
        head, tokens = double("efficient_probe", queries=4, reduction=reduction)
        x = tokens.patches[-1]
        projected = x @ torch.cat(list(head.value), 1)  # V = X W_v
        parts = projected.chunk(4, -1)
        maps = [(x @ u / WIDTH**0.5).softmax(1) for u in head.queries]
        expected = [(a[:, :, None] * v).sum(1) for a, v in zip(maps, parts, strict=True)]
        torch.testing.assert_close(vector(head, tokens), torch.cat(expected, 1).detach())


def test_ep_with_zero_queries_is_the_projected_mean():
    head, tokens = double("efficient_probe")
    copy(head.queries, torch.zeros_like(head.queries))
    torch.testing.assert_close(
        attention(head, tokens), torch.full((3, 8, N), 1 / N, dtype=torch.float64)
    )
    mean = tokens.patches[-1].mean(1)
    expected = mean @ torch.cat(list(head.value), 1)
    torch.testing.assert_close(vector(head, tokens), expected.detach())


def test_ep_of_shifted_tokens_attends_alike_and_shifts():
    head, tokens = double("efficient_probe")
    shift = torch.randn(WIDTH, dtype=torch.float64)
    moved = map_patches(tokens, lambda x: x + shift)
    torch.testing.assert_close(attention(head, moved), attention(head, tokens))
    expected = vector(head, tokens) + (shift @ torch.cat(list(head.value), 1)).detach()
    torch.testing.assert_close(vector(head, moved), expected)


@pytest.mark.parametrize("name", ["efficient_probe", "lama", "simpool", "coca", "abmilp", "gem"])
def test_duplicated_tokens_leave_the_pooled_vector(name):
    head, tokens = double(name)
    twice = map_patches(tokens, lambda x: x.repeat(1, 2, 1))._replace(grid=(6, 5))
    torch.testing.assert_close(vector(head, twice), vector(head, tokens))


def test_ep_with_one_query_is_single_head_cross_attention_with_identity_projections():
    head, tokens = double("efficient_probe", queries=1)
    copy(head.value[0], torch.eye(WIDTH))
    x = tokens.patches[-1]
    query = head.queries.expand(3, -1, -1)
    expected = F.scaled_dot_product_attention(query, x, x)[:, 0]
    torch.testing.assert_close(vector(head, tokens), expected.detach())


def test_equal_queries_give_equal_maps_of_overlap_one():
    head, tokens = double("efficient_probe")
    assert (overlap(head.query_maps(tokens)) < 0.9).all()
    copy(head.queries, head.queries[:1].expand_as(head.queries))
    maps = head.query_maps(tokens).detach()
    torch.testing.assert_close(maps, maps[:, :1].expand_as(maps))
    torch.testing.assert_close(overlap(maps), torch.ones(3, dtype=torch.float64))


def test_overlap_is_the_mean_cosine_of_pairs():
    maps = torch.rand(2, 3, 2, 5, dtype=torch.float64)
    pairs = [
        F.cosine_similarity(maps[:, a].flatten(1), maps[:, b].flatten(1))
        for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    torch.testing.assert_close(overlap(maps), torch.stack(pairs).mean(0))


def test_ep_may_attend_to_prefix_tokens_whose_shares_are_rest():
    head, tokens = double("efficient_probe", vit("5 prefix tokens"), prefix=5, **{"queries": 4})
    everywhere = make("efficient_probe", vit("5 prefix tokens"), queries=4, prefix=True).double()
    assert attention(everywhere, tokens).shape == (3, 4, 5 + N)
    maps, rest = everywhere.class_maps(tokens)
    torch.testing.assert_close(maps.sum((2, 3)) + rest, everywhere.logits(tokens))
    assert (rest - rest[:1]).abs().max() > 1e-3  # of each image its own
    assert (head.class_maps(tokens).rest - head.class_maps(tokens).rest[:1]).abs().max() < 1e-9


# ---------------------------------------------------------------- memetector


def test_linear_memetector_does_not_depend_on_the_class_token():
    head, tokens = double("memetector", form="linear")
    other = tokens._replace(prefix=tokens.prefix * -3)
    torch.testing.assert_close(attention(head, other), attention(head, tokens))
    head.logits(tokens).square().sum().backward()
    assert head.score_y.weight.grad.abs().max() < 1e-9 * head.score_z.weight.grad.abs().max()
    assert head.score_bias.grad.abs() < 1e-9 * head.score_z.weight.grad.abs().max()


def test_additive_memetector_depends_on_the_class_token():
    head, tokens = double("memetector", form="additive")
    other = tokens._replace(prefix=tokens.prefix * -3)
    assert (attention(head, other) - attention(head, tokens)).abs().max() > 1e-2
    head.logits(tokens).square().sum().backward()
    assert head.score_y.weight.grad.abs().max() > 1e-3 * head.score_z.weight.grad.abs().max()


@pytest.mark.parametrize("form", ["linear", "additive"])
def test_memetector_equals_its_equations(form):
    head, tokens = double("memetector", form=form)
    y = tokens.prefix[:, 0]
    pooled = []
    for z in tokens.patches:
        rows = []
        for image, token in zip(z, y, strict=True):
            if form == "linear":
                w = torch.cat([head.score_y.weight[0], head.score_z.weight[0]])
                s = torch.stack(
                    [w @ torch.cat([token, patch]) + head.score_bias[0] for patch in image]
                )
            else:
                key = head.score_y.weight @ token
                s = torch.stack(
                    [head.score.weight[0] @ torch.tanh(key + head.score_z(p)) for p in image]
                )
            rows.append(s.softmax(0) @ image)
        pooled.append(torch.stack(rows))
    features = torch.cat(pooled, 1)
    features = F.gelu(head.mlp[0](features))
    expected = F.gelu(head.mlp[3](features))
    torch.testing.assert_close(vector(head, tokens), expected.detach())


def test_memetector_with_zero_scorer_pools_the_means():
    head, tokens = double("memetector")
    copy(head.score_z.weight, torch.zeros_like(head.score_z.weight))
    torch.testing.assert_close(
        attention(head, tokens), torch.full((3, 4, N), 1 / N, dtype=torch.float64)
    )
    means = torch.cat([z.mean(1) for z in tokens.patches], 1)
    torch.testing.assert_close(vector(head, tokens), head.mlp(means).detach())


def test_memetector_has_a_map_for_each_of_its_taps():
    head, tokens = double("memetector")
    assert head.query_maps(tokens).shape == (3, 4, *GRID)
    torch.testing.assert_close(
        head.query_maps(tokens).sum((2, 3)), torch.ones(3, 4, dtype=torch.float64)
    )
    assert type(head).default_taps(8) == ("block.0", "block.2", "block.4", "block.6")
    assert type(head).default_taps(12) == ("block.0", "block.3", "block.6", "block.9")
    assert type(head).default_taps(3) == ("block.0", "block.1", "block.2")


@pytest.mark.parametrize("form", ["linear", "additive"])
def test_memetector_projects_taps_of_other_widths_and_asks_the_mean_token(form):
    backbone = xattn.load_backbone(
        "test_resnet", weights=None, input_size=96, taps=["stage.2", "stage.3", "stage.4"]
    )
    head = make("memetector", backbone, form=form)
    assert len(set(backbone.channels)) > 1
    with torch.no_grad():
        taps = backbone(torch.rand(2, 3, 96, 96))
        tokens = head.tokens(taps)
        assert {x.shape[1] for x in tokens.patches} == {tokens.grid[0] * tokens.grid[1]}
        maps = head.query_maps(tokens)
        assert maps.shape == (2, 3, *backbone.tap_sizes[-1])
        moved = map_patches(tokens, lambda x: x + 1)
        assert torch.allclose(maps, head.query_maps(moved), atol=1e-5) == (form == "linear")


# ---------------------------------------------------------------- lama


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("context", ["mean", "learned"])
@pytest.mark.parametrize("act", ["none", "tanh"])
def test_lama_equals_a_loop_over_bilinear_forms(rank, context, act):
    head, tokens = double("lama", heads=3, rank=rank, act=act, context=context)
    h = tokens.patches[-1]
    c = h.mean(1) if context == "mean" else head.context.expand(3, -1)
    pooled = []
    for j in range(3):
        w = sum(torch.outer(head.p[j, r], head.q[j, r]) for r in range(rank))
        e = torch.einsum("bd,de,bte->bt", c, w, h)
        a = (e.tanh() if act == "tanh" else e).softmax(1)
        pooled.append((a[..., None] * h).sum(1))
    torch.testing.assert_close(vector(head, tokens), torch.cat(pooled, 1).detach())


def test_lama_with_zero_p_pools_means_and_scales_of_p_and_q_cancel():
    head, tokens = double("lama", heads=5)
    before = attention(head, tokens)
    copy(head.p, head.p * 7)
    copy(head.q, head.q / 7)
    torch.testing.assert_close(attention(head, tokens), before)
    copy(head.p, torch.zeros_like(head.p))
    mean = tokens.patches[-1].mean(1).repeat(1, 5)
    torch.testing.assert_close(vector(head, tokens), mean)


# ---------------------------------------------------------------- multi-head cross-attention


def torch_attention(module: CrossAttention) -> nn.MultiheadAttention:
    """torch's module with the same weights; its keys' bias is zero."""
    width = module.k.weight.shape[1]
    other = nn.MultiheadAttention(width, module.heads, batch_first=True).double()
    copy(other.in_proj_weight, torch.cat([module.q.weight, module.k.weight, module.v.weight]))
    copy(other.out_proj.weight, module.proj.weight)
    if module.v.bias is None:
        copy(other.in_proj_bias, torch.zeros(3 * width))
        copy(other.out_proj.bias, torch.zeros(width))
    else:
        copy(other.in_proj_bias, torch.cat([module.q.bias, torch.zeros(width), module.v.bias]))
        copy(other.out_proj.bias, module.proj.bias)
    return other


def attended(module, query, keys, values):
    return torch_attention(module)(query.expand(len(keys), -1, -1), keys, values)[0]


@pytest.mark.parametrize("query", ["learned", "mean"])
def test_clip_pool_is_multi_head_attention(query):
    head, tokens = double("clip_pool", heads=4, query=query)
    x = tokens.patches[-1]
    asked = x.mean(1, keepdim=True) if query == "mean" else head.query
    expected = attended(head.attention, asked, x, x)[:, 0]
    torch.testing.assert_close(vector(head, tokens), expected.detach())
    _, maps = torch_attention(head.attention)(
        asked.expand(3, -1, -1), x, x, average_attn_weights=False
    )
    torch.testing.assert_close(attention(head, tokens), maps[:, :, 0].detach())


def normed(norm, x, eps):
    """A layer norm's weights with an epsilon of the reference's own."""
    return F.layer_norm(x, (WIDTH,), norm.weight, norm.bias, eps)


def test_siglip_map_of_the_benchmark_has_no_norm_before_its_mlp():
    head, tokens = double("siglip_map", heads=4)
    x = tokens.patches[-1]
    y = attended(head.attention, head.query, x, x)
    y = y + head.mlp[3](F.gelu(head.mlp[1](y)))
    torch.testing.assert_close(vector(head, tokens), y[:, 0].detach())


def test_siglip_map_of_siglip_is_timms_latent_attention_pool():
    head, tokens = double("siglip_map", heads=4, form="siglip")
    reference = AttentionPoolLatent(
        WIDTH, num_heads=4, mlp_ratio=4, norm_layer=nn.LayerNorm
    ).double()
    a = head.attention
    copy(reference.latent, head.query)
    for target, source in (
        (reference.q, a.q),
        (reference.proj, a.proj),
        (reference.norm, head.mlp[0]),
        (reference.mlp.fc1, head.mlp[1]),
        (reference.mlp.fc2, head.mlp[3]),
    ):
        copy(target.weight, source.weight)
        copy(target.bias, source.bias)
    reference.norm.eps = 1e-6
    copy(reference.kv.weight, torch.cat([a.k.weight, a.v.weight]))
    copy(reference.kv.bias, torch.cat([torch.zeros(WIDTH), a.v.bias]))
    expected = reference(tokens.patches[-1])
    torch.testing.assert_close(vector(head, tokens), expected.detach())


def test_aim_equals_its_equations():
    head, tokens = double("aim", heads=4, queries=3)
    x = tokens.patches[-1]
    x = (x - head.tokens_norm.running_mean) / (head.tokens_norm.running_var + 1e-6).sqrt()
    k, v = (x @ w.weight.T for w in (head.attention.k, head.attention.v))
    k, v, q = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (k, v, head.query))
    maps = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1)
    expected = (maps @ v).transpose(1, 2).flatten(2).mean(1)
    torch.testing.assert_close(vector(head, tokens), expected.detach())
    in_training = head.train().attend(tokens).values[:, 0]
    assert in_training.mean((0, 1)).abs().max() < 1e-9  # of the batch


@pytest.mark.parametrize(("options", "eps"), [({}, 1e-5), ({"eps": 1e-6}, 1e-6)], ids=str)
def test_cae_equals_its_equations(options, eps):
    head, tokens = double("cae", heads=4, **options)
    x = tokens.patches[-1]
    q, k, v = (
        normed(head.norm_q, head.query, eps),
        *(normed(norm, x, eps) for norm in (head.norm_k, head.norm_v)),
    )
    expected = attended(head.attention, q, k, v)[:, 0]
    torch.testing.assert_close(vector(head, tokens), expected.detach())


@pytest.mark.parametrize(("options", "eps"), [({}, 1e-5), ({"eps": 1e-6}, 1e-6)], ids=str)
def test_v_jepa_is_a_cross_attention_block(options, eps):
    head, tokens = double("v_jepa", heads=4, **options)
    x = normed(head.tokens_norm, tokens.patches[-1], eps)
    q = head.query + attended(head.attention, head.query, x, x)
    q = q + head.mlp[3](F.gelu(head.mlp[1](normed(head.mlp[0], q, eps))))
    torch.testing.assert_close(vector(head, tokens), q[:, 0].detach())


def test_coca_averages_its_queries():
    head, tokens = double("coca", heads=2, queries=3)
    x = head.norm_k(tokens.patches[-1])
    expected = attended(head.attention, head.norm_q(head.queries), x, x).mean(1)
    torch.testing.assert_close(vector(head, tokens), expected.detach())
    assert head.query_maps(tokens).shape == (3, 6, *GRID)


@pytest.mark.parametrize("prefix", ["1 prefix token", "5 prefix tokens", "2 registers alone"])
def test_cait_is_timms_class_attention_block_and_a_norm(prefix):
    count = int(prefix[0])
    head, tokens = double("cait", vit(prefix), heads=4, prefix=count)
    x = tokens.patches[-1]
    c = head.token.expand(3, 1, -1) if head.token is not None else tokens.prefix[:, :1]
    assert (head.token is None) == (prefix != "2 registers alone")
    reference = LayerScaleBlockClassAttn(
        WIDTH,
        4,
        qkv_bias=True,
        attn_block=ClassAttn,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).double()
    copy_block(reference, head)
    for name in ("q", "k", "v", "proj"):
        copy(getattr(reference.attn, name).weight, getattr(head.attention, name).weight)
        bias = getattr(head.attention, name).bias
        copy(getattr(reference.attn, name).bias, torch.zeros(WIDTH) if bias is None else bias)
    copy(reference.gamma_1, head.gammas[0])
    copy(reference.gamma_2, head.gammas[1])
    expected = head.final(reference(x, c))[:, 0]
    torch.testing.assert_close(vector(head, tokens), expected.detach())


@pytest.mark.parametrize("prefix", ["0 prefix tokens", "5 prefix tokens"])
def test_dino_block_of_the_benchmark_is_the_mean_of_a_block_on_the_patches(prefix):
    head, tokens = double("dino_block", vit(prefix), heads=4, prefix=int(prefix[0]))
    x = tokens.patches[-1]
    attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True).double()
    copy(attention.in_proj_weight, head.mix.qkv.weight)
    copy(attention.in_proj_bias, torch.zeros(3 * WIDTH))
    copy(attention.out_proj.weight, head.mix.proj.weight)
    copy(attention.out_proj.bias, head.mix.proj.bias)
    u = normed(head.tokens_norm, x, 1e-5)
    mixed, maps = attention(u, u, u, average_attn_weights=False)
    y = x + mixed
    y = y + head.mlp[3](F.gelu(head.mlp[1](normed(head.mlp[0], y, 1e-5))))
    torch.testing.assert_close(vector(head, tokens), y.mean(1).detach())
    torch.testing.assert_close(head.query_maps(tokens).flatten(2), maps.mean(2))


def test_a_patch_of_dino_block_keeps_what_goes_past_the_attention():
    head, tokens = double("dino_block", norm=False)
    for layer in (head.mix.proj, head.mlp[3]):  # z is then the mean of the patches
        copy(layer.weight, torch.zeros_like(layer.weight))
        copy(layer.bias, torch.zeros_like(layer.bias))
    shares = (tokens.patches[-1] @ head.classifier.weight.T).transpose(1, 2) / N
    torch.testing.assert_close(head.class_maps(tokens).maps.flatten(2), shares)


@pytest.mark.parametrize("prefix", ["1 prefix token", "5 prefix tokens", "2 registers alone"])
def test_dino_block_is_the_class_token_of_timms_block(prefix):
    count = int(prefix[0])
    head, tokens = double("dino_block", vit(prefix), heads=4, prefix=count, form="class_token")
    u = torch.cat([tokens.prefix, tokens.patches[-1]], 1)
    if head.token is not None:
        u = torch.cat([head.token.expand(3, 1, -1), u], 1)
    reference = Block(WIDTH, 4, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)).double()
    copy_block(reference, head)
    a = head.attention
    copy(reference.attn.qkv.weight, torch.cat([a.q.weight, a.k.weight, a.v.weight]))
    copy(reference.attn.qkv.bias, torch.cat([a.q.bias, torch.zeros(WIDTH), a.v.bias]))
    copy(reference.attn.proj.weight, a.proj.weight)
    copy(reference.attn.proj.bias, a.proj.bias)
    torch.testing.assert_close(vector(head, tokens), reference(u)[:, 0].detach())


def copy_block(reference, head):
    for target, source in (
        (reference.norm1, head.tokens_norm),
        (reference.norm2, head.mlp[0]),
        (reference.mlp.fc1, head.mlp[1]),
        (reference.mlp.fc2, head.mlp[3]),
    ):
        copy(target.weight, source.weight)
        copy(target.bias, source.bias)


# ---------------------------------------------------------------- other poolings


@pytest.mark.parametrize("kind", ["none", "map", "both"])
@pytest.mark.parametrize("options", [{}, {"projection_bias": False}], ids=str)
def test_abmilp_equals_its_equations(kind, options):
    head, tokens = double("abmilp", self_attention=kind, **options)
    x = mixed = tokens.patches[-1]
    if kind != "none":
        q, k, v = (x @ w.T for w in head.mix.qkv.weight.chunk(3))
        mixed = (q @ k.transpose(1, 2) / WIDTH**0.5).softmax(-1) @ v @ head.mix.proj.weight.T
        if not options:
            mixed = mixed + head.mix.proj.bias
    first, _, second = head.score
    a = (torch.tanh(mixed @ first.weight.T + first.bias) @ second.weight[0]).softmax(1)
    expected = (a[..., None] * (mixed if kind == "both" else x)).sum(1)
    torch.testing.assert_close(vector(head, tokens), expected.detach())
    if kind == "both":  # maps speak of the patches before they were mixed
        a = torch.einsum("bt,bts->bs", a, (q @ k.transpose(1, 2) / WIDTH**0.5).softmax(-1))
        x = v @ head.mix.proj.weight.T
    maps = head.query_maps(tokens).detach().flatten(1)
    torch.testing.assert_close(maps, a.detach())
    rows = head.classifier.weight * (head.norm.running_var + 1e-6).rsqrt()
    shares = a[:, None] * (rows @ x.transpose(1, 2))
    torch.testing.assert_close(head.class_maps(tokens).maps.flatten(2).detach(), shares.detach())


def test_self_attention_of_abmilp_can_be_recorded():
    head, tokens = double("abmilp")
    with torch.no_grad(), record(head) as calls:
        logits = head.logits(tokens)
    assert len(calls) == 1 and calls[0].operator.shape == (3, 1, N, N)
    torch.testing.assert_close(logits, head.logits(tokens).detach())


@pytest.mark.parametrize("heads", [None, 4])
def test_simpool_without_projections_is_the_benchmarks_esimpool(heads):
    head, tokens = double("simpool", project=False, heads=heads)
    x = tokens.patches[-1]
    q, k = (normed(head.tokens_norm, t, 1e-6) for t in (x.mean(1, keepdim=True), x))
    d, pooled = WIDTH // head.heads, []
    for h in range(head.heads):
        own = slice(d * h, d * (h + 1))
        a = (q[..., own] @ k[..., own].transpose(1, 2) / d**0.5).softmax(-1)
        pooled.append((a @ x[..., own])[:, 0])
    torch.testing.assert_close(vector(head, tokens), torch.cat(pooled, 1).detach())


@pytest.mark.parametrize(("width", "heads"), [(24, 12), (192, 12), (32, 1), (1024, 16)])
def test_esimpool_has_twelve_heads_where_they_divide_the_width(width, heads):
    backbone = shallow(vit())
    backbone.channels = (width,)
    assert SimPool(backbone, project=False).heads == heads
    assert SimPool(backbone).heads == 1


def test_simpool_splits_its_projections_among_heads():
    head, tokens = double("simpool", heads=4)
    x = tokens.patches[-1]
    v = normed(head.tokens_norm, x, 1e-6)
    q = (x.mean(1, keepdim=True) @ head.q.weight.T).unflatten(-1, (4, -1)).transpose(1, 2)
    k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (v @ head.k.weight.T, v))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)
    torch.testing.assert_close(vector(head, tokens), expected.detach())


@pytest.mark.parametrize("project", [True, False])
def test_simpool_equals_its_equations(project):
    form = {} if project else {"project": False, "form": "layer_norm"}
    head, tokens = double("simpool", **form)
    x = tokens.patches[-1]
    v = k = F.layer_norm(x, (WIDTH,), head.tokens_norm.weight, head.tokens_norm.bias, 1e-6)
    q = x.mean(1)
    if project:
        q, k = q @ head.q.weight.T, k @ head.k.weight.T
    a = ((k @ q[:, :, None])[..., 0] / WIDTH**0.5).softmax(1)
    plain = (a[..., None] * v).sum(1)
    torch.testing.assert_close(vector(head, tokens), plain.detach())
    lowest = v.amin((1, 2))[:, None] - 1e-6
    for gamma in (1.0, 1.25, 2.0):
        other = make("simpool", gamma=gamma, **form).double()
        raised = (v - lowest[:, None]) ** gamma
        expected = (a[..., None] * raised).sum(1) ** (1 / gamma)
        torch.testing.assert_close(vector(other, tokens), expected.detach())
        if gamma == 1:  # the weighted mean, moved
            torch.testing.assert_close(vector(other, tokens) + lowest, plain.detach())


def test_gem_goes_from_the_mean_to_the_maximum():
    head, tokens = double("gem", p=1.0)
    tokens = map_patches(tokens, lambda x: x.abs() + 0.1)
    x = tokens.patches[-1]
    torch.testing.assert_close(vector(head, tokens), x.mean(1))
    copy(head.p, torch.tensor(3.0))
    torch.testing.assert_close(vector(head, tokens), (x**3).mean(1) ** (1 / 3))
    copy(head.p, torch.tensor(2000.0))
    torch.testing.assert_close(vector(head, tokens), x.amax(1), rtol=2e-3, atol=0)
    assert head.class_maps(tokens).maps.isfinite().all()
    negative = map_patches(tokens, lambda x: -x)
    torch.testing.assert_close(vector(head, negative), torch.full((3, WIDTH), 1e-6).double())


def test_cbam_of_the_benchmark_has_a_norm_in_its_gate_a_residual_and_relu():
    head, tokens = double("cbam")
    x = tokens.patches[-1].transpose(1, 2).unflatten(2, GRID)
    gate = head.mlp(x.mean((2, 3))) + head.mlp(x.amax((2, 3)))
    gated = x * gate.sigmoid()[..., None, None]
    seen = torch.stack([gated.mean(1), gated.amax(1)], 1)
    norm = head.gate_norm
    places = F.batch_norm(
        F.conv2d(seen, head.conv.weight, padding=3),
        *(norm.running_mean, norm.running_var, norm.weight, norm.bias),
    )
    expected = (gated * places.sigmoid() + x).relu().mean((2, 3))
    torch.testing.assert_close(vector(head, tokens), expected.detach())
    maps = head.query_maps(tokens).flatten(1) * N
    torch.testing.assert_close(maps, places.sigmoid().flatten(1))


def test_cbam_of_gates_equals_its_equations():
    head, tokens = double("cbam", form="gates")
    x = tokens.patches[-1].transpose(1, 2).unflatten(2, GRID)
    gate = head.mlp(x.mean((2, 3))) + head.mlp(x.amax((2, 3)))
    x = x * gate.sigmoid()[..., None, None]
    spatial = head.conv(torch.stack([x.amax(1), x.mean(1)], 1)).sigmoid()
    torch.testing.assert_close(vector(head, tokens), (x * spatial).mean((2, 3)).detach())


def test_delf_equals_its_equations():
    head, tokens = double("delf")
    x = tokens.patches[-1].transpose(1, 2).unflatten(2, GRID)
    norm = head.feature_norm
    f = F.conv2d(x, head.feature.weight[..., None, None])
    f = F.batch_norm(f, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    a = F.softplus(F.conv2d(f.relu(), head.score.weight[..., None, None], head.score.bias))
    expected = (a * f / f.norm(dim=1, keepdim=True)).mean((2, 3))
    torch.testing.assert_close(vector(head, tokens), expected.detach())


def test_gap_maps_are_cam():
    head, tokens = double("gap", norm=False)
    x = tokens.patches[-1]
    torch.testing.assert_close(vector(head, tokens), x.mean(1))
    cam = (x @ head.classifier.weight.T).transpose(1, 2) / N
    torch.testing.assert_close(head.class_maps(tokens).maps.flatten(2), cam)


def test_hyperzzw_scores_features_and_is_gap_where_scores_are_even():
    head, tokens = double("hyperzzw", planes=5, hidden=8)
    x = tokens.patches[-1].transpose(1, 2).unflatten(2, GRID)
    p = torch.einsum("pc,bchw->bphw", head.planes.weight, x)
    context, y = p * head.kernel(GRID), x.mean((2, 3))
    u = standardise(plane_product(context, standardise(p))) + standardise(context * p)
    gate = y * head.channel_kernel((y.shape[1],))[0] * y
    score = 2 * (u.mean(1, keepdim=True) * gate[..., None, None]).sigmoid()
    torch.testing.assert_close(vector(head, tokens), (score * x).mean((2, 3)).detach())
    with torch.no_grad():
        head.channel_kernel.out.weight.zero_()
        head.channel_kernel.out.bias.zero_()
    torch.testing.assert_close(vector(head, tokens), tokens.patches[-1].mean(1))


def test_linear_reads_class_token_mean_or_both():
    token, mean = (double("linear", read=read)[0] for read in ("class", "mean"))
    both, tokens = double("linear", read="both")
    x = tokens.patches[-1]
    assert torch.equal(vector(token, tokens), tokens.prefix[:, 0])
    torch.testing.assert_close(vector(mean, tokens), x.mean(1))
    expected = torch.cat([tokens.prefix[:, 0], x.mean(1)], 1)
    torch.testing.assert_close(vector(both, tokens), expected)
    maps: ClassMaps = token.class_maps(tokens)
    assert not maps.maps.any() and torch.equal(maps.rest, token.logits(tokens))
    assert both.class_maps(tokens).maps.abs().min() > 0
    assert make("linear").read == "class" and make("linear", cnn()).read == "mean"
    for prefix in ("0 prefix tokens", "2 registers alone"):
        assert make("linear", vit(prefix)).read == "mean"
        with pytest.raises(ValueError, match="has no class token; choose read='mean'"):
            create_head("linear", vit(prefix), read="class")


# ---------------------------------------------------------------- counts, bad input, pulls

D, K = WIDTH, CLASSES
COUNTS = [
    ("linear", {}, 0),
    ("gap", {}, 0),
    ("gem", {}, 1),
    ("hyperzzw", {"planes": 4, "hidden": 8}, 4 * D + 321),
    ("efficient_probe", {"queries": 8}, D * D + 8 * D),
    ("efficient_probe", {"queries": 4, "reduction": 2}, D * D // 2 + 4 * D),
    ("abmilp", {"self_attention": "none"}, D * D + 2 * D + 1),
    ("abmilp", {}, D * D + 2 * D + 1 + 4 * D * D + D),
    ("abmilp", {"projection_bias": False}, D * D + 2 * D + 1 + 4 * D * D),
    ("simpool", {}, 2 * D * D + 2 * D),
    ("simpool", {"project": False}, 2 * D),
    ("clip_pool", {"query": "mean"}, 4 * D * D),
    ("clip_pool", {}, 4 * D * D + D),
    ("siglip_map", {}, 12 * D * D + (1 + 3 + 5) * D),
    ("siglip_map", {"form": "siglip"}, 12 * D * D + (1 + 3 + 2 + 5) * D),
    ("aim", {}, 2 * D * D + D),
    ("cae", {}, 4 * D * D + 10 * D),
    ("v_jepa", {}, 12 * D * D + (1 + 2 + 3 + 2 + 5) * D),
    ("cait", {}, 12 * D * D + (2 + 3 + 2 + 5 + 2 + 2) * D),
    ("dino_block", {}, 12 * D * D + (2 + 1 + 2 + 5) * D),
    ("dino_block", {"form": "class_token"}, 12 * D * D + (2 + 3 + 2 + 5) * D),
    ("coca", {"queries": 4}, 4 * D * D + (4 + 4 + 3) * D),
    ("cbam", {}, D * D // 8 + 98 + 2),
    ("cbam", {"form": "gates"}, D * D // 8 + 98),
    ("csa", {"hidden": 4}, K * 4 * 4 + 4 + 4 * D + D + 9 * K * 4 + 4 + 9 * 4 + 1),
    ("delf", {"features": 1024}, 1024 * D + 2 * 1024 + 1024 + 1),
    ("lama", {"heads": 6, "rank": 2}, 2 * D * 6 * 2),
    ("memetector", {"hidden": (24, 12)}, (2 * D + 1) + (4 * D * 24 + 24) + (24 * 12 + 12)),
]


@pytest.mark.parametrize(("name", "options", "count"), COUNTS, ids=lambda v: str(v))
def test_parameters_are_as_many_as_the_definition_has(name, options, count):
    head = make(name, **options)
    classifier = sum(p.numel() for p in head.classifier.parameters())
    assert sum(p.numel() for p in head.parameters()) - classifier == count


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("efficient_probe", {"queries": 5}, "queries=5.*32 wide"),
        ("efficient_probe", {"queries": 64}, "queries=64.*32 wide"),
        ("efficient_probe", {"reduction": 3}, "reduction=3"),
        ("clip_pool", {"heads": 5}, "heads: got 5; choose a divisor of the tokens' width 32"),
        ("cbam", {"reduction": 5}, "reduction: got 5; tokens are 32 wide"),
        ("csa", {"kernel": 2}, "kernel: got 2"),
        ("memetector", {"num_taps": 5}, "num_taps: got 5.*4 taps"),
        ("memetector", {"hidden": ()}, "hidden: got no width"),
        ("simpool", {"heads": 5}, "heads: got 5; choose a divisor of the tokens' width 32"),
        ("gap", {"queries": 3}, "gap does not take that option"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_options_that_do_not_fit_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        create_head(name, read_by(name), **options)


def test_pulled_rows_are_the_slopes_of_layers_whose_gates_are_held():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    rows = torch.randn(1, 3, 6, generator=generator, dtype=torch.float64)
    norm = nn.LayerNorm(7).double()
    copy(norm.weight, torch.randn(7, generator=generator))
    layers = nn.Sequential(norm, nn.Linear(7, 5).double(), nn.GELU(), nn.Linear(5, 6).double())
    y, pull = chain(x, layers)
    torch.testing.assert_close(y, layers(x))
    a = layers[1](layers[0](x))
    gate = torch.special.ndtr(a)
    deviation = (x.var(-1, unbiased=False) + norm.eps).sqrt()
    for b in range(2):
        centre = torch.eye(7).double() - 1 / 7
        matrix = (layers[3].weight * gate[b]) @ layers[1].weight @ (norm.weight[:, None] * centre)
        torch.testing.assert_close(pull(rows)[b], rows[0] @ matrix / deviation[b])
    y, pull = residual(x, nn.Linear(7, 7, bias=False).double(), scale=2.0)
    z, back = root(y.abs(), 3.0)
    torch.testing.assert_close(
        (back(torch.ones(1, 1, 7)) * y.abs()[:, None]).sum(2)[:, 0], z.sum(1)
    )
    square = torch.randn(1, 3, 7, generator=generator, dtype=torch.float64)
    torch.testing.assert_close((pull(square) * x[:, None]).sum(2), (square * y[:, None]).sum(2))


def test_a_layer_without_a_pull_is_refused():
    with pytest.raises(TypeError, match="Softmax has no pull"):
        chain(torch.ones(1, 2), nn.Softmax(-1))


def test_the_mlp_of_pullback_may_be_one_channel_wide_but_not_empty():
    assert mlp(4, ratio=0.25)(torch.rand(2, 4)).shape == (2, 4)
    with pytest.raises(ValueError, match="mlp_ratio: got 0.2; that leaves none of the 4 channels"):
        mlp(4, ratio=0.2)
