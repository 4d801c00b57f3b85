"""Explainers of attention whose rows do not sum to 1, or whose entries may be negative."""

import pytest
import torch
import torch.nn.functional as F
from small_transformers import FUSE, TARGET, assert_equal, photos, tiny

from xattn.attention import (
    Entry,
    GatedOperator,
    LowRankOperator,
    Mechanism,
    SoftmaxOperator,
    SumOperator,
    convert,
)
from xattn.attention.statistics import row_entropy, statistics
from xattn.explainers import create_explainer
from xattn.explainers.relevance.attention import layers_text, read_attention
from xattn.explainers.relevance.rollout import rollout_row, rollout_step
from xattn.explaining.provenance import provenance_of

PREFIXES = [0, 1, 2, 5]


class Linear(Mechanism):
    """Scores themselves as weights: signed, and rows sum to anything."""

    entry = Entry("linear", "none", "N D^2")

    def operator(self, inputs):
        return LowRankOperator(inputs.q, inputs.k.transpose(-2, -1) * inputs.scale)


class Positive(Mechanism):
    """Features of at least 0, without a normaliser."""

    entry = Entry("positive", "none", "N D^2")

    def operator(self, inputs):
        left, right = F.elu(inputs.q) + 1, F.elu(inputs.k) + 1
        return LowRankOperator(left, right.transpose(-2, -1), signed=False)


def attending(cls, layers, variant="class", **options):
    """A tiny ViT whose ``layers`` attend by ``cls``, the others by softmax."""
    backbone = tiny(variant, **options).double()
    convert(backbone, "softmax")
    for i in layers:
        backbone.model.blocks[i].attn.mechanism = cls(16, 2)
    return backbone


def operators(kind, prefix, batch=2, heads=3, seed=0):
    n = 15 + prefix
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, batch, heads, n, 4, generator=generator, dtype=torch.float64)
    if kind == "signed":
        return LowRankOperator(q, k.transpose(-2, -1))
    if kind == "positive":
        return LowRankOperator(q.abs(), k.abs().transpose(-2, -1), signed=False)
    if kind == "softmax":
        return SoftmaxOperator(q, k)
    gates = torch.rand(batch, heads, n, generator=generator, dtype=torch.float64)
    gates[:, 0, ::2] = 0
    gates[:, :, 3] = 0  # token 3 attends to nothing
    gated = GatedOperator(SoftmaxOperator(q, k), gates, signed=False, sparse=True)
    return (
        gated
        if kind == "gated"
        else SumOperator([gated, GatedOperator(gated, gates, signed=False)])
    )


def mixing(a, residual, fusion="mean", stochastic=False):
    """M of a dense A (B, H, N, N): rows of the fused |A| sum to 1, those of zeros stay."""
    fused = FUSE[fusion](a.abs())
    sums = fused.sum(-1, keepdim=True)
    fused = fused if stochastic else torch.where(sums > 0, fused / sums, 0.0)
    m = residual * torch.eye(a.shape[-1], dtype=a.dtype) + (1 - residual) * fused
    return torch.nan_to_num(m / m.sum(-1, keepdim=True))


def dense(operator):
    return operator.rows(torch.arange(operator.shape[2]))


