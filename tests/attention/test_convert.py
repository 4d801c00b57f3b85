"""Converting timm ViTs: softmax keeps the logits, revert undoes it, unsuitable layers are refused."""

import copy

import pytest
import timm
import torch

from xattn.attention import (
    Conversion,
    Entry,
    Mechanism,
    SoftmaxOperator,
    conversion,
    convert,
    converted_copy,
    create_mechanism,
    list_attention,
    record,
    register_attention,
    revert,
)
from xattn.attention.base import MECHANISMS
from xattn.attention.model.spec import (
    describe,
    format_layers,
    format_mechanism,
    parse_layers,
    parse_mechanism,
)
from xattn.heads.mixer import Mixer

FAMILIES = {
    "vit_tiny_patch16_224": "class token",
    "deit_tiny_distilled_patch16_224": "distilled",
    "vit_small_patch14_reg4_dinov2": "registers",
    "vit_base_patch16_siglip_224": "none, pooled by attention",
    "vit_small_patch16_rope_224": "rotary",
    "eva02_tiny_patch14_224": "rotary, sub-norms, no key bias",
    "vit_small_patch16_dinov3": "rotary, registers",
    "vit_base_patch16_clip_224": "norm before the blocks",
    "vit_betwixt_patch16_reg4_gap_256": "registers, average pooling",
    "vit_wee_patch16_reg1_gap_256": "parallel or narrow attention",
    "vit_small_r26_s32_224": "convolutional stem",
    "flexivit_small": "flexible patches",
}


def model(name, **options):
    torch.manual_seed(0)
    size = {} if "r26" in name else {"img_size": 56 if "patch14" in name else 64}
    return timm.create_model(name, num_classes=5, **size, **{"depth": 2, **options}).eval()


