"""The layer that CAM methods read: by name, several fused, and the outputs of other architectures."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import xattn
from xattn import create_explainer, load_backbone
from xattn.cli import main

CAMS = [
    "gradcam",
    "gradcam_plusplus",
    "layercam",
    "hirescam",
    "eigencam",
    "scorecam",
    "ablationcam",
    "xgradcam",
    "eigengradcam",
]
# The smallest of each family whose final features are tokens.
TOKEN_NETWORKS = {
    "levit_128s": {},
    "efficientformer_l1": {"depths": (1, 1, 1, 2)},
    "twins_svt_small": {"depths": (1, 1, 1, 1)},
    "twins_pcpvt_small": {"depths": (1, 1, 1, 1)},
    "hiera_tiny_224": {"stages": (1, 1, 1, 1), "embed_dim": 24},
}


def images(side=224, count=1):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def network(name, **options):
    """A small random network whose classifier is not almost zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).eval()
    layers = model.get_classifier()
    for layer in layers if isinstance(layers, tuple) else (layers,):
        for linear in layer.modules():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=0.2)
    return load_backbone(model)


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    return load_backbone(timm.create_model("test_resnet", num_classes=5), input_size=64)


# ------------------------------------------------------------------ architectures


@pytest.mark.parametrize("name", TOKEN_NETWORKS)
def test_gradcam_of_tokens_is_its_equation_on_the_final_features(name):
    backbone = network(name, **TOKEN_NETWORKS[name])
    x = images()
    final = backbone.model.forward_features(backbone.normalize(x)).detach().requires_grad_()
    score = backbone.model.forward_head(final)[0, 2]
    (gradient,) = torch.autograd.grad(score, final)
    expected = (gradient.mean(1, keepdim=True) * final).sum(2).detach()
    found = create_explainer("gradcam", backbone, relu=False).attribute(x, 2)
    assert found.shape[2:] == backbone.tap_sizes[-1]
    scale = expected.abs().max()
    assert scale > 0 and torch.allclose(found.flatten(1), expected, atol=1e-4 * float(scale))


@pytest.mark.parametrize("method", CAMS)
def test_every_cam_explains_tnt_before_its_class_token_reads(method):
    backbone = network("tnt_s_patch16_224", depth=2, embed_dim=48, inner_dim=8, num_heads_inner=2)
    found = create_explainer(method, backbone).attribute(images(), 1)
    assert found.shape == (1, 1, 14, 14) and found.any()


def test_tokens_of_a_hiera_block_are_put_in_the_order_of_places():
    backbone = network("hiera_tiny_224", **TOKEN_NETWORKS["hiera_tiny_224"])
    x = images()
    _, maps = backbone.model.forward_intermediates(backbone.normalize(x))
    for block, expected in enumerate(maps):
        reader = create_explainer("gradcam", backbone, layer=f"blocks.{block}").reader
        assert torch.allclose(reader.activations(x), expected, atol=1e-6)


# A member of each family; the smallest, at its own input size.
FAMILIES = [
    "botnet26t_256", "cait_xxs24_224", "coat_lite_tiny", "convit_tiny", "convnext_atto", "densenet121",
    "edgenext_xx_small", "efficientformerv2_s0", "efficientvit_b0", "gmlp_ti16_224", "mobilevit_xxs",
    "mvitv2_small_cls", "nest_tiny", "pit_ti_224", "pvt_v2_b0", "swin_tiny_patch4_window7_224",
    "tiny_vit_5m_224", "tnt_s_patch16_224", "visformer_tiny", "xcit_nano_12_p16_224", *TOKEN_NETWORKS,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_cams_saliency_and_heads_work_on_every_family(name):
    backbone = network(name)
    x = images(backbone.preprocessing.input_size[0])
    for method in ("gradcam", "gradcam_plusplus", "layercam"):
        assert create_explainer(method, backbone, relu=False).attribute(x, 1).any(), method
    for method in ("eigencam", "saliency"):
        assert create_explainer(method, backbone).attribute(x, 1).std() > 0, method
    head = xattn.create_head("ttame", backbone, fusion="per_class").eval()
    assert head(backbone(x), 1).std() > 0


# ------------------------------------------------------------------ names


def test_a_layer_is_found_by_its_dotted_name(cnn):
    x = images(64, 2)
    named = create_explainer("layercam", cnn, layer="layer3.0")
    same = create_explainer("layercam", cnn, layer=cnn.model.layer3[0])
    assert torch.equal(named.attribute(x, 1), same.attribute(x, 1))
    assert named.layer_name == "model.layer3.0"
    again = create_explainer("layercam", cnn, layer=named.layer_name)
    assert again.layer is named.layer


def test_a_misspelt_layer_has_near_matches(cnn):
    with pytest.raises(ValueError, match=r"layer: test_resnet has no module 'layr3'; .*layer3"):
        create_explainer("gradcam", cnn, layer="layr3")


def test_layers_of_a_torchvision_module_are_found_though_its_graph_calls_only_leaves():
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=4).eval()
    backbone = load_backbone(net, input_size=64, mean=0.5, std=0.5)
    x, seen = images(64, 2), {}
    for name in ("layer2", "layer3.0", "layer4.1.conv1"):
        net.get_submodule(name).register_forward_hook(lambda m, i, o, n=name: seen.update({n: o}))
    net(backbone.normalize(x))
    for name, expected in seen.items():
        for layer in (name, net.get_submodule(name)):
            reader = create_explainer("gradcam", backbone, layer=layer).reader
            assert torch.allclose(reader.activations(x), expected, atol=1e-5), name


