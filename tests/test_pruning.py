"""Pruned ViTs: sliced layers equal those whose other heads add nothing; folders load as they were written."""

import copy
import json
import pickle
import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_transformers import VARIANTS, photos, tiny

from xattn.attention import convert, record, revert
from xattn.backbone import load_backbone, sha256
from xattn.backbone.pruning import (
    PRUNED_FILE,
    WEIGHTS_FILE,
    Pruning,
    RoutedBlock,
    SingleHeadBlock,
    pruned,
    pruned_folder,
    pruning_of,
    read_pruned,
    save_pruned,
)
from xattn.explainers import create_explainer
from xattn.training.pruning_run import only_heads

SHRP = Pruning("shrp", {2: (1,)}, 12)


def heads(**kept):
    return Pruning("heads", {int(k[1:]): v for k, v in kept.items()})


# ---------------------------------------------------------------- slicing


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "qkv_bias": False}, {"init_values": 0.3}]
)
def test_a_sliced_layer_is_the_layer_whose_other_heads_add_nothing(variant, options):
    backbone = tiny(variant, **options)
    model, x = backbone.model, photos(backbone, dtype=torch.float32)
    before = sha256(model)
    found = pruned(model, heads(b1=(1,), b2=(0,)))
    with only_heads(model.blocks[1].attn, [1]), only_heads(model.blocks[2].attn, [0]):
        expected = model(x)
    assert torch.allclose(found(x), expected, atol=1e-5)
    assert not torch.allclose(model(x), expected, atol=1e-3)
    assert sha256(model) == before and pruning_of(model) is None
    assert found.blocks[1].attn.qkv.weight.shape == (24, 16)
    assert found.blocks[1].attn.proj.weight.shape == (16, 8)
    assert found.blocks[0].attn.qkv.weight is model.blocks[0].attn.qkv.weight


def test_keeping_every_head_changes_nothing_and_their_order_does_not_matter():
    backbone = tiny(num_heads=4)
    model, x = backbone.model, photos(backbone, dtype=torch.float32)
    assert torch.equal(pruned(model, heads(b0=(0, 1, 2, 3), b2=(0, 1, 2, 3)))(x), model(x))
    one, two = (pruned(model, heads(b1=kept))(x) for kept in ((3, 0), (0, 3)))
    assert torch.allclose(one, two, atol=1e-5)


def test_a_model_of_one_head_keeps_it():
    backbone = tiny(num_heads=1)
    x = photos(backbone, dtype=torch.float32)
    assert torch.equal(pruned(backbone.model, heads(b2=(0,)))(x), backbone.model(x))


def test_shrp_is_one_head_and_its_mlp():
    backbone = tiny()
    model, x = pruned(backbone.model, SHRP), photos(backbone, dtype=torch.float32)
    block, whole = model.blocks[2], backbone.model.blocks[2]
    assert isinstance(block, SingleHeadBlock)
    assert (
        sum(p.numel() for p in block.parameters()) == 2 * 16 + 3 * 8 * 17 + 2 * 8 + 12 * 9 + 16 * 13
    )
    tokens = torch.randn(2, 16, 16)
    assert torch.equal(block(tokens), tokens), "E is zero at first"
    torch.nn.init.normal_(block.attn.proj.fc2.weight)
    n = whole.norm1(tokens)
    q, k, v = whole.attn.qkv(n).unflatten(-1, (3, 2, 8))[..., 1, :].unbind(2)
    o = (q @ k.mT / 8**0.5).softmax(-1) @ v
    assert torch.allclose(block(tokens), tokens + block.attn.proj(o), atol=1e-5)
    assert model(x).shape == (2, 7)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_routed_block_whose_router_settled_is_its_pruned_block(count):
    block = tiny(num_heads=count).model.blocks[1]
    made = RoutedBlock(block, 12).double()
    torch.nn.init.normal_(made.attn.proj.expander.fc2.weight)
    tokens = torch.randn(3, 11, 16, dtype=torch.float64)
    routed = made.eval()(tokens)
    chosen = made.choice.chosen.tolist()
    for i, head in enumerate(chosen):
        own = made.pruned(head)(tokens[i : i + 1])
        assert torch.allclose(routed[i : i + 1], own, atol=1e-12)
    head = made.router.settle(count - 1)
    assert torch.allclose(made(tokens), made.pruned(head)(tokens), atol=1e-12)
    assert sum(p.numel() for p in made.pruned(0).parameters()) < sum(
        p.numel() for p in made.parameters()
    )


