"""CAM methods against their definitions, on a tiny CNN and a tiny ViT."""

import pytest
import torch
from torch.nn import functional as F

from xattn import load_backbone
from xattn.explainers import create_explainer

GRADIENT = ["gradcam", "gradcam_plusplus", "layercam", "hirescam", "xgradcam", "eigengradcam"]
NAMES = [*GRADIENT, "scorecam", "ablationcam", "eigencam"]
KINDS = {"cnn": "test_resnet", "vit": "test_vit2"}
TARGET = torch.tensor([3, 0])


@pytest.fixture(scope="module")
def backbones():
    torch.manual_seed(0)
    made = {
        kind: load_backbone(name, weights=None, input_size=64, num_classes=5)
        for kind, name in KINDS.items()
    }
    return {kind: backbone.double() for kind, backbone in made.items()}


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()


def read(backbone, image, target):
    """Activations and gradients (C, h, w) by autograd, without the library's reader."""
    found = []
    layer = backbone.model.blocks[-1].norm1 if backbone.is_vit else backbone.head_point

    def keep(module, inputs, output):
        found.append(output.detach().requires_grad_())
        return found[-1]

    handle = layer.register_forward_hook(keep)
    logit = backbone.logits(image[None])[0, target]
    handle.remove()
    (gradient,) = torch.autograd.grad(logit, found[0])
    maps = []
    for tensor in (found[0].detach(), gradient):
        if backbone.is_vit:
            side = backbone.grid(64, 64)
            tensor = tensor[:, -side[0] * side[1] :].transpose(1, 2).unflatten(2, side)
        maps.append(tensor[0])
    return (*maps, float(logit.detach()))


def replaced(backbone, image, target, channel):
    """The logit with one channel of the layer set to 0."""
    layer = backbone.model.blocks[-1].norm1 if backbone.is_vit else backbone.head_point

    def zero(module, inputs, output):
        output = output.clone()
        if backbone.is_vit:
            output[..., channel] = 0
        else:
            output[:, channel] = 0
        return output

    handle = layer.register_forward_hook(zero)
    with torch.no_grad():
        value = float(backbone.logits(image[None])[0, target])
    handle.remove()
    return value