# ------------------------------------------------------------------ several layers


@pytest.mark.parametrize("method", ["gradcam", "layercam", "eigencam"])
def test_several_layers_are_fused_as_pytorch_grad_cam_does(cnn, method):
    x, target = images(64, 3), torch.tensor([0, 1, 4])
    layers = ("layer2", "layer3", "layer4")
    expected = []
    for layer in layers:
        one = create_explainer(method, cnn, layer=layer).attribute(x, target)
        one = one - one.amin((2, 3), keepdim=True)
        top = one.amax((2, 3), keepdim=True)
        expected.append(F.interpolate(one / top.where(top > 0, 1), (64, 64), mode="bilinear"))
    found = create_explainer(method, cnn, layers=layers)
    assert torch.allclose(found.attribute(x, target), torch.stack(expected).mean(0), atol=1e-6)
    joined = create_explainer(method, cnn, layers="layer2, layer3,layer4")
    assert torch.equal(joined.attribute(x, target), found.attribute(x, target))
    assert found.layer_name == "model.layer2, model.layer3, model.layer4"


@pytest.mark.parametrize("method", ["scorecam", "ablationcam"])
def test_methods_that_mask_count_the_passes_of_all_layers(cnn, method):
    parts = [create_explainer(method, cnn, layer=layer) for layer in ("layer3", "layer4")]
    found = create_explainer(method, cnn, layers=("layer3", "layer4"))
    assert found.forwards == sum(p.forwards for p in parts) and found.perturbs
    _, _, maps = found.attribute_classes(images(64), lambda z: z.topk(2).indices)
    assert maps.shape == (1, 2, 64, 64) and maps.max() <= 1


def test_layers_are_options_of_the_command_line_and_stand_in_the_results(tmp_path, cnn):
    from PIL import Image

    Image.new("RGB", (80, 70), "teal").save(tmp_path / "photo.png")
    line = ["explain", str(tmp_path / "photo.png"), "-b", "test_resnet", "--weights", "random"]
    line += ["--device", "cpu", "--explainers", "gradcam", "--output", str(tmp_path / "pack")]
    assert main([*line, "--options", "gradcam.layers=layer3,layer4"]) == 0
    assert xattn.load_pack(tmp_path / "pack")[0].map.shape == (160, 160)
    from xattn.eval.evaluation.facts import describe

    several = describe(create_explainer("gradcam", cnn, layers=("layer3", "layer4")))["options"]
    assert json.loads(json.dumps(several["layers"])) == ["layer3", "layer4"]
    assert not describe(create_explainer("gradcam", cnn))["options"]["layers"]


# ------------------------------------------------------------------ outputs of other forms


class Odd(nn.Module):
    """Three registers before its tokens, which nothing tells, and a layer with a form of its own."""

    preprocessing = xattn.Preprocessing((32, 48), (0.5,) * 3, (0.5,) * 3)

    def __init__(self):
        super().__init__()
        self.patches, self.fold, self.join = nn.Conv2d(3, 6, 8, 8), nn.Flatten(2), nn.Identity()
        self.fc = nn.Linear(6, 4)

    def forward_taps(self, x):
        patches = self.patches(x)
        tokens = self.fold(patches).transpose(1, 2)
        tokens = self.join(torch.cat([tokens[:, :3] * 0, tokens], 1))
        return self.fc(tokens.mean(1)), [patches]


@pytest.fixture(scope="module")
def odd():
    torch.manual_seed(0)
    return load_backbone(Odd())


def test_the_grid_of_tokens_is_found_and_prefix_tokens_are_left_out(odd):
    x = torch.rand(2, 3, 32, 48)
    reader = create_explainer("gradcam", odd, layer="join").reader
    assert torch.equal(reader.activations(x), odd.model.patches(odd.normalize(x)))


@pytest.mark.parametrize("method", ["gradcam", "eigencam", "ablationcam"])
def test_reshape_makes_a_map_of_an_output_of_another_form(odd, method):
    x = torch.rand(2, 3, 32, 48)
    with pytest.raises(
        ValueError, match=r"layer: model.fc .* returns \(2, 4\) .*not a map.*reshape="
    ):
        create_explainer("gradcam", odd, layer="fc").attribute(x, 1)
    options = {} if method != "gradcam" else {"relu": False}
    found = create_explainer(
        method, odd, layer="fold", reshape=lambda o: o.unflatten(2, (4, 6)), **options
    )
    plain = create_explainer(method, odd, layer="patches", **options)
    assert torch.allclose(found.attribute(x, 1), plain.attribute(x, 1), atol=1e-6)
    with pytest.raises(ValueError, match=r"reshape: got \(2, 6, 24\) .*return \(B, C, h, w\)"):
        create_explainer("gradcam", odd, layer="fold", reshape=lambda o: o).attribute(x, 1)
