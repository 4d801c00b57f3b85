"""Every explainer: shape, batch, state and bad-input contracts; and what each one computes."""

import inspect
import random

import numpy as np
import pytest
import torch
from small_networks import PAIRS, made
from torch import nn

from xattn.backbone import load_backbone
from xattn.explainers import (
    create_explainer,
    explainer_class,
    list_explainers,
    preserve_state,
)
from xattn.explainers.base import EXPLAINERS
from xattn.heads import create_head
from xattn.heads.maps.evidence import standardise

CAMS = ["gradcam", "gradcam_plusplus", "layercam", "hirescam", "eigencam", "ablationcam"]
CAMS += ["xgradcam", "eigengradcam"]
NAMES = ["head", "cam", *CAMS, "random", "centre", "ones"]
MODELS = {"cnn": "test_efficientnet", "vit": "test_vit"}


class Pair:
    """A tiny backbone with random weights and a head with random rows."""

    def __init__(self, kind):
        torch.manual_seed(0)
        self.backbone = load_backbone(MODELS[kind], weights=None, input_size=64, num_classes=11)
        self.head = create_head("ttame", self.backbone, fusion="classifier")
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        self.head.eval()

    def explainer(self, name, **options):
        return create_explainer(name, self.backbone, self.head, **options)


@pytest.fixture(scope="module")
def pairs():
    return {kind: Pair(kind) for kind in MODELS}


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))


TARGET = torch.tensor([3, 0, 10, 3, 7])


def test_the_registry_lists_them_all_and_suggests_near_names(pairs):
    with pytest.raises(ValueError, match=r"unknown explainer 'gradcamm'; did you mean gradcam"):
        pairs["cnn"].explainer("gradcamm")
    for typed in ("grad-cam", "GradCAM", "Grad CAM"):
        assert pairs["cnn"].explainer(typed).name == "gradcam"
    assert pairs["cnn"].explainer("Grad-CAM++").name == "gradcam_plusplus"
    with pytest.raises(ValueError, match=r"gradcam does not take that option .*depth"):
        pairs["cnn"].explainer("gradcam", depth=3)
    for name in NAMES:
        cls = explainer_class(name)
        assert cls.__doc__ and cls.forwards in (0, 1) and cls.is_mask == (name == "ones")


# ---------------------------------------------------------------------- what all have in common


@pytest.fixture(scope="module")
def nets():
    return {kind: made(kind).double() for kind in sorted({kind for _, kind in PAIRS})}


@pytest.fixture(scope="module")
def small():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, 3, 32, 32, generator=generator, dtype=torch.float64)


SMALL = torch.tensor([3, 0, 6])