def expected(name, backbone, image, target):
    f, g, y = read(backbone, image, target)
    if name == "gradcam":
        return torch.relu((g.mean((1, 2), keepdim=True) * f).sum(0))
    if name == "layercam":
        return torch.relu((g.relu() * f).sum(0))
    if name == "hirescam":
        return torch.relu((g * f).sum(0))
    if name == "gradcam_plusplus":
        weights = []
        for a, d in zip(f, g, strict=True):
            below = 2 * d**2 + a.sum() * d**3
            alpha = torch.where(below != 0, d**2 / below, 0)
            weights.append((alpha * d.relu()).sum())
        return torch.relu((torch.stack(weights)[:, None, None] * f).sum(0))
    if name == "ablationcam":
        lost = [y - replaced(backbone, image, target, c) for c in range(len(f))]
        return torch.relu((torch.tensor(lost).to(f)[:, None, None] / abs(y) * f).sum(0))
    if name == "xgradcam":
        active = f.sum((1, 2)) != 0  # test_resnet has dead channels
        weights = (g * f).sum((1, 2))[active] / f.sum((1, 2))[active]
        return torch.relu((weights[:, None, None] * f[active]).sum(0))
    if name in ("eigencam", "eigengradcam"):
        seen = f if name == "eigencam" else f * g
        u, s, _ = torch.linalg.svd(seen.flatten(1).T, full_matrices=False)
        first = (u[:, 0] * s[0]).view(f.shape[1:])
        if name == "eigencam":
            return first * first.sum().sign()
        return torch.relu(first * (first * seen.sum(0)).sum().sign())
    scores, mean = [], backbone.mean.view(3, 1, 1).to(image)
    used = [c for c in range(len(f)) if f[c].max() > f[c].min()]  # test_resnet has dead channels
    for c in used:
        up = F.interpolate(f[None, c : c + 1], (64, 64), mode="bilinear")[0]
        mask = (up - up.min()) / (up.max() - up.min())
        with torch.no_grad():
            scores.append(backbone.logits((image * mask + mean * (1 - mask))[None])[0, target])
    return torch.relu((torch.stack(scores).softmax(0)[:, None, None] * f[used]).sum(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_maps_equal_the_definition(backbones, images, kind, name):
    backbone = backbones[kind]
    maps = create_explainer(name, backbone, max_forward_batch=5).attribute(images, TARGET)
    for i in range(2):
        want = expected(name, backbone, images[i], int(TARGET[i]))
        assert want.abs().max() > 0
        torch.testing.assert_close(maps[i, 0], want, rtol=1e-6, atol=1e-9 * float(want.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["scorecam", "ablationcam"])
def test_passes_are_bounded_and_of_one_shape(backbones, images, kind, name):
    backbone, sizes = backbones[kind], []
    explainer = create_explainer(name, backbone, max_forward_batch=7)
    plain = backbone.logits
    backbone.logits = lambda x: (sizes.append(len(x)), plain(x))[1]
    try:
        explainer.attribute(images, TARGET)
    finally:
        del backbone.logits
    assert max(sizes) <= 7 and len(set(sizes) - {1}) <= 1
    if explainer.perturbs and name == "ablationcam":  # Score-CAM leaves constant channels out
        channels = explainer.reader.activations(images).shape[1]
        assert explainer.forwards == channels + 1
        steps = -(-channels // 7)
        assert sum(sizes) == 2 * (1 + steps * -(-channels // steps))


def test_classifier_passes_are_bounded_and_of_one_shape(backbones, images):
    backbone, sizes = backbones["cnn"], []
    explainer = create_explainer("ablationcam", backbone, max_forward_batch=7)
    channels, plain = backbone.channels[-1], backbone.head_logits
    backbone.head_logits = lambda x: (sizes.append(len(x)), plain(x))[1]
    try:
        explainer.attribute(images, TARGET)
    finally:
        del backbone.head_logits
    steps = -(-channels // 7)
    assert sizes == [-(-channels // steps)] * 2 * steps and max(sizes) <= 7


PERTURBING = [("cnn", "scorecam", None), ("vit", "scorecam", None)]
PERTURBING += [("cnn", "ablationcam", "layer2"), ("vit", "ablationcam", None)]


def perturbing(backbone, name, layer):
    options = {"layer": getattr(backbone.model, layer)} if layer else {}
    return create_explainer(name, backbone, max_forward_batch=16, **options)


@pytest.mark.parametrize("kind, name, layer", PERTURBING)
def test_several_classes_share_the_perturbed_passes(backbones, images, kind, name, layer):
    backbone, seen = backbones[kind], []
    explainer = perturbing(backbone, name, layer)
    single = [explainer.attribute(images[:1], k) for k in (3, 0, 4)]
    handle = backbone.model.get_classifier().register_forward_hook(
        lambda *a: seen.append(len(a[2]))
    )
    try:
        explainer.attribute(images[:1], 3)
        one = sum(seen)
        maps = explainer.attribute_classes(images[:1], lambda z: torch.tensor([[3, 0, 4]]))[2]
    finally:
        handle.remove()
    assert sum(seen) - one == one + 1  # the logits to choose from
    expected = torch.cat(single, 1)
    assert (maps - expected).abs().max() <= 1e-9 * expected.max()


def test_small_gradients_do_not_vanish_from_gradcam_plusplus_in_half_precision(backbones):
    explainer = create_explainer("gradcam_plusplus", backbones["cnn"])
    generator = torch.Generator().manual_seed(0)
    f = torch.rand(1, 6, 7, 7, generator=generator)
    g = torch.randn(1, 6, 7, 7, generator=generator) * 1e-4  # its square is 0 in float16
    exact = explainer._weights(f.double(), g.double())
    torch.testing.assert_close(
        explainer._weights(f.half(), g.half()).double(), exact, rtol=0.02, atol=1e-6
    )


def test_gradcam_plusplus_gives_no_weight_at_a_pole(backbones):
    explainer = create_explainer("gradcam_plusplus", backbones["cnn"])
    f, g = torch.full((1, 1, 2, 2), -0.5), torch.tensor([[[[1.0, 1.0], [0.5, -1.0]]]])
    assert explainer._weights(f, g).item() == 0.5  # 2 + sum(f) g is 0, 0, 1 where g > 0


def test_only_the_classifier_runs_again_on_the_pooled_map(backbones, images):
    explainer = create_explainer("ablationcam", backbones["cnn"])
    assert (explainer.forwards, explainer.perturbs) == (1, False)
    early = backbones["cnn"].model.layer2
    slow = create_explainer("ablationcam", backbones["cnn"], layer=early)
    assert slow.perturbs and slow.attribute(images, TARGET).shape[1] == 1


def test_eigencam_is_the_same_for_all_classes(backbones, images):
    explainer = create_explainer("eigencam", backbones["cnn"])
    assert torch.equal(explainer.attribute(images, 0), explainer.attribute(images, 4))


def test_xgradcam_gives_each_channel_what_the_logit_loses_without_it(backbones, images):
    """Sensitivity, where the rest of the network is linear; gradients are the same everywhere there."""
    backbone = backbones["cnn"]
    explainer = create_explainer("xgradcam", backbone, relu=False)
    f, g, y = read(backbone, images[0], 3)
    parts = (explainer._weights(f[None], g[None])[0] * f).sum((1, 2))
    lost = torch.tensor([y - replaced(backbone, images[0], 3, c) for c in range(len(f))])
    torch.testing.assert_close(parts, lost.double(), atol=1e-9, rtol=1e-6)
    got = explainer.attribute(images, TARGET)
    grad = create_explainer("gradcam", backbone, relu=False).attribute(images, TARGET)
    torch.testing.assert_close(got, grad)


def test_xgradcam_of_an_early_layer_sums_as_hirescam_and_is_not_gradcam(backbones, images):
    maps = {
        name: create_explainer(name, backbones["cnn"], layer="layer2", relu=False).attribute(
            images, TARGET
        )
        for name in ("xgradcam", "hirescam", "gradcam")
    }
    sums = {name: m.sum((1, 2, 3)) for name, m in maps.items()}
    torch.testing.assert_close(sums["xgradcam"], sums["hirescam"])
    assert not torch.allclose(sums["xgradcam"], sums["gradcam"], rtol=0.01)


def test_eigengradcam_of_one_pattern_is_that_pattern(backbones):
    """f o g of rank 1, u v^T: the map is u |v|, with the sign of u sum(v)."""
    explainer = create_explainer("eigengradcam", backbones["cnn"], relu=False)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(2, 1, 3, 5, generator=generator).double()
    for v in (torch.tensor([0.5, -2.0, 1.0]), torch.randn(40, generator=generator)):
        scale = v.double().view(1, -1, 1, 1)
        explainer.reader.gradients = lambda x, t, scale=scale: (u * scale, torch.ones_like(u))
        expected = u * v.double().norm() * v.sum().sign()
        torch.testing.assert_close(explainer.attribute(torch.rand(2, 3, 64, 64), TARGET), expected)


def test_constant_channels_weigh_nothing_in_scorecam(backbones, images):
    backbone = backbones["cnn"]
    explainer = create_explainer("scorecam", backbone)
    plain = explainer.attribute(images, TARGET)

    # As the reader sees it, so that the network's scores stay as they are.
    read = explainer.reader.activations
    explainer.reader.activations = lambda x: torch.cat([read(x), read(x)[:, :1] * 0 + 9], 1)
    torch.testing.assert_close(explainer.attribute(images, TARGET), plain)
    explainer.reader.activations = lambda x: read(x) * 0 + 9
    assert (explainer.attribute(images, TARGET) == 0).all()


def test_a_layer_of_another_model_is_refused(backbones):
    for name in NAMES:
        with pytest.raises(ValueError, match="layer: Linear is not a module of test_resnet"):
            create_explainer(name, backbones["cnn"], layer=torch.nn.Linear(2, 2))


def test_the_layout_of_a_layer_is_told_by_its_output():
    swin = load_backbone("swin_tiny_patch4_window7_224", weights=None, input_size=64, num_classes=5)
    vit = load_backbone("test_vit2", weights=None, input_size=64, num_classes=5)
    x = torch.rand(1, 3, 64, 96)
    for backbone, layer, size in (
        (swin, swin.model.layers[1], (8, 8)),  # (B, h, w, C)
        (vit, vit.model.patch_embed.proj, (4, 4)),  # (B, C, h, w) of a ViT
    ):
        maps = create_explainer("layercam", backbone, layer=layer).attribute(x[..., :64], 0)
        assert maps.shape == (1, 1, *size)


def test_a_layer_that_is_followed_by_in_place_work_is_read_before_it(backbones, images):
    backbone = backbones["cnn"]
    layer, found = backbone.model.bn1, []
    handle = layer.register_forward_hook(lambda m, i, output: found.append(output.clone()))
    with torch.no_grad():
        backbone.logits(images)
    handle.remove()
    reader = create_explainer("eigencam", backbone, layer=layer).reader
    assert found[0].min() < 0 and torch.equal(reader.activations(images), found[0])


@pytest.mark.parametrize("name", ["scorecam", "ablationcam"])
def test_making_an_explainer_leaves_a_training_model_alone(name):
    backbone = load_backbone("test_resnet", weights=None, input_size=64, num_classes=5)
    backbone.model.train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    create_explainer(name, backbone, layer=backbone.model.layer2)
    assert backbone.model.training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["gradcam", "lrp"])
def test_targets_made_in_inference_mode_are_explained(backbones, images, name):
    explainer = create_explainer(name, backbones["cnn"])
    with torch.inference_mode():
        target = backbones["cnn"].logits(images).argmax(1)
        maps = explainer.attribute(images, target)
        one = explainer.attribute(images, 2)
    assert torch.equal(maps, explainer.attribute(images, target.clone()))
    assert one.isfinite().all()


def test_a_layer_that_no_pass_calls_is_named(backbones):
    backbone = load_backbone("test_resnet", weights=None, input_size=64, num_classes=5)
    backbone.model.add_module("unused", torch.nn.Conv2d(3, 3, 1))
    for name in ("eigencam", "gradcam"):
        explainer = create_explainer(name, backbone, layer=backbone.model.unused)
        with pytest.raises(ValueError, match=r"layer: model\.unused .* give a layer inside it"):
            explainer.attribute(torch.rand(1, 3, 64, 64), 0)


def test_hirescam_of_what_is_pooled_sums_to_the_logit_and_is_gradcam(backbones, images):
    backbone = backbones["cnn"]
    hires, grad = (
        create_explainer(name, backbone, relu=False).attribute(images, TARGET)
        for name in ("hirescam", "gradcam")
    )
    torch.testing.assert_close(hires, grad)
    with torch.no_grad():
        logits = backbone.logits(images).gather(1, TARGET[:, None])[:, 0]
    bias = backbone.model.get_classifier().bias.detach()[TARGET]
    torch.testing.assert_close(hires.sum((1, 2, 3)).double(), logits - bias, atol=1e-6, rtol=1e-5)