def test_gradients_of_a_routed_block_reach_the_router_and_one_head():
    made = RoutedBlock(tiny().model.blocks[1].requires_grad_(True), 12)
    torch.nn.init.normal_(made.attn.proj.expander.fc2.weight)
    made(torch.randn(1, 9, 16)).square().sum().backward()
    assert made.router.linear.weight.grad.abs().sum() > 0
    by_head = made.attn.qkv.weight.grad.unflatten(0, (3, 2, 8)).abs().sum((0, 2, 3))
    assert (by_head > 0).tolist() == [i == int(made.choice.chosen) for i in range(2)]


# ---------------------------------------------------------------- a pruned network in use


@pytest.mark.parametrize("pruning", [heads(b1=(1,)), heads(b0=(0,), b2=(1,)), SHRP], ids=str)
def test_attention_of_a_pruned_network_is_recorded_explained_and_converted(pruning):
    model = pruned(tiny(grid=(4, 4)).model, pruning)
    if pruning.method == "shrp":
        torch.nn.init.normal_(model.blocks[2].attn.proj.fc2.weight, std=0.3)
    backbone = load_backbone(model, taps=["norm1.1", "norm1.2"])
    x = photos(backbone, dtype=torch.float32)
    with record(backbone.model) as calls:
        logits = backbone.logits(x)
    counts = [1 if i in pruning.layers else 2 for i in range(3)]
    assert [call.operator.shape[1] for call in calls] == counts
    for name in ("rollout", "raw_attention", "generic_relevance", "attn_lrp", "gradcam"):
        found = create_explainer(name, backbone).attribute(x, target=torch.tensor([3, 6]))
        assert torch.isfinite(found).all() and found.abs().sum() > 0
    if pruning.method == "heads":
        assert torch.isfinite(create_explainer("cam", backbone).attribute(x, target=3)).all()
    else:
        with pytest.raises(ValueError, match="SingleHeadBlock"):
            create_explainer("cam", backbone)
    model = convert(copy.deepcopy(backbone.model), "gna", options={"kernel": 3})
    assert not torch.allclose(model(x), logits)
    assert torch.equal(revert(model)(x), backbone.model(x))
    again = pickle.loads(pickle.dumps(backbone.model))
    assert torch.equal(again(x), backbone.model(x)) and pruning_of(again) == pruning


def test_half_precision_and_compile():
    backbone = tiny()
    for pruning in (heads(b2=(1,)), SHRP):
        model, x = pruned(backbone.model, pruning), photos(backbone, dtype=torch.float32)
        found = copy.deepcopy(model).bfloat16()(x.bfloat16()).float()
        assert (found - model(x)).abs().max() < 0.1 * model(x).abs().max()
    assert torch.allclose(torch.compile(model, backend="eager")(x), model(x), atol=1e-6)


# ---------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def whole():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5, img_size=64)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return load_backbone(model, input_size=64)


