"""LibraGrad, LeGrad and Grad-ECLIP: each equals its equations written out, on every kind of ViT."""

import threading

import pytest
import torch
import torch.nn.functional as F
from small_clip import pair
from small_transformers import GRID, PREFIX, TARGET, VARIANTS, assert_equal, photos, tiny
from timm.layers import GluMlp
from timm.models.mlp_mixer import MlpMixer
from torch import nn

import xattn
from xattn.attention import convert
from xattn.attention.base import MECHANISMS
from xattn.attention.record import record
from xattn.backbone import load_backbone
from xattn.backbone.scored import scored
from xattn.explainers import create_explainer
from xattn.explainers.relevance.token_blocks import block_outputs
from xattn.heads import create_head
from xattn.heads.probed import probed

READ = {"class": [0], "distilled": [0, 1], "registers": [0], "pool": [0]}
NAMES = ["libragrad", "legrad", "grad_eclip"]


def patches(rows, variant):
    return rows[:, None, PREFIX[variant] :].unflatten(-1, GRID)


def score_of(logits):
    return logits.gather(1, TARGET[:, None]).sum()


# ---------------------------------------------------------------------- LibraGrad


class Gated(GluMlp):
    """SwiGLU."""

    def __init__(self, *args, act_layer=None, norm_layer=None, **options):
        super().__init__(*args, act_layer=nn.SiLU, gate_last=False, **options)


class InPlace(nn.SiLU):
    """Changes what the layer before it gave."""

    def __init__(self):
        super().__init__(inplace=True)


MODELS = [
    ("class", {"act_layer": InPlace}),
    *((variant, {}) for variant in VARIANTS),
    ("class", {"init_values": 0.3, "qk_norm": True}),
    ("registers", {"mlp_layer": Gated}),
    ("average", {"num_heads": 4, "qkv_bias": False, "depth": 1}),
    ("none", {"grid": (2, 7)}),
]


@pytest.mark.parametrize("variant, options", MODELS, ids=str)
def test_tokens_and_biases_sum_to_the_logit(variant, options):
    backbone = tiny(variant, **options).double()
    images = photos(backbone)
    logits = backbone.logits(images).gather(1, TARGET[:, None])[:, 0]
    explainer = create_explainer("libragrad", backbone, base="fullgrad")
    tokens, elsewhere = explainer.contributions(images, TARGET)
    assert torch.allclose(tokens.sum(1) + elsewhere, logits, rtol=1e-10)
    grid = options.get("grid", GRID)
    shown = tokens[:, None, PREFIX[variant] :].unflatten(-1, grid)
    assert_equal(explainer.attribute(images, TARGET), shown)


@pytest.mark.parametrize(
    "name, options", [pytest.param(e.name, e.cases[0], id=e.name) for e in MECHANISMS.entries()]
)
def test_so_they_do_with_every_mechanism_whose_weights_are_constants(name, options):
    backbone = tiny("average", (5, 6), depth=2, embed_dim=32).double()
    convert(backbone, name, range(2), options)
    images = photos(backbone)
    explainer = create_explainer("libragrad", backbone, base="fullgrad")
    tokens, elsewhere = explainer.contributions(images, TARGET)
    logits = backbone.logits(images).gather(1, TARGET[:, None])[:, 0]
    assert torch.allclose(tokens.sum(1) + elsewhere, logits, rtol=1e-8, atol=1e-10)
    assert explainer.notes == ()
    for other in ("legrad", "grad_eclip"):
        maps = create_explainer(other, backbone).attribute(images, TARGET)
        assert maps.shape == (2, 1, 5, 6) and maps.isfinite().all() and maps.min() >= 0


