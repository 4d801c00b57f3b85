"""CAM methods against their definitions, on a tiny CNN and a tiny ViT."""

import pytest
import torch
from torch.nn import functional as F

from xattn import load_backbone
from xattn.explainers import create_explainer

GRADIENT = ["gradcam", "gradcam_plusplus", "layercam"]
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
    if name == "eigencam":
        rows = f.flatten(1).T
        u, s, _ = torch.linalg.svd(rows, full_matrices=False)
        first = (u[:, 0] * s[0]).view(f.shape[1:])
        return first * (1 if first.sum() >= 0 else -1)
    scores, mean = [], backbone.mean.view(3, 1, 1).to(image)
    used = [c for c in range(len(f)) if f[c].max() > f[c].min()]
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
    if explainer.perturbs:
        channels = explainer.reader.activations(images).shape[1]
        assert explainer.forwards == channels + 1


def test_only_the_classifier_runs_again_on_the_pooled_map(backbones, images):
    explainer = create_explainer("ablationcam", backbones["cnn"])
    assert (explainer.forwards, explainer.perturbs) == (1, False)
    early = backbones["cnn"].model.layer2
    slow = create_explainer("ablationcam", backbones["cnn"], layer=early)
    assert slow.perturbs and slow.attribute(images, TARGET).shape[1] == 1


def test_eigencam_is_the_same_for_all_classes(backbones, images):
    explainer = create_explainer("eigencam", backbones["cnn"])
    assert torch.equal(explainer.attribute(images, 0), explainer.attribute(images, 4))


def test_constant_channels_weigh_nothing_in_scorecam(backbones, images):
    backbone = backbones["cnn"]
    layer = backbone.head_point
    handle = layer.register_forward_hook(lambda m, i, o: torch.cat([o[:, :1] * 0 + 9, o[:, 1:]], 1))
    try:
        explainer = create_explainer("scorecam", backbone)
        assert explainer.attribute(images, TARGET).isfinite().all()
    finally:
        handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_of_another_model_is_refused(backbones, name):
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


@pytest.mark.parametrize("name", ["gradcam", "saliency", "integrated_gradients", "lrp"])
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
