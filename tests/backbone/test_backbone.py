"""The backbone equals ``model(x)`` in one pass, for every kind of timm network."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from xattn import Preprocessing, load_backbone
from xattn.backbone import sha256

# (name, input size or None for the default): small inputs keep the sweep short.
ARCHITECTURES = [
    *[
        (name, 64)
        for name in (
            "resnet10t resnet18 resnetv2_50 resnext50_32x4d regnetx_002 regnety_002 densenet121 "
            "mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small_050 "
            "tf_efficientnet_lite0 efficientnet_b0 efficientnetv2_rw_t test_efficientnet test_resnet "
            "test_convnext ghostnet_100 mnasnet_small fbnetc_100 convnext_atto convnextv2_atto dla34 "
            "res2net50_14w_8s repvgg_a0 rexnet_100 semnasnet_075 nf_regnet_b0 "
            "cspresnet50 darknet53 tinynet_e lcnet_035 poolformer_s12 pvt_v2_b0 mobilevit_xxs "
            "edgenext_xx_small fastvit_t8 repvit_m0_9 starnet_s1 inception_next_atto caformer_s18 "
            "mambaout_femto davit_tiny"
        ).split()
    ],
    ("test_vit", None),
    ("vit_tiny_patch16_224", 64),
    ("deit_tiny_distilled_patch16_224", 64),
    ("vit_small_patch14_reg4_dinov2", 70),
    ("eva02_tiny_patch14_224", 70),
    ("vit_small_patch16_rope_224", 64),
    ("cait_xxs24_224", 64),
    ("swin_tiny_patch4_window7_224", None),
    ("levit_128s", None),
    ("mixer_s32_224", None),
    ("resmlp_12_224", None),
    ("visformer_tiny", None),
]

# (name, input size, prefix tokens)
VITS = [
    ("vit_srelpos_small_patch16_224", 64, 0),
    ("test_vit", None, 1),
    ("deit_tiny_distilled_patch16_224", 64, 2),
    ("vit_small_patch14_reg4_dinov2", 70, 5),
]


def images(backbone, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, *backbone.preprocessing.input_size, generator=generator)


@pytest.mark.parametrize(("name", "size"), ARCHITECTURES, ids=lambda v: str(v))
@torch.no_grad()
def test_one_pass_gives_the_models_logits_and_4d_maps(name, size):
    backbone = load_backbone(name, weights=None, input_size=size)
    x = images(backbone)
    taps = backbone(x)
    expected = backbone.model(backbone.normalize(x))
    torch.testing.assert_close(taps.logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backbone.logits(x), expected, atol=1e-5, rtol=1e-5)
    assert all(m.ndim == 4 and m.shape[0] == 2 for m in taps.maps)
    assert tuple(m.shape[1] for m in taps.maps) == backbone.channels
    assert len(taps.maps) >= 2


def test_the_sweep_has_at_least_40_architectures():
    assert len({name for name, _ in ARCHITECTURES}) >= 40


@torch.no_grad()
def test_last_tap_of_a_cnn_is_the_pooled_tensor():
    backbone = load_backbone("tf_efficientnet_lite0", weights=None)
    assert backbone.tap_sizes == ((28, 28), (14, 14), (7, 7))
    assert backbone.channels == (40, 112, 1280)
    assert backbone.pools_linearly
    x = images(backbone)
    taps = backbone(x)
    cam = torch.einsum("kc,bchw->bkhw", backbone.classifier_weight, taps.maps[-1])
    logits = cam.mean((2, 3)) + backbone.classifier_bias
    torch.testing.assert_close(logits, taps.logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "size", "prefix"), VITS, ids=lambda v: str(v))
@torch.no_grad()
def test_norm1_taps_are_what_the_blocks_compute(name, size, prefix):
    backbone = load_backbone(name, weights=None, input_size=size)
    assert backbone.prefix_tokens == prefix
    assert [t.split(".")[0] for t in backbone.taps] == ["norm1"] * 3
    seen = []
    hooks = [
        backbone.model.blocks[int(t.split(".")[1])].norm1.register_forward_hook(
            lambda module, args, output: seen.append(output)
        )
        for t in backbone.taps
    ]
    x = images(backbone)
    backbone.model(backbone.normalize(x))
    hooked = list(seen)
    for hook in hooks:
        hook.remove()
    grid = backbone.tap_sizes[-1]
    for value, expected in zip(backbone(x).maps, hooked, strict=True):
        assert torch.equal(value, backbone.tokens_to_map(expected, grid))


def test_block_outputs_are_an_option():
    backbone = load_backbone("test_vit", weights=None, taps="block")
    assert backbone.taps == ("block.3", "block.4", "block.5")
    assert load_backbone("test_vit", weights=None, taps=["block.-1"]).taps == ("block.5",)


@pytest.mark.parametrize(
    ("name", "taps", "message"),
    [
        ("test_vit", ["norm1.0"], "norm1.0"),
        ("resnet10t", "norm1", "no blocks with norm1"),
        ("resnet10t", ["stage.9"], "stage.9"),
        ("resnet10t", ["layer4"], "layer4"),
        ("resnet10t", [], "empty"),
    ],
)
def test_unusable_taps_are_refused_by_name(name, taps, message):
    with pytest.raises(ValueError, match=message):
        load_backbone(name, weights=None, taps=taps)


def test_post_norm_blocks_are_refused_for_norm1():
    from timm.models.vision_transformer import ResPostBlock, VisionTransformer

    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, block_fn=ResPostBlock
    )
    assert load_backbone(model).taps == ("block.1", "block.2", "block.3")
    with pytest.raises(ValueError, match="ResPostBlock"):
        load_backbone(model, taps="norm1")


@torch.no_grad()
def test_non_square_inputs_and_other_sizes():
    cnn = load_backbone("resnet10t", weights=None, input_size=(64, 96))
    assert cnn(images(cnn)).maps[-1].shape[2:] == (2, 3)
    vit = load_backbone("test_vit", weights=None, input_size=(96, 160))
    assert vit(images(vit)).maps[0].shape[2:] == vit.grid(96, 160) == (6, 10)
    dynamic = timm.create_model("test_vit", dynamic_img_size=True)
    backbone = load_backbone(dynamic)
    x = torch.rand(1, 3, 64, 128)
    assert backbone(x).maps[0].shape[2:] == (4, 8)


def test_stays_in_eval_mode_and_frozen():
    backbone = load_backbone("resnet10t", weights=None, input_size=64)
    before = backbone.fingerprint
    backbone.train()
    assert not any(m.training for m in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    backbone(images(backbone))
    assert sha256(backbone.model) == before


def test_normalisation_is_inside_so_masks_multiply_pixels():
    backbone = load_backbone("resnet10t", weights=None, input_size=64)
    x = images(backbone)
    torch.testing.assert_close(backbone.denormalize(backbone.normalize(x)), x)
    black = backbone.model((torch.zeros_like(x) - backbone.mean) / backbone.std)
    torch.testing.assert_close(backbone.logits(x * 0), black)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
@torch.no_grad()
def test_channels_last_and_bf16_autocast(name):
    backbone = load_backbone(name, weights=None)
    x = images(backbone)
    expected = backbone(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = backbone(x)
    assert half.logits.isfinite().all()
    backbone.to(memory_format=torch.channels_last)
    last = backbone(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last.logits, expected.logits, atol=1e-4, rtol=1e-4)
    scale = expected.maps[-1].abs().max()
    assert (half.maps[-1].float() - expected.maps[-1]).abs().max() < 0.1 * scale


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
@torch.no_grad()
def test_compiles_without_graph_breaks(name):
    backbone = load_backbone(name, weights=None)
    x = images(backbone)
    compiled = torch.compile(backbone, backend="aot_eager", fullgraph=True)
    for value, expected in zip(compiled(x).maps, backbone(x).maps, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)


class Adapted(nn.Module):
    """A module that is not a timm model but speaks the adapter protocol."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4)
        self.classifier = nn.Linear(8, 5)
        self.preprocessing = Preprocessing(input_size=(32, 48), mean=(0.5,) * 3, std=(0.2,) * 3)

    @property
    def classifier_weight(self):
        return self.classifier.weight

    def forward_taps(self, x):
        features = self.conv(x).relu()
        return self.classifier(features.mean((2, 3))), [features]