def of(name, net, **options):
    """The explainer of that name with cheap options, and a head if it needs one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = create_head("ttame", net).to(net.mean.dtype) if name == "head" else None
    return create_explainer(name, net, head, **EXPLAINERS.entry(name).cases[0], **options)


@pytest.mark.parametrize("name, kind", PAIRS)
def test_batches_micro_batches_and_several_classes_equal_one_by_one(nets, small, name, kind):
    explainer = of(name, nets[kind])
    batch = explainer.attribute(small, SMALL)
    assert batch.shape[:2] == (3, 1) and batch.ndim == 4 and not batch.requires_grad

    def close(found, expected):
        return (found - expected).abs().max() <= 1e-6 * expected.abs().max()

    pairs = zip(small.split(1), SMALL.tolist(), strict=True)
    assert close(torch.cat([explainer.attribute(image, target) for image, target in pairs]), batch)
    assert close(explainer.attribute(small.flip(0), SMALL.flip(0)).flip(0), batch)
    logits, classes, maps = explainer.attribute_classes(small, lambda z: z.topk(2).indices)
    assert torch.allclose(logits, nets[kind].logits(small)) and maps.shape[:2] == (3, 2)
    assert torch.equal(classes, logits.topk(2).indices) and not maps.requires_grad
    for j in range(2):
        assert close(maps[:, j : j + 1], explainer.attribute(small, classes[:, j]))
    with pytest.raises(ValueError, match=r"choose: got shape \(3,\)"):
        explainer.attribute_classes(small, lambda z: z.argmax(1))
    explainer.max_forward_batch = 2
    assert close(explainer.attribute(small, SMALL), batch)


@pytest.mark.parametrize("name, kind", PAIRS)
def test_a_map_depends_neither_on_gradients_being_off_nor_on_global_generators(
    nets, small, name, kind
):
    expected = of(name, nets[kind], seed=3).attribute(small, 4)
    for context in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(77), np.random.seed(78)
        with context():
            assert torch.equal(of(name, nets[kind], seed=3).attribute(small * 1.0, 4), expected)


@pytest.mark.parametrize("name, kind", PAIRS)
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_models_and_generators_are_as_before(small, name, kind, fails):
    net, inputs = made(kind), small.float().requires_grad_()
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    net.model.train()  # passes would move the statistics of BatchNorm
    first.weight.requires_grad_(True).grad = torch.ones_like(first.weight)
    net.head_point.register_forward_hook(lambda *_: None)
    before = snapshot(net)
    explainer = of(name, net)
    assert snapshot(net) == before
    modules = [net] if explainer.head is None else [net, explainer.head.train()]
    before = snapshot(*modules)
    if fails and explainer.forwards != 0:
        handle = first.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            explainer.attribute(inputs, SMALL)
        handle.remove()
    else:
        explainer.attribute(inputs, SMALL)
        explainer.attribute_classes(inputs, lambda z: z.topk(2).indices)
    assert snapshot(*modules) == before
    assert inputs.requires_grad and inputs.grad is None and torch.equal(inputs, small.float())


@pytest.mark.parametrize("name", list_explainers())
def test_the_signature_shows_the_shared_arguments_and_then_options_by_keyword(name):
    cls = explainer_class(name)
    parameters = list(inspect.signature(cls).parameters.values())
    shared, own = parameters[:4], parameters[4:]
    assert [p.name for p in shared] == ["backbone", "head", "seed", "max_forward_batch"]
    assert [p.default for p in shared[1:]] == [None, 0, 32]
    assert own[0].name == "aug_smooth" and own[0].default is False
    assert all(p.kind is p.KEYWORD_ONLY for p in own)
    assert all(p.name in cls.__doc__ for p in own[1:])
    assert cls.__hash__ is object.__hash__ and cls.__repr__ is object.__repr__


@pytest.mark.parametrize("name", ["head", "cam"])
def test_several_classes_cost_one_backbone_pass(pairs, images, name):
    pair, calls = pairs["cnn"], []
    handle = pair.backbone.model.conv_stem.register_forward_hook(lambda *_: calls.append(1))
    try:
        pair.explainer(name).attribute_classes(images, lambda z: z.topk(4).indices)
    finally:
        handle.remove()
    assert len(calls) == 1


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", NAMES)
def test_bad_inputs_and_targets_raise(pairs, images, name):
    explainer = pairs["cnn"].explainer(name)
    nan = images.clone()
    nan[2, 0, 3, 3] = float("nan")
    for bad, message in [
        (images[0, 0], r"inputs: got a tensor \(64, 64\) of torch.float32"),
        ((images * 255).byte(), r"inputs: got .* of torch.uint8; .*inputs / 255"),
        (images.numpy(), r"inputs: got an array .*inputs.transpose\(0, 2, 3, 1\)"),
        (images[:0], r"inputs: got an empty batch"),
        (nan, r"inputs: image 2 holds NaN"),
        (images * 5 - 2, r"inputs: got values in .*raw pixels in \[0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            explainer.attribute(bad, 0)
    for bad, message in [
        (11, r"target: class 11 is out of range 0\.\.10"),
        (-1, r"target: class -1 is out of range"),
        (torch.tensor([0, 1, 2, 3]), r"target: got torch.int64 \(4,\) for 5 images"),
        (torch.tensor([0]), r"target: got torch.int64 \(1,\)"),
        (torch.tensor(3), r"target: got torch.int64 \(\)"),
        (torch.zeros(5), r"target: got torch.float32"),
        (torch.tensor([0, 1, 2, 3, 99]), r"class 99 is out of range"),
        (True, r"target: got True"),
        ([0, 1, 2, 3, 4], r"target: got \[0"),
        (None, r"target: got None"),
    ]:
        with pytest.raises(ValueError, match=message):
            explainer.attribute(images, bad)


def test_a_missing_or_foreign_head_is_refused(pairs):
    with pytest.raises(ValueError, match=r"head: explainer 'head' needs a head"):
        create_explainer("head", pairs["cnn"].backbone)
    with pytest.raises(ValueError, match=r"head: trained on test_vit .*load a matching pair"):
        create_explainer("head", pairs["cnn"].backbone, pairs["vit"].head)
    with pytest.raises(ValueError, match=r"max_forward_batch: got 0"):
        pairs["cnn"].explainer("ones", max_forward_batch=0)
    with pytest.raises(ValueError, match=r"sigma: got 0"):
        pairs["cnn"].explainer("centre", sigma=0)
    with pytest.raises(ValueError, match=r"layer: Conv2d is not a module of"):
        pairs["cnn"].explainer("gradcam", layer=nn.Conv2d(1, 1, 1))


# ---------------------------------------------------------------------- state


def snapshot(*modules):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modes": [m.training for module in modules for m in module.modules()],
        "hooks": [
            len(getattr(m, h)) for module in modules for m in module.modules() for h in hooks
        ],
        "requires_grad": [p.requires_grad for module in modules for p in module.parameters()],
        "grad": [
            None if p.grad is None else p.grad.sum().item()
            for module in modules
            for p in module.parameters()
        ],
        "state": [
            v.double().sum().item()
            for module in modules
            for v in (*module.parameters(), *module.buffers())
        ],
        "rng": (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
            np.random.get_state()[2],
        ),
    }


def test_preserve_state_restores_everything_after_an_error():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout())
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[0].bias.requires_grad_(False)
    kept = model[1].register_forward_hook(lambda *_: None)
    before, grad, mean = snapshot(model), model[0].weight.grad, model[1].running_mean
    with pytest.raises(ZeroDivisionError), preserve_state(model):
        model(torch.rand(3, 1, 4, 4)).sum().backward()
        model.eval().requires_grad_(True)
        model[2].register_forward_hook(lambda *_: None)
        kept.remove()
        model[1].running_mean = torch.full((2,), 7.0)
        random.random(), np.random.rand(), torch.rand(1)
        _ = 1 / 0
    assert snapshot(model) == before
    assert model[0].weight.grad is grad and model[1].running_mean is mean


def test_a_model_of_transformers_still_returns_its_layers_after_its_hooks_were_removed():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "image_size": 16, "patch_size": 8}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, **layers)).eval()
    for _ in range(2):  # each time transformers adds hooks, which go at the end
        with preserve_state(model):
            found = model(torch.rand(1, 3, 16, 16), output_hidden_states=True).hidden_states
        assert len(found) == 3


# ---------------------------------------------------------------------- what they compute


def test_cam_averages_to_the_logit_without_its_bias(pairs, images):
    backbone = pairs["cnn"].backbone
    maps = pairs["cnn"].explainer("cam").attribute(images, TARGET)
    logit = backbone.logits(images).gather(1, TARGET[:, None])[:, 0]
    assert torch.allclose(
        maps.mean((1, 2, 3)) + backbone.classifier_bias[TARGET], logit, rtol=1e-4, atol=1e-5
    )
    assert maps.min() < 0  # unrectified


def test_gradcam_of_linear_pooling_is_the_rectified_cam(pairs, images):
    cam = pairs["cnn"].explainer("cam").attribute(images, TARGET)
    gradcam = pairs["cnn"].explainer("gradcam").attribute(images, TARGET)
    signed = pairs["cnn"].explainer("gradcam", relu=False).attribute(images, TARGET)
    places = cam.shape[-1] * cam.shape[-2]
    assert torch.allclose(gradcam * places, cam.relu(), atol=1e-5)
    assert torch.allclose(signed * places, cam, atol=1e-5)


def test_cam_of_a_vit_is_what_its_class_token_reads(pairs, images):
    backbone = pairs["vit"].backbone
    head = create_head("evidence", backbone, parts=[], explain_with="scores")
    found = create_explainer("head", backbone, head).attribute(images, TARGET)
    cam = pairs["vit"].explainer("cam").attribute(images, TARGET)
    assert torch.allclose(standardise(cam), found, atol=1e-5) and cam.std() > 0


def test_cam_refuses_networks_whose_reading_is_not_known(images):
    backbone = load_backbone("test_vit", weights=None, taps=["block.2", "block.3"])
    with pytest.raises(ValueError, match=r"explainer: cam needs the classifier's rows.*norm1"):
        create_explainer("cam", backbone)


@pytest.mark.parametrize("model", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])
def test_gradcam_of_a_vit_matches_gradients_taken_by_hand(model):
    torch.manual_seed(0)
    backbone = load_backbone(model, weights=None, input_size=(64, 96))
    images, target = torch.rand(2, 3, 64, 96), torch.tensor([5, 2])
    tokens = []

    def keep(module, args, output):
        output.requires_grad_()
        tokens.append(output)

    handle = backbone.model.blocks[-1].norm1.register_forward_hook(keep)
    logits = backbone.logits(images)
    handle.remove()
    gradient = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), tokens[0])[0]
    patches = tokens[0][:, backbone.prefix_tokens :], gradient[:, backbone.prefix_tokens :]
    expected = (patches[0] * patches[1].mean(1, keepdim=True)).sum(-1).relu()
    got = create_explainer("gradcam", backbone).attribute(images, target)
    assert got.shape[2:] == backbone.grid(64, 96) and got.shape[2] != got.shape[3]
    assert torch.allclose(got.flatten(1), expected, atol=1e-7, rtol=1e-4)


def test_gradcam_of_another_layer(pairs, images):
    backbone = pairs["cnn"].backbone
    maps = pairs["cnn"].explainer("gradcam", layer=backbone.model.blocks[1]).attribute(images, 3)
    assert maps.shape[-1] > backbone.head_point(backbone(images).maps[-1]).shape[-1]


def test_head_gives_the_scores_or_the_mask_of_the_class(pairs, images):
    pair = pairs["cnn"]
    with torch.no_grad():
        every = pair.head(pair.backbone(images))[range(5), TARGET]
    assert pair.head.explain_with == "mask"
    got = pair.explainer("head").attribute(images, TARGET)
    assert torch.allclose(got[:, 0], every.sigmoid(), atol=1e-5)
    got = pair.explainer("head", maps="scores").attribute(images, TARGET)
    assert torch.allclose(got[:, 0], every, atol=1e-5)
    assert pair.head.explain_with == "mask"
    with pytest.raises(ValueError, match="maps"):
        pair.explainer("head", maps="heat")


def test_random_depends_on_seed_and_pixels_only(pairs, images):
    explainer = pairs["cnn"].explainer("random", seed=1)
    first = explainer.attribute(images, TARGET)
    torch.manual_seed(99), np.random.seed(99)
    assert torch.equal(explainer.attribute(images.flip(0), 0), first.flip(0))
    assert not torch.equal(pairs["cnn"].explainer("random", seed=2).attribute(images, 0), first)
    assert torch.equal(explainer.attribute(images[[0, 0]], 0)[0], first[0])
    assert len({tuple(m.flatten().tolist()) for m in first}) == 5
    assert 0 <= first.min() and first.max() < 1


def test_centre_peaks_in_the_middle_and_ones_are_one(pairs, images):
    centre = pairs["cnn"].explainer("centre").attribute(images, 0)[0, 0]
    assert centre.shape == (64, 64)
    assert torch.allclose(centre, centre.flip(0)) and torch.allclose(centre, centre.t())
    assert centre.max() == centre[31, 31] and centre.min() == centre[0, 0]
    ones = pairs["cnn"].explainer("ones")
    assert ones.is_mask and (ones.attribute(images, 0) == 1).all()


def test_gradcam_finds_the_grid_of_models_that_do_not_tell_it():
    backbone = load_backbone("xcit_nano_12_p16_224", weights=None)
    explainer = create_explainer("gradcam", backbone, relu=False)
    maps = explainer.attribute(torch.rand(1, 3, 224, 224), 3)
    assert maps.shape == (1, 1, 14, 14) and maps.abs().max() > 0