def images(net):
    size = net.patch_embed.img_size if "r26" not in str(net.default_cfg) else (224, 224)
    return torch.randn(2, 3, *(size or (64, 64)), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_softmax_changes_no_logit_and_reverting_restores(name):
    net = model(name)
    x = images(net)
    before, names = net(x), list(net.state_dict())
    fused = [m.fused_attn for m in net.modules() if hasattr(m, "fused_attn")]
    assert convert(net, "softmax") is net
    assert torch.allclose(net(x), before, atol=1e-5)
    assert list(net.state_dict()) == names
    with record(net) as calls:
        net(x)
    square = [c for c in calls if c.operator.shape[2] == c.operator.shape[3]]
    assert len(square) == len(net.blocks)
    revert(net)
    assert torch.equal(net(x), before)
    assert not any(
        "Converted" in type(m).__name__ or hasattr(m, "mechanism") for m in net.modules()
    )
    assert [m.fused_attn for m in net.modules() if hasattr(m, "fused_attn")] == fused
    assert not net.patch_embed._forward_pre_hooks


@pytest.mark.parametrize(
    "name, options",
    [
        ("gna", {"kernel": 4}),
        ("dma", {"window": 16}),
        ("agent", {"agents": 16, "training_free": True}),
    ],
)
@torch.no_grad()
def test_the_mechanism_gets_the_layers_own_queries_grid_and_prefix(name, options):
    net = model("vit_small_patch14_reg4_dinov2", depth=3)
    x = images(net)
    with record(net) as before:
        net(x)
    convert(net, name, [0], options)
    with record(net) as after:
        logits = net(x)
    assert len(after) == 3
    own = net.blocks[0].attn.mechanism
    stock = before[0].operator
    q = stock.q * (stock.scale * stock.q.shape[-1] ** 0.5)
    with record() as alone:
        own(q, stock.k, before[0].value, net.patch_embed.grid_size, 5)
    assert torch.allclose(after[0].output, alone[0].output, atol=1e-5)
    assert after[0].operator.shape == before[0].operator.shape
    assert logits.isfinite().all()


@torch.no_grad()
def test_gna_and_dma_that_see_everything_leave_the_logits():
    net = model("vit_tiny_patch16_224", depth=2)
    x = images(net)
    before = net(x)
    convert(net, "gna", options={"kernel": 4})
    assert torch.allclose(net(x), before, atol=1e-5)
    convert(net, "dma", options={"window": 16})  # converted anew
    assert torch.allclose(net(x), before, atol=1e-5)


@torch.no_grad()
def test_a_converted_copy_shares_all_weights_and_leaves_the_model():
    net = model("vit_tiny_patch16_224", depth=2)
    x = images(net)
    before, shared = net(x), {name: p.data_ptr() for name, p in net.named_parameters()}
    expected = convert(copy.deepcopy(net), "gna", options={"kernel": 3})(x)
    other = converted_copy(net, "gna", options={"kernel": 3})
    assert torch.equal(other(x), expected) and not torch.equal(expected, before)
    assert {name: p.data_ptr() for name, p in other.named_parameters()} == shared
    assert torch.equal(net(x), before) and not net.patch_embed._forward_pre_hooks
    assert not any(hasattr(m, "mechanism") for m in net.modules())


@torch.no_grad()
def test_grids_follow_the_image():
    net = model("vit_tiny_patch16_224", depth=2, dynamic_img_size=True)
    convert(net, "gna", options={"kernel": 2})
    for size in ((64, 96), (96, 64), (64, 64)):
        with record(net) as calls:
            net(torch.randn(1, 3, *size))
        assert calls[0].maps["received"].shape[2:] == (size[0] // 16, size[1] // 16)


def test_it_trains_copies_and_keeps_its_weights_apart():
    net = model("vit_tiny_patch16_224", depth=2)
    convert(net, "dma", [-1], {"window": 8})
    assert [n for n in net.state_dict() if "mechanism" in n] == [
        "blocks.1.attn.mechanism.a",
        "blocks.1.attn.mechanism.score.weight",
    ]
    net.train()
    net(images(net)).square().sum().backward()
    assert net.blocks[1].attn.mechanism.a.grad.abs().sum() > 0
    assert net.blocks[1].attn.qkv.weight.grad.abs().sum() > 0
    net.eval()
    twin = copy.deepcopy(net)
    before = net(images(net))
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(net(images(net)), before) and (twin(images(net)) == 0).all()


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "swin_tiny_patch4_window7_224",
            "^mechanism: SwinTransformer .*timm ViT, such as -b vit_tiny_",
        ),
        ("cait_xxs24_224", r"blocks.0.attn \(TalkingHeadAttn\) does not use fused attention"),
        ("vit_relpos_small_patch16_224", r"blocks.0.attn \(RelPosAttention\) adds a bias or mask"),
        ("resnet18", "^mechanism: ResNet has no list of blocks with attention; a mechanism needs"),
    ],
)
def test_models_that_cannot_be_converted_are_named_and_untouched(name, message):
    net = timm.create_model(name, num_classes=5).eval()
    names = list(net.state_dict())
    with pytest.raises(ValueError, match=message):
        convert(net, "gna")
    assert list(net.state_dict()) == names
    assert not any("Converted" in type(m).__name__ for m in net.modules())


def test_dropping_attention_weights_is_refused_in_training():
    net = model("vit_tiny_patch16_224", depth=1, attn_drop_rate=0.1)
    convert(net, "gna", options={"kernel": 2})
    net(images(net))
    with pytest.raises(ValueError, match="at random, which gna cannot do; set its attn_drop to 0"):
        net.train()(images(net))


def test_a_scale_of_the_layers_own_is_kept():
    q, k, v = torch.randn(3, 1, 2, 9, 16, generator=torch.Generator().manual_seed(0))
    layer = create_mechanism("softmax", 32, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.1)
    assert torch.allclose(layer(q, k, v, scale=0.1), expected, atol=1e-6)