KINDS = ["signed", "positive", "gated", "sum"]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [0.5, 0.3, 0.0])
def test_rollout_of_any_operator_follows_shares(kind, prefix, residual, monkeypatch):
    monkeypatch.setattr("xattn.attention.operators.base.TILE", 200)  # several chunks of rows
    operator = operators(kind, prefix)
    r = torch.rand(2, 4, 15 + prefix, dtype=torch.float64)
    expected = r @ mixing(dense(operator), residual)
    assert torch.allclose(rollout_step(operator, r, residual), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rollout_of_one_token_keeps_its_mass_through_layers_of_every_kind(kind):
    layers = [operators("softmax", 1, seed=1), operators(kind, 1), operators("signed", 1)]
    product = torch.eye(16, dtype=torch.float64)
    for operator in layers:
        product = mixing(dense(operator), 0.5) @ product
    got = rollout_row(layers, 4)
    assert torch.allclose(got, product[:, 4]) and torch.allclose(
        got.sum(-1), torch.ones(2).double()
    )


@pytest.mark.parametrize("variant", ["class", "registers", "none"])
@pytest.mark.parametrize("cls", [Linear, Positive])
@pytest.mark.parametrize("options", [{}, {"fusion": "max"}, {"fusion": "min", "residual": 0.2}])
def test_the_map_is_the_product_of_such_matrices(cls, variant, options, monkeypatch):
    monkeypatch.setattr("xattn.attention.operators.base.TILE", 200)
    backbone = attending(cls, [1], variant)
    images = photos(backbone)
    reading = read_attention(backbone, images)
    explainer = create_explainer("rollout", backbone, **options)
    r = explainer._start_row(reading)
    for call in reversed(reading.layers):
        settings = {"residual": 0.5, "fusion": "mean", **options}
        r = r @ mixing(dense(call.operator), **settings, stochastic=call.operator.stochastic)
    expected = r[..., reading.prefix :].unflatten(-1, reading.grid)
    assert_equal(explainer.attribute(images, TARGET), expected)


def test_discarding_ranks_the_normalised_rows():
    backbone = attending(Linear, [0, 1, 2], "none")
    images = photos(backbone, 1)
    r = torch.full((1, 1, 15), 1 / 15, dtype=torch.float64)
    for call in reversed(read_attention(backbone, images).layers):
        a = dense(call.operator).abs().mean(1)
        a = a / a.sum(-1, keepdim=True)
        lowest = a.flatten().sort().values[int(0.8 * 225)]
        m = torch.eye(15) + a * (a >= lowest)
        r = r @ (m / m.sum(-1, keepdim=True))
    got = create_explainer("rollout", backbone, discard=0.8).attribute(images, 0)
    assert torch.allclose(got.flatten(), r.flatten())


def test_the_provenance_of_a_map_says_whose_rows_were_normalised():
    backbone = attending(Linear, [0, 2])
    backbone.model.blocks[1].attn.mechanism = Positive(16, 2)
    explainer = create_explainer("rollout", backbone)
    assert explainer.notes == (
        "layers 0, 2: entries of A may be negative; normalised rows of |A| are used",
        "layer 1: rows of A do not sum to 1; they are normalised",
    )
    assert provenance_of(backbone, explainer, "crop")["notes"] == list(explainer.notes)
    assert len(create_explainer("rollout", backbone, start_layer=1).notes) == 2
    assert len(create_explainer("rollout", backbone, start_layer=-1).notes) == 1
    for name in ("raw_attention", "generic_relevance"):
        assert not create_explainer(name, backbone).notes
    plain = create_explainer("rollout", tiny())
    assert plain.notes == () and "notes" not in provenance_of(plain.backbone, plain, "crop")


def test_layers_in_words():
    assert layers_text([3]) == "layer 3" and layers_text([1, 4]) == "layers 1, 4"
    assert layers_text([0, 1]) == "layers 0, 1" and layers_text([4, 5, 6]) == "layers 4 to 6"


def test_raw_attention_and_relevance_take_the_operator_as_it_is():
    backbone = attending(Linear, [0, 1, 2]).double()
    images = photos(backbone).requires_grad_()
    reading = read_attention(backbone, images)
    maps = [dense(call.operator) for call in reading.layers]
    raw = create_explainer("raw_attention", backbone).attribute(images, TARGET)
    assert raw.min() < 0
    assert_equal(raw, maps[-1].mean(1)[:, :1, 1:].unflatten(-1, (3, 5)))
    score = reading.logits.gather(1, TARGET[:, None]).sum()
    grads = torch.autograd.grad(score, [call.output for call in reading.layers])
    r = torch.zeros(2, 1, 16, dtype=torch.float64)
    r[..., 0] = 1
    for a, call, grad in reversed(list(zip(maps, reading.layers, grads, strict=True))):
        r = r + r @ (a * (grad @ call.value.transpose(-2, -1))).clamp_min(0).mean(1)
    got = create_explainer("generic_relevance", backbone).attribute(images, TARGET)
    assert_equal(got, r[..., 1:].unflatten(-1, (3, 5)))


def test_column_mass_needs_weights_of_at_least_0():
    backbone = attending(Linear, [0, 1])
    message = r"layer: attention of layer 1 may be negative, .*; use 'rollout', which takes \|A\|"
    with pytest.raises(ValueError, match=message):
        create_explainer("column_mass", backbone, layer=1)
    with pytest.raises(ValueError, match=r"layers 0, 1 may be negative"):
        create_explainer("column_mass", backbone, layer=None)
    assert create_explainer("column_mass", backbone, layer=2)
    images = photos(backbone)
    positive = attending(Positive, [0])
    a = dense(read_attention(positive, images).layers[0].operator)
    got = create_explainer("column_mass", positive, layer=0).attribute(images, TARGET)
    assert_equal(got, a.mean((1, 2))[:, None, 1:].unflatten(-1, (3, 5)))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_statistics_of_a_signed_operator_are_those_of_its_absolute_value(prefix):
    operator = operators("signed", prefix)
    with pytest.raises(ValueError, match=r"operator: its entries may be negative.*absolute=True"):
        statistics(operator, (3, 5), prefix)
    found = statistics(operator, (3, 5), prefix, absolute=True)
    a = dense(operator).abs()
    p = a / a.sum(-1, keepdim=True)
    assert torch.allclose(found.entropy, row_entropy(p[:, :, prefix:]).mean(-1))
    assert torch.allclose(found.received, p[:, :, prefix:].mean(2))


def test_rows_of_the_fused_matrix_are_computed_in_chunks(monkeypatch):
    operator, asked = operators("signed", 1), []
    monkeypatch.setattr("xattn.attention.operators.base.TILE", 2 * 3 * 16 * 5)  # five rows
    tile = operator.tile
    monkeypatch.setattr(operator, "tile", lambda i, j: asked.append(tile(i, j)) or asked[-1])
    rollout_step(operator, torch.rand(2, 1, 16, dtype=torch.float64))
    assert [a.shape[2] for a in asked] == [5, 5, 5, 1]
