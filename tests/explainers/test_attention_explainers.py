"""Attention explainers: each equals its materialised definition, stores no N x N, refuses by name."""

from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from small_transformers import (
    FUSE,
    GRID,
    PREFIX,
    TARGET,
    VARIANTS,
    assert_equal,
    photos,
    share,
    tiny,
)
from torch import nn
from torch.profiler import ProfilerActivity, profile

from xattn.attention.operators.base import Operator
from xattn.attention.record import record
from xattn.backbone import load_backbone
from xattn.explainers import create_explainer
from xattn.explainers.relevance.attention import patch_grid, read_attention
from xattn.explainers.relevance.rollout import rollout_row

GRADIENTS = ["generic_relevance", "legrad", "grad_eclip"]
READERS = ["rollout", "raw_attention", "column_mass", *GRADIENTS]
RULES = ["attn_lrp", "libragrad"]
NAMES = [*READERS, *RULES]
READ = {"class": [0], "distilled": [0, 1], "registers": [0]}  # others: patches, or the pool's row


def materialised(backbone, images, target):
    """All A and dlogit/dA, (B, H, N, N) a layer, last the pooling's, from softmax written out."""
    layers = [m for m in backbone.model.modules() if hasattr(m, "fused_attn")]
    kept, flags = [], [m.fused_attn for m in layers]
    softmax = torch.Tensor.softmax

    def keep(x, dim):
        a = torch.softmax(x, dim)  # under a function mode the method is looked up by name, again
        kept.append(a)
        return a

    torch.Tensor.softmax = keep
    try:
        for m in layers:
            m.fused_attn = False
        logits = backbone.logits(images.clone().requires_grad_())
    finally:
        torch.Tensor.softmax = softmax
        for m, flag in zip(layers, flags, strict=True):
            m.fused_attn = flag
    grads = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), kept)
    return [a.detach() for a in kept], list(grads)


def starting_row(variant, tokens, batch):
    row = torch.zeros(batch, 1, tokens, dtype=torch.float64)
    row[..., READ.get(variant, list(range(PREFIX[variant], tokens)))] = 1
    return row / row.sum(-1, keepdim=True)


def plain_rollout(variant, maps, fusion, residual, discard, keep_class=True):
    maps = [FUSE[fusion](a) for a in maps]
    r = starting_row(variant, maps[0].shape[-1], len(maps[0]))
    if variant == "pool":
        r = maps.pop()
        r = r / r.sum(-1, keepdim=True)
    product = torch.eye(maps[0].shape[-1], dtype=torch.float64)
    for a in maps:
        if discard:
            lowest = a.flatten(1).sort(1).values[:, int(discard * a[0].numel())]
            kept = a >= lowest[:, None, None]
            kept[..., : int(keep_class and PREFIX[variant] > 0)] = True
            a = a * kept
        a = residual * torch.eye(a.shape[-1]) + (1 - residual) * a
        product = a / a.sum(-1, keepdim=True) @ product
    return r @ product


def as_map(rows, variant):
    return rows[..., PREFIX[variant] :].unflatten(-1, GRID)


DTYPES = ["float64", "float32"]


# ---------------------------------------------------------------------- what they compute


OPTIONS = [
    {},
    {"residual": 0.3},
    {"fusion": "max"},
    {"fusion": "min", "residual": 0.0},
    {"discard": 0.9},
    {"discard": 0.5, "fusion": "max", "keep_class": False},
    {"discard": 0.97, "fusion": "min"},
]
# In float32 an entry at the threshold may fall on the other side of it.
CASES = [(o, d) for o in OPTIONS for d in DTYPES if d == "float64" or "discard" not in o]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options, dtype", CASES, ids=str)
def test_rollout_equals_the_product_of_stored_maps(variant, options, dtype, monkeypatch):
    dtype = getattr(torch, dtype)
    monkeypatch.setattr("xattn.attention.operators.base.TILE", 200)  # several chunks of rows
    backbone = tiny(variant).double()
    images = photos(backbone)
    maps, _ = materialised(backbone, images, TARGET)
    settings = {"fusion": "mean", "residual": 0.5, "discard": 0.0, **options}
    expected = as_map(plain_rollout(variant, maps, **settings), variant)
    backbone = backbone.to(dtype)
    got = create_explainer("rollout", backbone, **options).attribute(images.to(dtype), TARGET)
    assert_equal(got.double(), expected)


