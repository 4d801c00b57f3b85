"""Class readings: maps by the classifier's rows, compared with the network's own logits and attention."""

from __future__ import annotations

import pytest
import timm
import torch
from attentive_fakes import HEADS, make, read_by
from timm.models.beit import Beit
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import xattn
from xattn.attention import convert
from xattn.backbone import Taps
from xattn.heads import create_head
from xattn.heads.class_reading import (
    ClassWeights,
    PooledReading,
    ProbeReading,
    TokenReading,
    before_norms,
    class_reading,
)
from xattn.heads.probed import probed

GRID, CLASSES = (3, 5), 7
SIZE = {"img_size": (12, 20), "patch_size": 4, "embed_dim": 16, "depth": 4, "num_classes": CLASSES}


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shaken(model):
    """``model`` with all weights far from their initial values, norms and layer scales among them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def vit(taps=None, **options):
    model = shaken(VisionTransformer(**{**SIZE, "num_heads": 2, "mlp_ratio": 2, **options}))
    return xattn.load_backbone(model, taps=taps).to(torch.float64)


def apart(values):
    """Values of the first photo minus those of the second: constants drop out."""
    return values[0] - values[1]


# ---------------------------------------------------------------- pooled maps


def pooled_backbone(name):
    last = ["norm1.3", "head"]
    if name == "average":
        return vit(last, reg_tokens=2, global_pool="avg"), "fc_norm"
    if name == "average, no norm after it":
        return vit(last, class_token=False, global_pool="avg", fc_norm=False), None
    if name == "mixer":
        model = MlpMixer(img_size=20, patch_size=4, num_blocks=4, embed_dim=16, num_classes=CLASSES)
        return xattn.load_backbone(shaken(model), taps=last, input_size=20).double(), None
    if name == "beit":
        model = Beit(**SIZE, num_heads=2, global_pool="avg")
        return xattn.load_backbone(shaken(model), taps=last).to(torch.float64), "fc_norm"
    if name == "swin":
        model = SwinTransformer(
            img_size=64, patch_size=4, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 1, 1),
            window_size=4, num_classes=CLASSES,
        )  # fmt: skip
        return xattn.load_backbone(shaken(model)).to(torch.float64), None
    model = timm.create_model(name, num_classes=CLASSES)
    backbone = xattn.load_backbone(shaken(model), input_size=64).to(torch.float64)
    return backbone, "head.norm" if name == "test_convnext" else None


@pytest.mark.parametrize(
    "name",
    ["test_resnet", "test_efficientnet", "test_convnext", "swin", "mixer", "beit", "average",
     "average, no norm after it"],
)  # fmt: skip
def test_pooled_maps_add_up_to_the_logits(name):
    """Their mean over places, divided by the norm's deviation, is the logit up to a constant."""
    backbone, norm = pooled_backbone(name)
    reading = class_reading(backbone)
    assert isinstance(reading, PooledReading) and not reading.state_dict()
    with torch.no_grad():
        taps = backbone(rand(2, 3, *backbone.preprocessing.input_size))
        found = reading(taps, None, "multiclass").own.mean((2, 3))
    if norm is not None:
        deviation = taps.maps[-1].mean((2, 3)).var(1, unbiased=False, keepdim=True)
        found = found / (deviation + backbone.model.get_submodule(norm).eps).sqrt()
    torch.testing.assert_close(apart(found), apart(taps.logits), rtol=1e-6, atol=1e-8)


