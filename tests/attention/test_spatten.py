"""SpAtten: tokens and heads that leave a converted model, pruned values, and numbers in few bits."""

import copy
import pickle

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from xattn.attention import (
    Inputs,
    conversion,
    convert,
    converted_copy,
    create_mechanism,
    record,
    revert,
)
from xattn.attention.mechanisms.spatten import truncate_bits

HEADS, WIDTH, DEPTH = 3, 8, 5
STEP = {"keep": 0.5, "first": 2, "last": 2}


def spatten(**options):
    return create_mechanism("spatten", HEADS * WIDTH, HEADS, **options).double()


def inputs(n=21, prefix=1, causal=False, grad=False):
    generator = torch.Generator().manual_seed(n)
    q, k, v = torch.randn(3, 2, HEADS, n, WIDTH, generator=generator, dtype=torch.float64)
    q, k, v = (2 * x for x in (q, k, v))
    q, k, v = (x.requires_grad_(grad) for x in (q, k, v))
    return Inputs(q, k, v, prefix=prefix, causal=causal)


def dense(asked):
    return F.scaled_dot_product_attention(asked.q, asked.k, asked.v, is_causal=asked.causal)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    made = timm.create_model(
        "vit_tiny_patch16_224", img_size=(80, 96), embed_dim=HEADS * WIDTH, num_heads=HEADS,
        depth=DEPTH, num_classes=4,
    )  # fmt: skip
    for parameter in made.parameters():
        parameter.data.add_(0.15 * torch.randn_like(parameter))
    return made.double().eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 80, 96, generator=torch.Generator().manual_seed(1)).double()


def by_hand(vit, images, share, rank="all"):
    """(logits, tokens left in each block, their outputs by block) from the definition."""
    x = vit._pos_embed(vit.patch_embed(images))
    x = vit.norm_pre(vit.patch_drop(x))
    left = torch.arange(31).expand(2, -1)
    s, lefts, outputs = torch.zeros(2, 31).double(), [], []
    for i, block in enumerate(vit.blocks):
        count = int(np.ceil(share(i) * 30 - 1e-9))
        if i and count < left.shape[1] - 1:
            best = s.gather(1, left)[:, 1:].topk(count).indices.sort(1).values + 1
            left = torch.cat([left[:, :1], left.gather(1, best)], 1)
        part = torch.stack([x[b, left[b]] for b in range(2)])
        with record(vit) as calls:
            y = block(part)
        mass = calls[0].operator.rows(torch.arange(left.shape[1])).sum(1)  # over heads
        mass = mass.sum(1) if rank == "all" else mass[:, 0]
        s = s.scatter_add(1, left, mass)
        x = torch.stack([x[b].index_copy(0, left[b], y[b]) for b in range(2)])
        lefts.append(left)
        outputs.append(x)
    return vit.forward_head(vit.norm(x)), lefts, outputs