def test_rollout_from_a_later_layer_starts_there():
    backbone = tiny().double()
    images = photos(backbone)
    maps, _ = materialised(backbone, images, TARGET)
    got = create_explainer("rollout", backbone, start_layer=1).attribute(images, 0)
    assert_equal(got, as_map(plain_rollout("class", maps[1:], "mean", 0.5, 0.0), "class"))
    with pytest.raises(ValueError, match=r"start_layer: got 3; the model has 3 layers, 0..2"):
        create_explainer("rollout", backbone, start_layer=3).attribute(images, 0)


@pytest.mark.parametrize("variant", ["class", "registers", "none"])
def test_rollout_of_one_token_is_its_row_of_the_product_up_to_any_layer(variant):
    backbone = tiny(variant).double()
    images = photos(backbone)
    maps, _ = materialised(backbone, images, TARGET)
    operators = [call.operator for call in read_attention(backbone, images).layers]
    product = torch.eye(operators[0].shape[2], dtype=torch.float64).expand(2, -1, -1)
    for layer, (a, _) in enumerate(zip(maps, operators, strict=False)):
        mixed = (a.mean(1) + torch.eye(a.shape[-1], dtype=torch.float64)) / 2
        product = mixed @ product
        for token in (0, 4):
            got = rollout_row(operators[: layer + 1], token)
            assert_equal(got, product[:, token])


def test_rollout_keeps_all_mass_and_forgets_layers_of_pure_residual():
    backbone = tiny("none").double()
    images = photos(backbone)
    for options in ({}, {"fusion": "max"}, {"discard": 0.8}):
        maps = create_explainer("rollout", backbone, **options).attribute(images, 0)
        assert torch.allclose(maps.sum((2, 3)), torch.ones(2, 1, dtype=torch.float64))
    uniform = create_explainer("rollout", backbone, residual=1.0).attribute(images, 0)
    assert torch.allclose(uniform, torch.full_like(uniform, 1 / 15))


@pytest.mark.parametrize("discard", [0.0, 0.1, 0.5, 0.99, 0.999999])
def test_the_discard_threshold_is_an_order_statistic(discard, monkeypatch):
    from xattn.explainers.relevance.rollout import _smallest_kept, _sort_keys

    class Given(Operator):
        stochastic = True  # entries are taken as they are

        def __init__(self, a):
            self.a, self.shape = a, tuple(a.shape)

        def matvec(self, x):
            return self.a @ x

        def rows(self, index):
            return self.a[:, :, index]

        def _anchor(self):
            return self.a

    monkeypatch.setattr("xattn.attention.operators.base.TILE", 100)
    a = torch.randn(3, 1, 17, 19)
    a[1] = a[1].abs() * 1e-30
    a[2] = (a[2] * 2).round()  # ties
    expected = a[:, 0].flatten(1).sort(1).values[:, int(discard * 17 * 19)]
    assert torch.equal(_smallest_kept(Given(a), "mean", discard), _sort_keys(expected))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_relevance_equals_the_form_with_stored_gradients(variant, dtype):
    dtype = getattr(torch, dtype)
    backbone = tiny(variant).double()
    images = photos(backbone)
    maps, grads = materialised(backbone, images, TARGET)
    layers = [(a * g).clamp(min=0).mean(1) for a, g in zip(maps, grads, strict=True)]
    r = layers.pop() if variant == "pool" else starting_row(variant, maps[0].shape[-1], 2)
    for e in reversed(layers):
        r = r + r @ e
    got = create_explainer("generic_relevance", backbone.to(dtype)).attribute(
        images.to(dtype), TARGET
    )
    assert_equal(got.double(), as_map(r, variant), 1e-6 if dtype == torch.float64 else 1e-5)