def test_rows_before_norms_are_gradients():
    """w . norm(x) along changes of x that leave its deviation as it is."""
    for norm in (nn.LayerNorm(6), timm.layers.RmsNorm(6)):
        shaken(norm).double()
        w, x = rand(2, 6), rand(6, seed=1).requires_grad_()
        (w[0] @ norm(x)).backward()
        z = x.detach() - x.detach().mean() if isinstance(norm, nn.LayerNorm) else x.detach()
        scale = (z.square().mean() + norm.eps).sqrt()
        row = before_norms(w, norm)[0] / scale
        tangent = row - (row @ z) / (z @ z + 6 * norm.eps) * z
        torch.testing.assert_close(x.grad, tangent.detach(), rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------- the other classes


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("gap", [0, 40], ids=["undecided", "one class has all of p"])
def test_others_are_the_mean_of_all_other_classes(task, gap):
    logits, maps = rand(3, 5) * 4 - 2, rand(3, 5, 2, 3, seed=1)
    logits[:, 2] += gap
    if task == "multilabel" and gap:
        logits -= 20
    p = logits.sigmoid() if task == "multilabel" else logits.softmax(1)
    weights = ClassWeights.of(logits.float(), task)
    mean, rest = (
        torch.einsum("bk,bkhw->bhw", w, maps.float())[:, None] for w in (weights.p, weights.rest)
    )
    index = torch.tensor([[2, 0], [4, 2], [1, 1]])
    own = maps.gather(1, index[..., None, None].expand(-1, -1, 2, 3)).float()
    found = weights.others(own, mean, rest, index)
    for b, classes in enumerate(index.tolist()):
        for m, k in enumerate(classes):
            others = [j for j in range(5) if j != k]
            expected = torch.einsum("k,khw->hw", p[b, others], maps[b, others]) / p[b, others].sum()
            torch.testing.assert_close(found[b, m].double(), expected, rtol=1e-4, atol=1e-5)
    everything = weights.others(maps.float(), mean, rest, None)
    torch.testing.assert_close(everything[1, 4], found[1, 0])


def test_the_only_class_has_no_others():
    weights = ClassWeights.of(torch.tensor([[1.5]]), "multilabel")
    assert weights.rest.tolist() == [[0.0]] and weights.top.tolist() == [[0]]


# ---------------------------------------------------------------- a class token


def attention_of(backbone, images):
    """Input tokens, weights and output of the attention in every block, as the model computes them."""
    seen, hooks = {}, []
    for i, block in enumerate(backbone.model.blocks):
        block.attn.fused_attn = False
        dropout = block.attn.attn_drop
        keep = seen[i] = {}
        hooks += [
            block.attn.register_forward_hook(lambda m, a, o, keep=keep: keep.update(x=a[0], y=o)),
            dropout.register_forward_hook(lambda m, a, o, keep=keep: keep.update(weights=a[0])),
        ]
    with torch.no_grad():
        taps = backbone(images)
    for hook in hooks:
        hook.remove()
    return taps, seen


def read_by_hand(block, seen, rows, prefix):
    """(B, K, N): what each patch adds to rows . class token, from the model's own attention matrix."""
    attention, x = block.attn, seen["x"]
    values = attention.qkv(x).chunk(3, -1)[2]
    if attention.qkv.bias is not None:
        values = values - attention.qkv.bias.chunk(3)[2]
    values = values.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # (B, H, T, D)
    carried = seen["weights"][:, :, 0, :, None] * values
    carried = carried.transpose(1, 2).flatten(2) @ attention.proj.weight.t()
    gamma = getattr(block.ls1, "gamma", torch.ones((), dtype=x.dtype))
    return torch.einsum("kc,btc->bkt", rows, carried * gamma)[..., prefix:]


@pytest.mark.parametrize(
    "options",
    [{}, {"init_values": 0.3}, {"reg_tokens": 4}, {"qkv_bias": False}, {"fc_norm": True}],
    ids=["plain", "layer scale", "registers", "no bias", "two norms"],
)
def test_token_maps_are_what_the_models_own_attention_carries(options):
    backbone = vit(["norm1.1", "block.2", "norm1.3"], **options)
    reading = class_reading(backbone)
    assert isinstance(reading, TokenReading) and reading.extras == 2
    taps, seen = attention_of(backbone, rand(2, 3, 12, 20))
    prefix, model = backbone.prefix_tokens, backbone.model
    rows = before_norms(backbone.classifier_weight, model.fc_norm, model.norm)
    expected = sum(read_by_hand(model.blocks[i], seen[i], rows, prefix) for i in (1, 3))
    with torch.no_grad():
        found = reading(taps, None, "multiclass")
        some = reading(taps, torch.tensor([[4, 0], [1, 4]]), "multiclass")
    torch.testing.assert_close(found.own.flatten(2), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(some.own[1, 1], found.own[1, 4])
    torch.testing.assert_close(some.others[1, 1], found.others[1, 4])
    weights = torch.stack([seen[i]["weights"][:, :, 0, prefix:].mean(1) for i in (1, 3)], 1)
    torch.testing.assert_close(found.extra.flatten(2), weights)


@pytest.mark.parametrize("registers", [0, 4])
def test_prefixes_are_the_tokens_that_attention_reads_beside_its_taps(registers):
    backbone = vit(["norm1.1", "stage.2", "norm1.3"], reg_tokens=registers)
    taps, seen = attention_of(backbone, rand(2, 3, 12, 20))
    assert taps.prefixes[1] is None and len(taps.prefixes) == 3
    for place, block in ((0, 1), (2, 3)):
        tokens = torch.cat([taps.prefixes[place], taps.maps[place].flatten(2).transpose(1, 2)], 1)
        torch.testing.assert_close(tokens, seen[block]["x"])
    both = taps.to(torch.float32)
    assert (
        both.prefixes[0].dtype == both.maps[2].dtype == torch.float32 and both.prefixes[1] is None
    )


@pytest.mark.parametrize(
    "taps", [["stage.2", "stage.3"], ["norm1.3", "head"], ["block.2", "stage.3"]]
)
def test_prefixes_are_there_beside_taps_of_blocks_alone(taps):
    with torch.no_grad():
        found = vit(taps)(rand(1, 3, 12, 20)).prefixes
        none = vit(taps, class_token=False, global_pool="avg")(rand(1, 3, 12, 20)).prefixes
    assert [p is not None for p in found] == ([] if "stage.2" in taps else [True, False])
    assert none == ()


def test_taps_without_prefixes_are_refused():
    backbone = vit()
    with torch.no_grad():
        taps = backbone(rand(1, 3, 12, 20))
    with pytest.raises(
        ValueError, match="taps: the prefix tokens of the norm1 taps .* are missing"
    ):
        class_reading(backbone)(Taps(*taps[:3]), None, "multiclass")


# ---------------------------------------------------------------- probed networks


def test_a_probed_network_is_read_by_its_heads_class_maps():
    backbone = vit(["head"])
    head = create_head("efficient_probe", backbone, classes=3, queries=4).double().eval()
    nn.init.normal_(head.classifier.weight)
    both = probed(backbone, head)
    reading = class_reading(both)
    assert isinstance(reading, ProbeReading) and not list(reading.parameters())
    with torch.no_grad():
        taps = both(rand(2, 3, 12, 20))
        found = reading(taps, torch.tensor([[2], [0]]), "multiclass")
        torch.testing.assert_close(found.own, head(taps, torch.tensor([2, 0])))
        p, maps = taps.logits.softmax(1), head(taps)
    others = (p[0, 0] * maps[0, 0] + p[0, 1] * maps[0, 1]) / (p[0, 0] + p[0, 1])
    torch.testing.assert_close(found.others[0, 0], others)


@pytest.mark.parametrize("name", HEADS)
def test_every_attentive_head_can_be_read(name):
    backbone = read_by(name)
    head = make(name, backbone)
    both = probed(backbone, head)
    own = create_head("evidence", both, parts=["contrast", "u"], components=2, hidden=3).eval()
    with torch.no_grad():
        taps = both(rand(2, 3, *backbone.preprocessing.input_size, dtype=torch.float32))
        cam = class_reading(both)(taps, None, "multiclass").own
        torch.testing.assert_close(cam, head(taps))
        assert own(taps, torch.tensor([4, 0])).isfinite().all()


# ---------------------------------------------------------------- refusals


def small(name):
    options = {"num_classes": CLASSES, "img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 2}
    if name.startswith(("vit", "deit", "eva", "cait", "xcit")):
        return timm.create_model(name, **options)
    return timm.create_model(name, num_classes=CLASSES)


REFUSED = [
    ("mobilenetv3_small_050", "more than average its last map"),
    ("ghostnet_050", "more than average its last map"),
    ("test_vit3", "pools its tokens by 'map'"),
    ("deit_tiny_distilled_patch16_224", "classifies two tokens"),
    ("cait_xxs24_224", "TalkingHeadAttn"),
    ("vit_small_patch16_rope_224", "AttentionRope"),
    ("vit_relpos_small_patch16_224", "load it with --taps"),
]


@pytest.mark.parametrize(("name", "reason"), REFUSED)
def test_other_classifiers_are_refused_in_one_line(name, reason):
    backbone = xattn.load_backbone(small(name))
    with pytest.raises(ValueError, match=reason) as refusal:
        create_head("evidence", backbone)
    text = str(refusal.value)
    assert text.startswith("head: evidence needs the classifier's rows") and "\n" not in text
    assert "train 'ttame'" in text


def test_what_the_class_token_cannot_be_read_from_is_refused():
    with pytest.raises(ValueError, match="none of its taps.*--taps norm1"):
        class_reading(vit(["block.2", "block.3"]))
    with pytest.raises(ValueError, match="final tokens.*--taps norm1.2 norm1.3 head"):
        class_reading(vit(reg_tokens=1, global_pool="avg"))
    with pytest.raises(ValueError, match="Block with Attention is not known"):
        class_reading(vit(qk_norm=True))
    with pytest.raises(ValueError, match="not the softmax that it was built with"):
        converted = vit()
        convert(converted, "gna", options={"kernel": 3})
        class_reading(converted)


def test_an_encoder_without_classes_is_told_to_get_some():
    with pytest.raises(ValueError, match="has no classes.*xattn probe"):
        create_head("evidence", vit(num_classes=0))


def test_a_tap_that_is_not_pooled_is_refused():
    model = timm.create_model("test_resnet", num_classes=CLASSES)
    with pytest.raises(ValueError, match="its last tap, stage.3, is not the map that it pools"):
        create_head("evidence", xattn.load_backbone(model, taps=["stage.2", "stage.3"]))