@torch.no_grad()
def test_a_backbone_is_converted_inside_and_still_gives_its_taps():
    from xattn import load_backbone

    backbone = load_backbone("vit_tiny_patch16_224", weights=None, input_size=64)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = backbone(x)
    assert convert(backbone, "softmax") is backbone
    after = backbone(x)
    assert torch.allclose(after.logits, before.logits, atol=1e-5)
    for found, expected in zip(after.maps, before.maps, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    convert(backbone, "gna", options={"kernel": 2})
    assert not torch.allclose(backbone(x).logits, before.logits, atol=1e-5)
    assert revert(backbone) is backbone
    assert torch.equal(backbone(x).logits, before.logits)


@pytest.mark.parametrize(
    "name, options, batch",
    [
        ("softmax", {}, 2),
        ("gna", {"kernel": 3, "backend": "cpu"}, 2),
        ("dma", {"window": 8}, 2),
        ("agent", {"agents": 4, "training_free": True}, 1),
        ("agent", {"agents": 4, "training_free": True}, 2),
        ("spatten", {"first": 1, "last": 1}, 2),
    ],
)
def test_a_converted_model_compiles_as_one_graph(name, options, batch):
    net = model("vit_tiny_patch16_224")
    convert(net, name, options=options)
    x = images(net)[:batch]
    expected = net(x)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-5)


def test_masks_and_dropped_patches_are_refused_not_ignored():
    net = model("vit_tiny_patch16_224")
    convert(net, "softmax")
    with pytest.raises(ValueError, match="passes a mask, which softmax cannot do; leave out"):
        net(images(net), attn_mask=torch.zeros(1, 1, 17, 17))
    net = model("vit_tiny_patch16_224", patch_drop_rate=0.75)
    convert(net, "gna", options={"kernel": 2})
    net(images(net))
    with pytest.raises(ValueError, match="no patch dropping"):
        net.train()(images(net))
    convert(net, "dma", options={"window": 2})
    net.train()(images(net))  # needs no grid


@torch.no_grad()
def test_a_converted_layer_attends_by_its_mechanism_whatever_the_flag_says():
    net = model("vit_tiny_patch16_224")
    for block in net.blocks:
        block.attn.fused_attn = False
    with record(net) as calls:
        convert(net, "gna", options={"kernel": 2})
        assert calls == []  # the probe is nobody's business
        expected = net(images(net))
    assert torch.equal(net(images(net)), expected)
    assert not any(block.attn.fused_attn for block in net.blocks)
    revert(net)
    assert not any(block.attn.fused_attn for block in net.blocks)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("gnaa", {}, "name: unknown attention 'gnaa'; did you mean gna"),
        ("gna", {"size": 3}, "options: gna does not take that option"),
        ("gna", {"kernel": 9}, "kernel, dilation: got 9"),
        ("gna", {"kernel": 2.5}, "kernel: got 2.5; give an int or a list"),
        ("gna", {"kernel": 2, "backend": "cup"}, "backend: got 'cup'"),
        ("dma", {"window": "3"}, "window: got '3'"),
        ("agent", {"window": 14}, "window: got 14; give"),
    ],
)
@torch.no_grad()
def test_options_that_do_not_fit_leave_the_model_as_it_was(name, options, message):
    net = model("vit_tiny_patch16_224")
    before = net(images(net))
    with pytest.raises(ValueError, match=message):
        convert(net, name, options=options)
    assert torch.equal(net(images(net)), before) and not net.patch_embed._forward_pre_hooks
    convert(net, "gna", options={"kernel": 2})
    mine, before = net.blocks[0].attn.mechanism, net(images(net))
    with pytest.raises(ValueError, match=message):
        convert(net, name, options=options)
    assert net.blocks[0].attn.mechanism is mine and torch.equal(net(images(net)), before)


def test_attention_over_channels_is_no_attention_over_tokens():
    net = timm.create_model("xcit_nano_12_p16_224", num_classes=5).eval()
    with pytest.raises(ValueError, match=r"blocks.0.attn \(XCA\) .*nothing"):
        convert(net, "softmax")


# ---------------------------------------------------------------- layers, options, the record


@pytest.mark.parametrize(
    "layers, expected",
    [("1", [1]), ("0-1", [0, 1]), ("0,2", [0, 2]), ([0, -1], [0, 2]), (None, [0, 1, 2])],
)
def test_layers_are_numbers_or_a_text_of_them(layers, expected):
    net = convert(model("vit_tiny_patch16_224", depth=3), "gna", layers, {"kernel": 2})
    assert [i for i, b in enumerate(net.blocks) if hasattr(b.attn, "mechanism")] == expected