def test_relevance_is_the_same_for_an_operator_without_a_kernel(monkeypatch):
    backbone = tiny().double()
    images = photos(backbone)
    with record(backbone.model) as calls:
        logits = backbone.logits(images.requires_grad_())
    grad = torch.autograd.grad(logits[:, 0].sum(), calls[1].output)[0]
    operator, r = calls[1].operator, torch.rand(2, 3, 16, dtype=torch.float64)
    monkeypatch.setattr("xattn.attention.operators.base.TILE", 100)
    plain = Operator.gradient_vecmat(operator, calls[1].value, grad, r)
    assert_equal(operator.gradient_vecmat(calls[1].value, grad, r), plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_raw_attention_is_the_row_that_the_classifier_reads(variant):
    backbone = tiny(variant).double()
    images = photos(backbone)
    maps, _ = materialised(backbone, images, TARGET)
    start = starting_row(variant, maps[0].shape[-1], 2)[:, None]
    last = maps[-1] if variant == "pool" else start @ maps[-1]
    for fusion in FUSE:
        got = create_explainer("raw_attention", backbone, fusion=fusion).attribute(images, 1)
        assert_equal(got, as_map(FUSE[fusion](last), variant))
    head = create_explainer("raw_attention", backbone, fusion=1).attribute(images, 1)
    assert_equal(head, as_map(last[:, 1], variant))
    start = maps[-1].mean(1, keepdim=True) if variant == "pool" else start
    first = create_explainer("raw_attention", backbone, layer=0).attribute(images, 1)
    assert_equal(first, as_map((start @ maps[0]).mean(1), variant))


def test_column_mass_is_the_mean_attention_received():
    backbone = tiny("registers").double()
    images = photos(backbone)
    maps, _ = materialised(backbone, images, TARGET)
    received = torch.stack(maps).mean((2, 3))[:, :, None]
    got = create_explainer("column_mass", backbone, layer=1).attribute(images, 0)
    assert_equal(got, as_map(received[1], "registers"))
    got = create_explainer("column_mass", backbone, layer=None).attribute(images, 0)
    assert_equal(got, as_map(received.mean(0), "registers"))


@pytest.mark.parametrize(
    "start, read", [("class", [0]), ("patches", list(range(1, 16))), ([2, 7], [2, 7])]
)
def test_the_start_may_be_given(start, read):
    backbone = tiny().double()
    images = photos(backbone)
    maps, _ = materialised(backbone, images, TARGET)
    got = create_explainer("raw_attention", backbone, start=start).attribute(images, 0)
    assert_equal(got, as_map(maps[-1].mean(1)[:, read].mean(1, keepdim=True), "class"))


# ---------------------------------------------------------------------- AttnLRP


class ByHand(nn.Module):
    """The rules as an equation: a factor that gets no gradient is detached."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def norm(self, x, layer):
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt().detach()
        return centred / deviation * layer.weight + layer.bias

    def attention(self, x, layer):
        q, k, v = layer.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        scores = share(q, 0.5) @ share(k, 0.5).transpose(2, 3) * layer.scale
        y = share(scores.softmax(-1), 0.5) @ share(v, 0.5)
        return layer.proj(y.transpose(1, 2).flatten(2))

    def forward(self, tokens):
        m = self.model
        x = m._pos_embed(tokens)
        for block in m.blocks:
            x = x + self.attention(self.norm(x, block.norm1), block.attn)
            hidden = block.mlp.fc1(self.norm(x, block.norm2))
            x = x + block.mlp.fc2(hidden * (F.gelu(hidden) / hidden).detach())
        return m.head(self.norm(x, m.norm)[:, 0])


def test_attn_lrp_equals_the_rules_written_out():
    backbone = tiny().double()
    images = photos(backbone)
    tokens = backbone.model.patch_embed(backbone.normalize(images)).requires_grad_()
    logits = ByHand(backbone.model)(tokens)
    assert torch.allclose(logits, backbone.logits(images))
    grad = torch.autograd.grad(logits.gather(1, TARGET[:, None]).sum(), tokens)[0]
    expected = (tokens * grad).sum(2).unflatten(1, GRID)[:, None]
    got = create_explainer("attn_lrp", backbone).attribute(images, TARGET)
    assert_equal(got, expected.detach())
    pixels = create_explainer("attn_lrp", backbone, at="pixels").attribute(images, TARGET)
    assert pixels.shape == (2, 1, *backbone.preprocessing.input_size)


def test_attn_lrp_gives_half_the_relevance_of_attention_to_the_values():
    from xattn.explainers.relevance.engine import Engine

    shape = 2, 3, 17, 8
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with Engine():
        y = F.scaled_dot_product_attention(q, k, v)
    dy = torch.randn(shape, dtype=torch.float64)
    dq, _, dv = torch.autograd.grad(y, (q, k, v), dy)
    assert torch.allclose((v * dv).sum(), (y * dy).sum() / 2)
    full = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), q, dy)[0]
    assert torch.allclose(dq, full / 4)


@pytest.mark.parametrize("gate", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ReLU(), nn.Tanh()])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_attn_lrp_conserves_relevance_without_biases(gate, norm):
    from xattn.explainers.relevance.engine import Engine

    torch.manual_seed(0)
    inner = norm(12, eps=1e-9)
    layers = nn.Sequential(nn.Linear(6, 12, bias=False), gate, inner, nn.Linear(12, 4, bias=False))
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    with Engine():
        y = layers.double()(x)
        gated = y * torch.sigmoid(1.7 * y) + F.silu(y) * y.flip(1)  # QuickGELU, SwiGLU
    for out in (y, gated):
        grad = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
        assert torch.allclose((x * grad).sum(1), out.sum(1))


def test_libragrad_without_blocks_of_tokens_reads_pixels():
    stages = load_backbone("twins_svt_small", weights=None, input_size=64)
    with pytest.raises(ValueError, match=r"blocks of twins_svt_small do not take tokens .*pixels"):
        create_explainer("libragrad", stages)
    create_explainer("libragrad", stages, base="input_x_gradient", at="pixels")


def test_libragrad_counts_shifts_of_batchnorm_and_constants_that_join_late():
    """XCiT has a BatchNorm in its blocks; its class token joins behind them."""
    torch.manual_seed(0)
    options = {"img_size": 64, "depth": 2, "num_classes": 7}
    model = timm.create_model("xcit_nano_12_p16_224", **options)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and not name.endswith("running_var"):
            value.data.add_(torch.randn_like(value) * 0.1)
    backbone = load_backbone(model, input_size=64).double()
    explainer = create_explainer("libragrad", backbone, base="fullgrad")
    images = photos(backbone)
    shares, elsewhere = explainer.contributions(images, 3)
    assert torch.allclose(shares.sum(1) + elsewhere, backbone.logits(images)[:, 3])


def test_attn_lrp_refuses_what_it_does_not_know():
    class Activation(nn.Module):
        def forward(self, x):
            return torch.special.i0(x)

    with pytest.raises(ValueError, match=r"attn_lrp has no rule for special_i0 in Activation"):
        create_explainer("attn_lrp", tiny(act_layer=Activation))
    with pytest.raises(ValueError, match=r"has no module 'features'"):
        create_explainer("attn_lrp", tiny(), at="features")
    with pytest.raises(ValueError, match=r"at='tokens': test_resnet has no patch_embed"):
        create_explainer("attn_lrp", load_backbone("test_resnet", weights=None))


# ---------------------------------------------------------------------- contracts


@pytest.mark.parametrize("name", ["rollout", "generic_relevance", "attn_lrp"])
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_the_model_is_as_before(name, fails):
    backbone = tiny()
    layers = [block.attn for block in backbone.model.blocks]
    layers[1].fused_attn = False
    images = photos(backbone, dtype=torch.float32).requires_grad_()
    explainer = create_explainer(name, backbone)
    hooks = [len(m._forward_hooks) for m in backbone.modules()]

    def fail(*_):
        raise RuntimeError("interrupted")

    if fails:
        handle = backbone.model.norm.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="interrupted"):
            explainer.attribute(images, TARGET)
        handle.remove()
    else:
        explainer.attribute(images, TARGET)
    assert [layer.fused_attn for layer in layers] == [True, False, True]
    assert hooks == [len(m._forward_hooks) for m in backbone.modules()]
    assert not any(p.requires_grad or p.grad is not None for p in backbone.parameters())
    assert images.grad is None and F.scaled_dot_product_attention.__name__ != "_attend"
    with record() as calls:
        pass
    F.scaled_dot_product_attention(*3 * [torch.rand(1, 1, 2, 2)])
    assert calls == []


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_size_of_a_map_is_allocated(name):
    backbone = tiny(grid=(33, 34), depth=2)
    images = photos(backbone, 1, torch.float32)
    explainer = create_explainer(name, backbone)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as probe:
        explainer.attribute(images, 3)
    events = [e for e in probe.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert len(events) > 100
    tokens = 33 * 34 + 1
    assert max(e.nbytes() for e in events) < 4 * tokens * tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_models_give_maps_near_the_full_ones(name, dtype):
    backbone = tiny()
    images = photos(backbone, dtype=torch.float32)
    full = create_explainer(name, backbone).attribute(images, TARGET)
    half = create_explainer(name, backbone.to(dtype)).attribute(images, TARGET).float()
    assert (half - full).abs().max() <= 0.1 * full.abs().max()


# ---------------------------------------------------------------------- other models


@pytest.mark.parametrize(
    "model, start",
    [
        ("test_vit", (0,)),
        ("test_vit2", "patches"),
        ("test_vit3", None),
        ("test_vit4", "patches"),
        ("vit_relpos_small_patch16_224", "patches"),
    ],
)
def test_stock_models_tell_what_their_classifier_reads(model, start):
    backbone = load_backbone(model, weights=None)
    explainer = create_explainer("rollout", backbone)
    assert explainer.start == start
    maps = explainer.attribute(photos(backbone, 1, torch.float32), 0)
    assert maps.shape[2:] == backbone.tap_sizes[-1] and maps.std() > 0


def test_torchvision_transformers_are_read_too():
    backbone = load_backbone(
        "torchvision/vit_b_32",
        weights=None,
        taps=["encoder.layers.encoder_layer_11.ln_1"],
        input_size=64,
    )
    images = photos(backbone, 1, torch.float32)
    for name, options in (("rollout", {}), ("attn_lrp", {"at": "pixels"})):
        maps = create_explainer(name, backbone, **options).attribute(images, 0)
        assert maps.shape[2:] == ((2, 2) if name == "rollout" else (64, 64))


@pytest.mark.parametrize(
    "model, found",
    [
        ("swin_tiny_patch4_window7_224", r"attends inside windows \(64 x 49 tokens\)"),
        ("resnet18", r"makes no call to F.scaled_dot_product_attention"),
        ("xcit_nano_12_p16_224", r"attends over 32 entries, not over its 197 tokens"),
    ],
)
def test_other_attention_is_refused_by_name(model, found):
    backbone = load_backbone(model, weights=None)
    for name in READERS:
        with pytest.raises(ValueError, match=f"backbone: {model} {found}; this explainer needs"):
            create_explainer(name, backbone)


def test_blocks_that_attend_twice_or_not_are_refused():
    backbone = tiny()

    class Nothing(nn.Module):
        def forward(self, x, **other):
            return x

    backbone.model.blocks[1].attn = Nothing()
    with pytest.raises(ValueError, match=r"VisionTransformer makes 2 attention calls in 3 blocks"):
        create_explainer("rollout", backbone)


def test_pooling_by_a_maximum_needs_a_start():
    backbone = tiny(global_pool="max", class_token=False)
    with pytest.raises(
        ValueError, match=r"start: VisionTransformer pools by a maximum.*; give start="
    ):
        create_explainer("rollout", backbone)
    assert create_explainer("rollout", backbone, start="patches")
    assert create_explainer("column_mass", backbone)


def test_finding_the_start_draws_no_random_numbers():
    backbone = tiny()
    before = torch.get_rng_state()
    for name in NAMES:
        create_explainer(name, backbone)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("model", ["class", "none"])
def test_converted_models_have_the_maps_of_stock_ones(model):
    from xattn.attention import convert

    stock, converted = tiny(model).double(), tiny(model).double()
    images = photos(stock)
    convert(converted, "softmax")
    for name in NAMES:
        expected = create_explainer(name, stock).attribute(images, TARGET)
        assert_equal(create_explainer(name, converted).attribute(images, TARGET), expected)


def test_other_mechanisms_answer_the_same_questions():
    from xattn.attention import convert

    backbone = tiny(grid=(5, 5)).double()
    convert(backbone, "gna", options={"kernel": 3})
    images = photos(backbone)
    for name in READERS:
        maps = create_explainer(name, backbone).attribute(images, TARGET)
        assert maps.shape == (2, 1, 5, 5) and maps.isfinite().all() and maps.min() >= 0
    for options in ({"fusion": "max"}, {"discard": 0.5}):
        maps = create_explainer("rollout", backbone, **options).attribute(images, TARGET)
        assert maps.isfinite().all() and maps.std() > 0


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("rollout", {"fusion": "sum"}, r"fusion: got 'sum'; give 'mean', 'max' or 'min'"),
        ("rollout", {"start": "cls"}, r"start: got 'cls'; give 'auto', 'class', 'patches'"),
        ("rollout", {"start": [99]}, r"start: got \[99\]; give token numbers in 0..14"),
        ("rollout", {"start": "class"}, r"start='class': VisionTransformer has no class token"),
        ("raw_attention", {"layer": 5}, r"layer: got 5; the model has 3 layers, 0..2"),
        ("raw_attention", {"fusion": 2}, r"fusion: got head 2; the layer has 0..1"),
        ("column_mass", {"layer": -4}, r"layer: got -4"),
        ("generic_relevance", {"layer": 1}, r"generic_relevance does not take that option"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    backbone = tiny("none")
    with pytest.raises(ValueError, match=message):
        create_explainer(name, backbone, **options)


def test_the_patch_grid_of_photos_and_clips_has_their_aspect_ratio():
    backbone = SimpleNamespace(name="net", has_grid=False, model=SimpleNamespace(steps=2))
    photo, clip = torch.zeros(1, 3, 24, 48), torch.zeros(1, 3, 8, 24, 48)
    assert patch_grid(backbone, photo, 18) == (3, 6)
    assert patch_grid(backbone, clip, 36) == (2, 3, 6)
    with pytest.raises(ValueError, match="17 patch tokens of net do not form a grid on .* 24 x 48"):
        patch_grid(backbone, photo, 17)
    with pytest.raises(ValueError, match="backbone: 35 patch tokens of net form no grid"):
        patch_grid(backbone, clip, 35)