@pytest.mark.parametrize("rank", ["all", "class"])
@pytest.mark.parametrize("first, last", [(2, 2), (1, 4), (2, 3)])
def test_it_is_the_network_run_on_the_tokens_that_are_left(vit, images, first, last, rank):
    options = {"keep": 0.4, "first": first, "last": last, "rank": rank}
    layer = spatten(**options)
    with torch.no_grad():
        logits, lefts, outputs = by_hand(vit, images, layer.share, rank)
        pruned = converted_copy(vit, "spatten", options=options)
        found, sizes = [], []
        for block in pruned.blocks:
            block.register_forward_hook(lambda m, a, y: found.append(y))
            block.register_forward_pre_hook(lambda m, a: sizes.append(a[0].shape[1]))
        assert torch.allclose(pruned(images), logits, rtol=0, atol=1e-10)
    assert sizes == [left.shape[1] for left in lefts]
    for ours, theirs in zip(found, outputs, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


def test_whoever_looks_inside_sees_the_whole_grid_and_the_same_numbers(vit, images):
    pruned = converted_copy(vit, "spatten", options=STEP)
    with torch.no_grad():
        logits = pruned(images)
        with record(pruned) as calls:
            assert torch.allclose(pruned(images), logits, rtol=0, atol=1e-10)
        sizes = []
        handle = pruned.blocks[3].norm1.register_forward_hook(lambda m, a, y: sizes.append(y.shape))
        assert torch.allclose(pruned(images), logits, rtol=0, atol=1e-10)
        handle.remove()
    assert sizes == [(2, 31, HEADS * WIDTH)]
    lefts = by_hand(vit, images, spatten(**STEP).share)[1]
    for call, left in zip(calls, lefts, strict=True):
        a = call.operator.rows(torch.arange(31))
        assert call.operator.shape == (2, HEADS, 31, 31)
        gone = torch.ones(2, 31, dtype=torch.bool).scatter(1, left, False)
        assert (a.transpose(1, 2)[gone] == 0).all() and (a.permute(0, 3, 1, 2)[gone] == 0).all()
        assert torch.allclose(a.sum(-1), (~gone).double()[:, None].expand(-1, HEADS, -1))
        assert torch.allclose(call.operator.matvec(call.value), call.output)


def test_the_sum_of_importance_counts_heads_and_queries(vit, images):
    with torch.no_grad(), record(vit) as calls:
        converted_copy(vit, "spatten", options=STEP)(images)
    totals = [call.operator.context.s.sum(1) for call in calls]
    rows = [31, 31, 16, 16, 16]
    for i, total in enumerate(totals):
        assert torch.allclose(total, torch.tensor(float(HEADS * sum(rows[: i + 1]))).double())


def test_maps_show_importance_and_the_last_layer_of_each_patch(vit, images):
    pruned = converted_copy(vit, "spatten", options=STEP)
    with torch.no_grad(), record(pruned) as calls:
        pruned(images)
    survival = calls[-1].maps["survival"]
    assert survival.shape == (2, 1, 5, 6) and set(survival.unique().tolist()) == {1.0, 4.0}
    assert (survival.flatten(1) == 4).sum(1).tolist() == [15, 15]
    first, last = calls[1].maps["importance"], calls[-1].maps["importance"]
    gone = survival == 1
    assert torch.equal(first[gone], last[gone]) and (last[~gone] > first[~gone]).all()


def test_nothing_pruned_is_the_network_itself(vit, images):
    with torch.no_grad():
        same = converted_copy(vit, "spatten", options={"keep": 1.0})
        assert torch.allclose(same(images), vit(images), rtol=0, atol=1e-10)


def test_pruned_heads_give_nothing_and_stay_away(vit, images):
    options = {"keep": 1.0, "keep_heads": 1 / 3, "first_head": 2, "last": 3}
    pruned = converted_copy(vit, "spatten", options=options)
    with torch.no_grad(), record(pruned) as calls:
        logits = pruned(images)
    live = [(call.output.abs().sum((2, 3)) > 0) for call in calls]
    assert [n.sum(1).tolist() for n in live] == [[3, 3], [3, 3], [2, 2], [1, 1], [1, 1]]
    e = torch.stack([call.output.abs().sum((2, 3)) for call in calls[:2]]).sum(0)
    assert torch.equal(live[2], torch.zeros_like(live[2]).scatter(1, e.topk(2).indices, True))
    assert not (live[3] & ~live[2]).any() and torch.equal(live[4], live[3])
    with torch.no_grad():
        assert torch.allclose(pruned(images), logits, rtol=0, atol=1e-10)


def test_it_trains_through_what_left(vit, images):
    pruned = converted_copy(vit, "spatten", options=STEP)
    x = images.requires_grad_()
    grad = torch.autograd.grad(pruned(x).square().sum(), x)[0]
    with record(pruned):
        whole = torch.autograd.grad(pruned(x).square().sum(), x)[0]
    assert torch.allclose(grad, whole) and grad.abs().sum() > 0


def test_copies_pickles_and_reverted_models(vit, images):
    model = copy.deepcopy(vit)
    convert(model, "spatten", options=STEP)
    with torch.no_grad():
        logits = model(images)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert conversion(twin) == conversion(model)
            assert torch.equal(twin(images), logits)
            assert len(twin.blocks[0]._forward_hooks) == 1
        convert(model, "softmax", layers="0-1")
        assert not model.blocks[0]._forward_hooks and model.blocks[2]._forward_hooks
        revert(model)
        assert not any(b._forward_hooks or b._forward_pre_hooks for b in model.blocks)
        assert torch.equal(model(images), vit(images))


def test_layers_that_are_not_converted_keep_all_tokens(vit, images):
    some = converted_copy(vit, "spatten", "1,3", STEP)
    with torch.no_grad(), record(some) as calls:
        some(images)
    a = [call.operator.row_sums()[:, 0].sum(1).tolist() for call in calls]
    assert a[2] == pytest.approx([31, 31]) and a[3] == pytest.approx([16, 16])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n, prefix", [(1, 0), (14, 0), (21, 2)])
@pytest.mark.parametrize("values", [0.3, 0.5, 1.0])
def test_pruned_values_are_those_of_the_keys_that_receive_least(values, n, prefix, causal):
    asked = inputs(n, prefix, causal, grad=True)
    scores = asked.scale * asked.q @ asked.k.transpose(-2, -1)
    if causal:
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    p = scores.softmax(-1)
    kept = torch.zeros(2, HEADS, n).double()
    best = p.detach().sum(2)[..., prefix:].topk(int(np.ceil(values * (n - prefix) - 1e-9))).indices
    kept.scatter_(2, best + prefix, 1.0)[..., :prefix] = 1
    expected = (p * kept[:, :, None]) @ asked.v
    y, leaves = spatten(values=values).attend(asked), (asked.q, asked.k, asked.v)
    assert torch.allclose(y, expected, rtol=0, atol=1e-10)
    found = torch.autograd.grad(y.square().sum(), leaves)
    for ours, theirs in zip(
        found, torch.autograd.grad(expected.square().sum(), leaves), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_high_and_low_bits_together_are_plain_rounding():
    x = torch.randn(2, HEADS, 9, WIDTH).double()
    high, full = truncate_bits(x, 4, 4)
    step = x.abs().amax((2, 3), keepdim=True) / 127
    assert torch.allclose(full, (x / step).round() * step)
    assert ((full - x).abs() <= step / 2 + 1e-12).all()
    low = (full - high) / step
    assert (low > -1e-6).all() and (low < 16).all() and torch.allclose(low, low.round())
    q = x.clone().requires_grad_()
    assert torch.equal(
        torch.autograd.grad(truncate_bits(q, 4, 4)[0].sum(), q)[0], torch.ones_like(x)
    )


@pytest.mark.parametrize("refetch, which", [(0.0, 0), (1.5, 1)])
def test_no_row_or_every_row_is_computed_again(refetch, which):
    asked = inputs()
    q, k = (truncate_bits(x, 4, 4)[which] for x in (asked.q, asked.k))
    y = spatten(bits=(4, 4), refetch=refetch).attend(asked)
    assert torch.allclose(y, F.scaled_dot_product_attention(q, k, asked.v))


def test_flat_rows_alone_are_computed_again():
    asked = inputs(41, 0)
    operator = spatten(bits=(4, 4), refetch=0.5).operator(asked)
    (high_q, full_q), (high_k, full_k) = (truncate_bits(x, 4, 4) for x in (asked.q, asked.k))
    coarse, fine = (
        (asked.scale * q @ k.transpose(-2, -1)).softmax(-1)
        for q, k in ((high_q, high_k), (full_q, full_k))
    )
    flat = coarse.amax(-1, keepdim=True) < 0.5
    assert flat.any() and not flat.all()
    a = torch.where(flat, fine, coarse)
    assert operator.stochastic and torch.allclose(operator.rows(torch.arange(41)), a)
    assert torch.allclose(operator.matvec(asked.v), a @ asked.v)


@pytest.mark.parametrize("causal", [False, True])
def test_alone_a_layer_is_dense(causal):
    asked = inputs(causal=causal)
    assert torch.allclose(spatten().attend(asked), dense(asked))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep": 0.0}, "keep: got 0.0; give a share above 0 and up to 1"),
        ({"values": 1.5}, "values: got 1.5; give a share"),
        ({"first": 0}, "first, last: got 0, 11; give block numbers of at least 1"),
        ({"keep_heads": 0.5, "first_head": 12}, "first_head, last: got 12, 11"),
        ({"bits": (1, 4)}, r"bits: got \(1, 4\); give at least 2 high bits"),
        ({"rank": "mean"}, "rank: got 'mean'; give 'all' or 'class'"),
        ({"layer": -1}, "layer: got -1; give the number of the block"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        spatten(**options)