def test_fullgrad_plus_adds_what_enters_each_later_block():
    backbone = tiny("class").double()
    images = photos(backbone)
    tokens = {}
    for base in ("fullgrad", "fullgrad_plus"):
        tokens[base] = create_explainer("libragrad", backbone, base=base).contributions(images, 3)[
            0
        ]
    later = tokens["fullgrad_plus"] - tokens["fullgrad"]
    expected = torch.zeros_like(later)
    for start in (1, 2):  # the rest of the network, on the tokens that enter it
        kept = []
        handle = backbone.model.blocks[start].register_forward_pre_hook(
            lambda m, args, kept=kept: kept.append(args[0])
        )
        backbone.logits(images)
        handle.remove()
        x = kept[0].detach().requires_grad_()
        z, m = x, backbone.model

        def norm(x, layer):
            centred = x - x.mean(-1, keepdim=True)
            deviation = (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt().detach()
            return centred / deviation * layer.weight + layer.bias

        for block in m.blocks[start:]:
            q, k, v = (
                block.attn.qkv(norm(z, block.norm1)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            )
            a = (q @ k.transpose(2, 3) * block.attn.scale).softmax(-1).detach()
            z = z + block.attn.proj((a @ v).transpose(1, 2).flatten(2))
            hidden = block.mlp.fc1(norm(z, block.norm2))
            z = z + block.mlp.fc2(hidden * (F.gelu(hidden) / hidden).detach())
        logits = m.head(norm(z, m.norm)[:, 0])
        grad = torch.autograd.grad(logits[:, 3].sum(), x)[0]
        expected += (x * grad).sum(2).detach()
    assert_equal(later, expected)


def test_on_a_cnn_of_relus_it_is_the_input_times_its_gradient():
    backbone = load_backbone("test_resnet", weights=None, num_classes=5, input_size=32).double()
    images = photos(backbone)
    x = backbone.normalize(images).requires_grad_()
    grad = torch.autograd.grad(backbone.logits_normalized(x)[:, 2].sum(), x)[0]
    options = {"base": "input_x_gradient", "at": "pixels"}
    got = create_explainer("libragrad", backbone, **options).attribute(images, 2)
    assert_equal(got, (x * grad).sum(1, keepdim=True).detach())


def test_a_mixer_without_attention_is_explained_too():
    model = MlpMixer(img_size=24, patch_size=8, num_classes=7, num_blocks=2, embed_dim=16)
    model.pretrained_cfg = {"input_size": (3, 24, 24)}
    backbone = load_backbone(model).double()
    images = photos(backbone)
    explainer = create_explainer("libragrad", backbone, base="fullgrad")
    tokens, elsewhere = explainer.contributions(images, TARGET)
    logits = backbone.logits(images).gather(1, TARGET[:, None])[:, 0]
    assert torch.allclose(tokens.sum(1) + elsewhere, logits)


# ---------------------------------------------------------------------- LeGrad


def attention_and_tokens(backbone, images, monkeypatch):
    """All A with their graph, the pool's last, from softmax written out; and each block's tokens."""
    kept, tokens = [], []

    def keep(x, dim):
        kept.append(torch.softmax(x, dim))  # a function mode looks the method up by name
        return kept[-1]

    monkeypatch.setattr(torch.Tensor, "softmax", keep)
    for m in backbone.model.modules():
        if hasattr(m, "fused_attn"):
            m.fused_attn = False
    handles = [
        block.register_forward_hook(lambda m, args, output: tokens.append(output))
        for block in backbone.model.blocks
    ]
    backbone.logits(images.clone().requires_grad_())
    for handle in handles:
        handle.remove()
    return kept, tokens


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [{}, {"pool": "model"}, {"layers": 1}], ids=str)
def test_legrad_equals_the_mean_positive_gradient_of_stored_attention(
    variant, options, monkeypatch
):
    backbone = tiny(variant).double()
    images = photos(backbone)
    explainer = create_explainer("legrad", backbone, **options)
    with monkeypatch.context() as patch:
        patch.setattr("xattn.attention.operators.base.TILE", 100)  # several chunks of rows
        got = explainer.attribute(images, TARGET)
    assert explainer.notes == ()
    kept, tokens = attention_and_tokens(backbone, images, monkeypatch)
    expected = torch.zeros(2, tokens[0].shape[1], dtype=torch.float64)
    for layer in range(3 - options.get("layers", 3), 3):
        z = tokens[layer]
        if options.get("pool") != "model" and variant != "pool":
            z = z.mean(1, keepdim=True).expand_as(z)
        logits = backbone.model.forward_head(backbone.model.norm(z))
        a = kept[-1] if variant == "pool" else kept[layer]
        grad = torch.autograd.grad(score_of(logits), a, retain_graph=True)[0]
        expected += grad.clamp_min(0).mean((1, 2))
    assert_equal(got, patches(expected, variant))


class Adapted(nn.Module):
    """A timm ViT behind the interface for other modules."""

    def __init__(self, model):
        super().__init__()
        self.model, self.blocks = model, model.blocks
        self.num_prefix_tokens = model.num_prefix_tokens

    def forward_taps(self, x):
        kept = []
        handle = self.model.norm.register_forward_hook(lambda m, a, o: kept.append(o))
        logits = self.model(x)
        handle.remove()
        tokens = kept[0][:, self.num_prefix_tokens :].mT
        return logits, [tokens.unflatten(2, GRID)]


def test_a_module_of_another_library_has_its_layers_classified_by_its_own_pass():
    stock = tiny().double()
    images = photos(stock)
    adapted = load_backbone(Adapted(stock.model), input_size=(12, 20)).double()
    maps = {}
    for name in ("legrad", "grad_eclip", "libragrad"):
        maps[name] = create_explainer(name, adapted).attribute(images, TARGET)
        # The adapter's own mean and standard deviation are those of the stock network.
        assert torch.equal(adapted.normalize(images), stock.normalize(images))
        assert_equal(maps[name], create_explainer(name, stock).attribute(images, TARGET))


def test_where_layers_have_no_classifier_the_last_score_stands_for_all():
    backbone = tiny()
    head = create_head("efficient_probe", backbone, classes=4, queries=4)
    explainer = create_explainer("legrad", probed(backbone, head))
    assert explainer.notes == ("the score of the last layer is used for all layers",)
    maps = explainer.attribute(photos(backbone, dtype=torch.float32), torch.tensor([3, 1]))
    assert maps.shape == (2, 1, *GRID) and maps.std() > 0


# ---------------------------------------------------------------------- Grad-ECLIP


@pytest.mark.parametrize("variant", VARIANTS)
def test_grad_eclip_equals_its_equation(variant, monkeypatch):
    backbone = tiny(variant).double()
    images = photos(backbone)
    model = backbone.model
    pool = getattr(model, "attn_pool", None)
    layer = pool if variant == "pool" else model.blocks[-1].attn
    kept = {}

    def keep(name, m, args, output):
        kept[name] = output
        if name == "proj":
            kept["o"] = args[0]

    for name in ("q", "kv", "qkv", "proj"):
        if isinstance(getattr(layer, name, None), nn.Module):
            getattr(layer, name).register_forward_hook(
                lambda m, args, output, name=name: keep(name, m, args, output)
            )
    logits = backbone.logits(images.clone().requires_grad_())
    w = torch.autograd.grad(score_of(logits), kept["o"])[0]
    if variant == "pool":
        q, (k, v) = kept["q"].expand(2, -1, -1), kept["kv"].chunk(2, 2)
    else:
        q, k, v = kept["qkv"].chunk(3, 2)
    read = READ.get(variant, list(range(PREFIX[variant], k.shape[1])))
    expected = torch.zeros(2, k.shape[1] - PREFIX[variant], dtype=torch.float64)
    for i in read:
        cosine = F.cosine_similarity(q[:, i, None], k[:, PREFIX[variant] :], dim=2)
        low, high = cosine.amin(1, keepdim=True), cosine.amax(1, keepdim=True)
        loosened = (cosine - low) / (high - low)
        expected += loosened * (v[:, PREFIX[variant] :] * w[:, i, None]).sum(2)
    monkeypatch.setattr("xattn.attention.operators.base.TILE", 100)
    explainer = create_explainer("grad_eclip", backbone)
    got = explainer.attribute(images, TARGET)
    assert_equal(got, expected.clamp_min(0).unflatten(1, GRID)[:, None].detach())
    assert bool(explainer.notes) == (len(read) > 1)


def test_grad_eclip_takes_rows_where_there_are_no_cosines():
    backbone = tiny(grid=(5, 5)).double()
    convert(backbone, "gna", [2], {"kernel": 3})
    assert create_explainer("grad_eclip", backbone).notes == (
        "layer 2: no cosines of queries and keys; scaled rows of A are used",
    )
    assert len(create_explainer("grad_eclip", backbone, layers=2).notes) == 1


# ---------------------------------------------------------------------- texts and functions


@pytest.fixture(scope="module")
def clip():
    pytest.importorskip("transformers")
    return xattn.load_clip(*pair("clip")).double()


TEXT = "a photo of a cat"


def test_grad_eclip_of_a_text_is_its_equation_with_the_similarity_as_score(clip):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    layer, kept = clip.model.blocks[-1].attn, {}
    handles = [
        layer.qkv.register_forward_hook(lambda m, args, output: kept.update(qkv=output)),
        layer.proj.register_forward_pre_hook(lambda m, args: kept.update(o=args[0])),
    ]
    similarity = scored(clip, TEXT).logits(images.clone().requires_grad_())
    for handle in handles:
        handle.remove()
    w = torch.autograd.grad(similarity.sum(), kept["o"])[0][:, :1]
    q, k, v = kept["qkv"].chunk(3, 2)
    cosine = F.cosine_similarity(q[:, :1], k[:, 1:], dim=2)
    low, high = cosine.amin(1, keepdim=True), cosine.amax(1, keepdim=True)
    expected = ((cosine - low) / (high - low) * (w * v[:, 1:]).sum(2)).clamp_min(0)
    got = create_explainer("grad_eclip", clip).attribute(images, TEXT)
    assert_equal(got, expected.unflatten(1, (4, 4))[:, None].detach())


def test_legrad_of_a_text_scores_every_layer_by_the_similarity(clip):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    view, model = scored(clip, TEXT), clip.model
    with block_outputs(model.blocks) as tokens, record(model) as calls:
        view.logits(images.clone().requires_grad_())
    expected = torch.zeros(2, 17, dtype=torch.float64)
    for z, call in zip(tokens, calls, strict=True):
        pooled = model.forward_head(model.norm(z.mean(1, keepdim=True).expand_as(z)))
        similarity = (F.normalize(pooled, dim=1) * clip.embed([TEXT])[0]).sum()
        dy = torch.autograd.grad(similarity, call.output, retain_graph=True)[0]
        expected += (dy @ call.value.mT).clamp_min(0).mean((1, 2))
    explainer = create_explainer("legrad", clip)
    got = explainer.attribute(images, TEXT)
    assert explainer.with_target(TEXT).notes == ()
    assert_equal(got, expected[:, None, 1:].unflatten(-1, (4, 4)))


@pytest.mark.parametrize("name", NAMES)
def test_a_function_that_picks_a_class_is_that_class(name):
    backbone = tiny().double()
    images = photos(backbone)
    explainer = create_explainer(name, backbone)
    assert_equal(explainer.attribute(images, lambda z: z[:, 3]), explainer.attribute(images, 3))


def test_contributions_are_also_of_a_difference_of_logits():
    backbone = tiny().double()
    images = photos(backbone)
    explainer = create_explainer("libragrad", backbone, base="fullgrad")
    tokens, elsewhere = explainer.contributions(images, lambda z: z[:, 3] - z[:, 1])
    logits = backbone.logits(images)
    assert torch.allclose(tokens.sum(1) + elsewhere, logits[:, 3] - logits[:, 1])


# ---------------------------------------------------------------------- all three


@pytest.mark.parametrize("name", NAMES)
def test_threads_get_the_maps_of_one(name):
    backbone = tiny()
    images = photos(backbone, 4, torch.float32)
    explainer = create_explainer(name, backbone)
    expected = [explainer.attribute(i[None], c) for c, i in enumerate(images)]
    found = {}

    def work(c):
        found[c] = explainer.attribute(images[c : c + 1], c)

    threads = [threading.Thread(target=work, args=(c,)) for c in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[c], expected[c]) for c in range(4))


def test_other_networks_are_refused_in_a_line():
    cnn = load_backbone("test_resnet", weights=None)
    with pytest.raises(ValueError, match=r"no list 'blocks' .*at='pixels', or use 'gradcam'"):
        create_explainer("libragrad", cnn)
    with pytest.raises(
        ValueError, match=r"layers: got 2; .*pools its tokens by attention.* give 1"
    ):
        create_explainer("grad_eclip", tiny("pool"), layers=2)
    explainer = create_explainer("libragrad", tiny(), base="input_x_gradient")
    with pytest.raises(ValueError, match=r"base: .*give base='fullgrad'"):
        explainer.contributions(torch.rand(1, 3, 12, 20), 0)