def saved(whole, folder, pruning):
    model = pruned(whole.model, pruning)
    shown = {"input_size": [3, 64, 64], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]}
    shown |= {"interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
    return model, save_pruned(
        folder,
        model.state_dict(),
        {
            "backbone": {"name": "test_vit", "sha256": whole.fingerprint},
            "pruning": pruning.record(),
            "sha256": sha256(model),
            "num_classes": 5,
            "preprocessing": shown,
        },
    )


@pytest.mark.parametrize(
    "pruning", [heads(b4=(1,), b5=(0,)), Pruning("shrp", {5: (1,)}, 9)], ids=str
)
def test_a_folder_is_the_network_that_was_saved(whole, tmp_path, pruning):
    model, folder = saved(whole, tmp_path / "net", pruning)
    x = torch.rand(2, 3, 64, 64)
    for weights in (folder, str(folder), folder / WEIGHTS_FILE):
        found = load_backbone("test_vit", weights)
        assert found.fingerprint == sha256(model) and found.num_classes == 5
        assert torch.equal(found.model(x), model(x)) and pruning_of(found.model) == pruning
        assert found.preprocessing.mean == (0.4, 0.5, 0.6)
        assert found.preprocessing.input_size == (64, 64)
    larger = load_backbone("test_vit", folder, input_size=96)
    assert larger.logits(torch.rand(1, 3, 96, 96)).shape == (1, 5)
    assert Pruning.of_record(json.loads(json.dumps(pruning.record()))) == pruning
    assert read_pruned(folder).pruning == pruning
    assert pruned_folder(folder.parent) is None and pruned_folder(None) is None
    assert pruned_folder("timm") is None


def test_a_folder_of_another_network_or_a_damaged_one_is_refused(whole, tmp_path):
    _, folder = saved(whole, tmp_path / "net", heads(b5=(0,)))
    for name in ("vit_tiny_patch16_224", "tf_efficientnet_lite0"):
        with pytest.raises(ValueError, match=f"pruned from test_vit, not {name}; give -b test_vit"):
            load_backbone(name, folder)
    with pytest.raises(ValueError, match="num_classes: got 7, .* has 5 classes; leave it out"):
        load_backbone("test_vit", folder, num_classes=7)
    with pytest.raises(ValueError, match="is a folder; name a weight file .* xattn prune wrote"):
        load_backbone("test_vit", tmp_path)
    text = (folder / PRUNED_FILE).read_text()
    good = json.loads(text)
    for change in (
        {"format": 2},
        {"pruning": {"method": "heads"}},
        {"pruning": {**good["pruning"], "method": "tails"}},
        {"pruning": {**good["pruning"], "kept": {"5": ["a"]}}},
        {"pruning": {**good["pruning"], "kept": []}},
        {"num_classes": "5"},
        {"backbone": []},
        {"preprocessing": {**good["preprocessing"], "input_size": [3, 0, 64]}},
        {"preprocessing": {**good["preprocessing"], "mean": ["x"]}},
    ):
        (folder / PRUNED_FILE).write_text(json.dumps({**good, **change}))
        with pytest.raises(
            ValueError, match="weights: .* is not the record of a pruned network"
        ) as error:
            load_backbone("test_vit", folder)
        assert "\n" not in str(error.value)
    for layers, kept in (("9", {"9": [0]}), ("5", {"5": [7]}), ("5", {"5": []})):
        changed = {**good, "pruning": {**good["pruning"], "layers": layers, "kept": kept}}
        (folder / PRUNED_FILE).write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="weights: .* does not fit test_vit"):
            load_backbone("test_vit", folder)
    (folder / PRUNED_FILE).write_text(text[:50])
    with pytest.raises(ValueError, match="weights: .* is damaged"):
        load_backbone("test_vit", folder)
    (folder / PRUNED_FILE).write_text(text)
    state = load_file(folder / WEIGHTS_FILE)
    state["head.bias"][0] += 1
    save_file(state, folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="was changed or damaged after it was written"):
        load_backbone("test_vit", folder)
    (folder / PRUNED_FILE).unlink()
    with pytest.raises(ValueError, match="is not empty and was not written by xattn"):
        saved(whole, folder, heads(b5=(0,)))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "pruning, message",
    [
        (heads(b2=()), "keep: got heads [] in block 2; give different heads from 0 to 1"),
        (heads(b2=(2,)), "keep: got heads [2] in block 2"),
        (heads(b2=(0, 0)), "keep: got heads [0, 0] in block 2"),
        (heads(b3=(0,)), "layers: got 3, but VisionTransformer has blocks 0 to 2"),
        (heads(), "layers: got none"),
        (Pruning("shrp", {2: (0, 1)}, 12), "keep: got 2; shrp keeps a single head, so give 1"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(pruning, message):
    model = tiny().model
    before = sha256(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        pruned(model, pruning)
    assert sha256(model) == before


@pytest.mark.parametrize(
    "name, message",
    [
        ("resnet18", "ResNet has no list of blocks with attention; choose a timm ViT"),
        ("vit_relpos_small_patch16_224", "(RelPosAttention) does not run with fewer heads"),
        (
            "vit_relpos_base_patch32_plus_rpn_256",
            "(ResPostRelPosBlock) does not normalise its input",
        ),
        ("beit_base_patch16_224", "blocks.11.attn (Attention)"),
        ("mixer_s32_224", "no attention"),
        ("xcit_nano_12_p16_224", "XCA"),
        ("eva02_tiny_patch14_224", "blocks.11.attn (EvaAttention)"),
    ],
)
def test_models_that_cannot_be_pruned_are_named(name, message):
    with torch.device("meta"):
        model = timm.create_model(name)
    blocks = getattr(model, "blocks", [None])
    with pytest.raises(ValueError, match=re.escape(message)):
        pruned(model, Pruning("heads", {len(blocks) - 1: (0,)}))


def test_a_converted_or_pruned_network_is_refused():
    backbone = tiny()
    with pytest.raises(ValueError, match="backbone: its attention is converted"):
        pruned(convert(copy.deepcopy(backbone.model), "softmax"), heads(b2=(0,)))
    with pytest.raises(ValueError, match="backbone: it is already pruned"):
        pruned(pruned(backbone.model, heads(b1=(0,))), heads(b2=(0,)))