@pytest.mark.parametrize(
    "layers, message",
    [
        ("-1", 'got .-1.; give numbers and ranges, such as "4-11" or "0,3,8-11"'),
        ("2-0", "got .2-0."),
        ("0-", "got .0-."),
        ("", "got ..;"),
        ("0-3", "layers: got 3, but VisionTransformer has blocks 0 to 2"),
        ([-4], "layers: got -4"),
        ([True and "a"], "layers: got 'a'"),
        ([], "layers: got none"),
    ],
)
def test_layers_of_another_form_are_refused(layers, message):
    net = model("vit_tiny_patch16_224", depth=3)
    with pytest.raises(ValueError, match=message):
        convert(net, "softmax", layers)
    assert conversion(net) is None


def test_a_model_knows_its_conversion_through_copies_pickles_and_revert(tmp_path):
    net = model("vit_tiny_patch16_224", depth=4)
    assert conversion(net) is None and conversion(torch.nn.Linear(2, 2)) is None
    convert(net, "gna", "0-2", {"kernel": 2, "backend": "cpu"})
    convert(net, "dma", [1], {"window": 4})
    expected = [Conversion("gna", (0, 2), {"kernel": 2}), Conversion("dma", (1,), {"window": 4})]
    assert conversion(net) == expected
    assert describe(expected) == "gna:kernel=2 in layers 0,2 and dma:window=4 in layers 1"
    torch.save(net, tmp_path / "net.pt")
    for twin in (copy.deepcopy(net), torch.load(tmp_path / "net.pt", weights_only=False)):
        assert conversion(twin) == expected
        assert torch.equal(twin(images(net)), net(images(net)))
    with pytest.raises(ValueError):
        convert(net, "gna", options={"kernel": 99})
    assert conversion(net) == expected
    assert conversion(revert(net)) is None
    assert not any("mechanism_options" in vars(m) for m in net.modules())


@pytest.mark.parametrize(
    "text, name, options",
    [
        ("softmax", "softmax", {}),
        ("gna:kernel=7,causal=[true,false]", "gna", {"kernel": 7, "causal": [True, False]}),
        ('x:a="7",b=c d', "x", {"a": "7", "b": "c d"}),
        ("hedgehog:feature=elu", "hedgehog", {"feature": "elu"}),
        ("agent:agents=49,training_free=true", "agent", {"agents": 49, "training_free": True}),
    ],
)
def test_mechanisms_are_read_and_written_in_one_form(text, name, options):
    assert parse_mechanism(text) == (name, options)
    assert format_mechanism(name, options) == text
    record = Conversion(name, (0, 1, 3), options).record()
    assert Conversion.of_record(record) == Conversion(name, (0, 1, 3), options)


def test_bad_texts_of_mechanisms_and_records_are_named():
    with pytest.raises(
        ValueError, match="mechanism: got 'kernel' in 'gna:kernel'; write NAME:option"
    ):
        parse_mechanism("gna:kernel")
    with pytest.raises(ValueError, match="mechanism: got kernel twice"):
        parse_mechanism("gna:kernel=5,kernel=7")
    for bad in (None, {}, {"mechanism": 1, "layers": "0", "options": {}}):
        with pytest.raises(ValueError, match="conversion: got"):
            Conversion.of_record(bad)
    assert parse_layers(format_layers([5, 0, 1])) == [0, 1, 5]


# ---------------------------------------------------------------- the layer's tokens, causal calls, shared keys


class GatedByTokens(Mechanism):
    """Softmax whose output is scaled by what the layer reads."""

    reads = ("tokens",)

    def operator(self, inputs):
        assert inputs.x is not None
        self.seen = inputs
        return SoftmaxOperator(inputs.q, inputs.k, inputs.scale, causal=inputs.causal)


class Causal(torch.nn.Module):
    """Attention of a small causal model; of its heads, two share a key head."""

    def __init__(self, kv_heads=2):
        super().__init__()
        self.num_heads, self.head_dim, self.kv_heads, self.fused_attn = 4, 8, kv_heads, True
        self.qkv = torch.nn.Linear(32, 8 * (4 + 2 * kv_heads))
        self.proj = torch.nn.Linear(32, 32)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (-1, 8)).transpose(1, 2)
        q, k, v = qkv.split((4, self.kv_heads, self.kv_heads), 1)
        y = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.kv_heads != 4
        )
        return self.proj(y.transpose(1, 2).flatten(2))