def test_adapter_modules_work_and_others_are_refused():
    backbone = load_backbone(Adapted(), class_names=list("abcde"))
    taps = backbone(torch.rand(2, 3, 32, 48))
    assert taps.logits.shape == (2, 5) and taps.maps[0].shape == (2, 8, 8, 12)
    assert backbone.class_index("c") == 2
    with pytest.raises(ValueError, match="forward_taps"):
        load_backbone(nn.Linear(3, 3))


def test_models_without_one_map_are_refused():
    with pytest.raises(ValueError, match="token sequences"):
        load_backbone("crossvit_tiny_240", weights=None)


def test_class_names_of_imagenet_and_of_the_user(tmp_path):
    backbone = load_backbone("test_efficientnet", weights=None)
    assert backbone.class_index("tench") == 0
    assert backbone.class_index("281") == 281
    assert "tabby" in backbone.class_names[281]
    with pytest.raises(ValueError, match="near matches.*tabby"):
        backbone.class_index("tabbi")
    with pytest.raises(ValueError, match=r"0\.\.999"):
        backbone.class_index(1000)
    (tmp_path / "classes.txt").write_text("cat\ndog\nfish\n")
    own = load_backbone(
        "test_efficientnet", None, num_classes=3, class_names=tmp_path / "classes.txt"
    )
    assert own.class_names == ["cat", "dog", "fish"]
    with pytest.raises(ValueError, match="3 names"):
        load_backbone("test_efficientnet", None, class_names=tmp_path / "classes.txt")
    with pytest.raises(FileNotFoundError, match="class_names"):
        load_backbone("test_efficientnet", None, class_names=tmp_path / "none.txt")