class CausalModel(torch.nn.Module):
    def __init__(self, kv_heads=2):
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed = torch.nn.Conv2d(3, 32, 8, stride=8)
        self.blocks = torch.nn.ModuleList()
        for _ in range(2):
            block = torch.nn.Module()
            block.attn = Causal(kv_heads)
            self.blocks.append(block)
        self.pretrained_cfg = {"input_size": (3, 32, 32)}

    def forward(self, x):
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = tokens + block.attn(tokens)
        return tokens


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "name, options", [("softmax", {}), ("gna", {"kernel": 16}), ("dma", {"window": 16})]
)
@torch.no_grad()
def test_causal_models_convert_to_the_causal_form_whatever_the_key_heads(name, options, kv_heads):
    net = CausalModel(kv_heads).eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = net(x)
    convert(net, name, options=options)
    assert torch.allclose(net(x), expected, atol=1e-5)
    with record(net) as calls:
        net(x)
    assert all(call.operator.causal for call in calls)


def test_a_mechanism_without_a_causal_form_is_refused_for_a_causal_model():
    net = CausalModel()
    with pytest.raises(ValueError, match="attends causally, so agent cannot replace it; nothing"):
        convert(net, "agent", options={"agents": 4, "window": (4, 4)})
    assert conversion(net) is None
    net = model("vit_tiny_patch16_224")
    convert(net, "agent", options={"agents": 4, "training_free": True})
    with pytest.raises(
        ValueError, match="asks for causal attention, which agent cannot do; leave out"
    ):
        net(images(net), is_causal=True)
    revert(net)
    expected = net(images(net), is_causal=True)
    convert(net, "softmax")
    assert torch.allclose(net(images(net), is_causal=True), expected, atol=1e-5)


@torch.no_grad()
def test_the_mechanism_gets_what_the_layer_reads():
    register_attention("tokens", paper="", complexity="", causal=True, grouped=True)(GatedByTokens)
    try:
        net = model("vit_tiny_patch16_224")
        x, read = images(net), []
        net.blocks[1].attn.register_forward_pre_hook(lambda m, a: read.append(a[0]))
        expected = net(x)
        convert(net, "tokens", [1])
        assert torch.allclose(net(x), expected, atol=1e-5)
        assert torch.equal(net.blocks[1].attn.mechanism.seen.x, read[-1])
    finally:
        MECHANISMS.remove("tokens")


class Numbered(Mechanism):
    """Softmax attention that leaves its number for later layers."""

    def __init__(self, dim, num_heads, layer=0, *, backend="auto"):
        super().__init__(dim, num_heads, backend=backend)
        self.layer, self.found = layer, None

    def operator(self, inputs):
        if inputs.carried is not None:
            self.found = sorted(inputs.carried)
            inputs.carried[self.layer] = inputs.q
        return SoftmaxOperator(inputs.q, inputs.k, inputs.scale)


@pytest.fixture
def numbered():
    register_attention("numbered", paper="", complexity="")(Numbered)
    yield
    MECHANISMS.remove("numbered")


@torch.no_grad()
def test_layers_know_their_number_and_what_earlier_ones_of_the_pass_left(numbered):
    net = model("vit_tiny_patch16_224", depth=4)
    x = images(net)
    convert(net, "numbered", [1, 2])
    convert(net, "numbered", [3], {"layer": 7})
    made = [block.attn.mechanism for block in list(net.blocks)[1:]]
    assert [m.layer for m in made] == [1, 2, 7]
    for _ in range(2):
        net(x)
        assert [m.found for m in made] == [[], [1], [1, 2]]
    copied = copy.deepcopy(net)
    assert torch.equal(copied(x), net(x))
    assert copied.blocks[3].attn.mechanism.found == [1, 2]
    assert conversion(net)[0] == Conversion("numbered", (1, 2), {})