def test_unknown_model_names_near_matches():
    with pytest.raises(ValueError, match="resnet18"):
        load_backbone("resnet1", weights=None)


def test_local_weights_and_their_class_count(tmp_path):
    from safetensors.torch import save_file

    model = timm.create_model("test_efficientnet", num_classes=7)
    save_file(model.state_dict(), str(tmp_path / "w.safetensors"))
    (tmp_path / "{a}").mkdir()  # a name that a format string would read
    for name in ("w.pth", "{a}/w.pth"):
        torch.save(model.state_dict(), tmp_path / name)
    for file in ("w.safetensors", "w.pth"):
        backbone = load_backbone("test_efficientnet", weights=tmp_path / file)
        assert backbone.num_classes == 7
        assert torch.equal(backbone.classifier_weight, model.classifier.weight)
    with pytest.raises(ValueError, match="does not fit test_resnet"):
        load_backbone("test_resnet", weights=tmp_path / "{a}" / "w.pth")


FROM_CACHE = """
import sys, torch, xattn
from safetensors.torch import load_file
backbone = xattn.load_backbone("test_efficientnet", weights="timm")
state = load_file(sys.argv[1])
assert all(torch.equal(v, state[k]) for k, v in backbone.model.state_dict().items())
print(backbone.preprocessing.mean)
"""


def test_hub_weights_come_through_the_hubs_own_cache(tmp_path):
    from safetensors.torch import save_file

    model = timm.create_model("test_efficientnet")
    repository = tmp_path / "hub/models--timm--test_efficientnet.r160_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    save_file(model.state_dict(), str(snapshot / "model.safetensors"))
    run = subprocess.run(
        [sys.executable, "-c", FROM_CACHE, str(snapshot / "model.safetensors")],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert str(model.pretrained_cfg["mean"]) in run.stdout


def test_hub_weights_that_cannot_be_reached_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: (_ for _ in ()).throw(OSError("no connection"))
    )
    with pytest.raises(OSError, match="weights='timm'"):
        load_backbone("resnet18")