def test_a_layer_on_its_own_has_no_earlier_ones(numbered):
    alone = create_mechanism("numbered", 8, 2)
    alone(*torch.randn(3, 1, 2, 5, 4))
    assert (alone.layer, alone.found) == (0, None)
    head = Mixer("numbered", 8, 3, {"num_heads": 2})
    assert [layer.mechanism.layer for layer in head.layers] == [0, 1, 2]


class Shorter(Numbered):
    """Softmax attention that leaves the last token out of its blocks."""

    def operator(self, inputs):
        return SoftmaxOperator(inputs.q, inputs.k, inputs.scale)

    def enter(self, x, prefix, carried, whole):
        carried[self.layer] = x, whole
        self.seen = x.shape[1], prefix, whole
        return x if whole else x[:, :-1]

    def leave(self, x, carried):
        before, whole = carried.pop(self.layer)
        return torch.cat([x[:, :-1] if whole else x, before[:, -1:]], 1)


@pytest.fixture
def shorter():
    register_attention("shorter", paper="", complexity="")(Shorter)
    yield
    MECHANISMS.remove("shorter")


@torch.no_grad()
def test_a_mechanism_may_change_the_tokens_that_a_block_computes_on(shorter):
    net = model("vit_tiny_patch16_224", depth=3)
    convert(net, "shorter", [1])
    x, sizes, outputs = images(net), [], []
    block = net.blocks[1]
    before = block.register_forward_pre_hook(lambda m, a: sizes.append(a[0].shape[1]))
    after = block.register_forward_hook(lambda m, a, y: outputs.append(y))
    inputs = net.blocks[0].register_forward_hook(lambda m, a, y: outputs.append(y))
    net(x)
    assert block.attn.mechanism.seen == (17, 1, False) and sizes == [16]
    into, out = outputs
    assert out.shape == into.shape and torch.equal(out[:, -1], into[:, -1])
    assert not torch.equal(out[:, 0], into[:, 0])
    # Whoever looks inside sees all tokens.
    with record(net) as calls:
        net(x)
    assert block.attn.mechanism.seen == (17, 1, True) and calls[1].operator.shape[2] == 17
    handle = block.norm1.register_forward_hook(lambda m, a, y: None)
    net(x)
    assert block.attn.mechanism.seen[2]
    for hook in (handle, before, after, inputs):
        hook.remove()
    revert(net)
    assert not block._forward_hooks and not block._forward_pre_hooks


@torch.no_grad()
def test_a_block_that_gets_rotary_angles_computes_on_all_tokens(shorter):
    net = model("vit_small_patch16_rope_224")
    convert(net, "shorter", [1])
    net(images(net))
    assert net.blocks[1].attn.mechanism.seen[2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"options": "kernel=7"}, "options: got 'kernel=7'; give a dict"),
        ({"layers": 3}, "layers: got 3; give a list"),
        ({"options": {"num_heads": 3}}, "options: gna does not take that option .num_heads"),
        ({"options": {"name": "x"}}, "options: gna does not take that option .name"),
    ],
)
def test_arguments_of_another_kind_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert(model("vit_tiny_patch16_224"), "gna", **arguments)


def test_a_class_that_is_not_registered_converts_under_its_own_name():
    class Flat(Mechanism):
        entry = Entry("flat", "a test", "N^2 D")

        def __init__(self, dim, num_heads, sharp=0.0):
            super().__init__(dim, num_heads)
            self.sharp = sharp

        def operator(self, inputs):
            return SoftmaxOperator(inputs.q, inputs.k, self.sharp)

    model = timm.create_model("test_vit", num_classes=3).eval()
    twin = converted_copy(model, Flat, "0", {"sharp": 0.0})
    assert conversion(twin) == [("flat", (0,), {"sharp": 0.0})] and conversion(model) is None
    images = torch.rand(2, 3, 160, 160)
    with record(twin) as calls:
        twin(images)
    assert torch.allclose(calls[0].operator.rows(torch.tensor([3])), torch.tensor(1 / 101))
    assert not torch.allclose(calls[1].operator.rows(torch.tensor([3])), torch.tensor(1 / 101))
    assert "flat" not in list_attention()
