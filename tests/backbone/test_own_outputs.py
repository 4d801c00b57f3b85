"""Models with outputs of their own: multi-label, a single logit, torchvision, other input sizes."""

import json
import warnings

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image

import xattn
from xattn import TrainConfig, create_head, load_backbone
from xattn.backbone.families.traced import from_torchvision
from xattn.cli import main
from xattn.eval import evaluate
from xattn.explainers import create_explainer
from xattn.photos.view import prepare
from xattn.training.objectives.base import Step
from xattn.training.objectives.mask import Mask, classification_loss, predicted_targets

IMAGES = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def small(num_classes, task=None, name="test_resnet"):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes).eval()
    return load_backbone(model, input_size=64, task=task)


# ------------------------------------------------------------------ tasks


def test_a_single_logit_becomes_two_classes_whose_softmax_is_its_sigmoid():
    backbone = small(1)
    z = backbone.model(backbone.normalize(IMAGES))
    taps = backbone(IMAGES)
    assert backbone.task == "binary" and backbone.num_classes == 2
    assert backbone.class_names == ["negative", "positive"]
    p = backbone.probabilities(taps.logits)
    assert torch.allclose(p[:, 1:], z.double().sigmoid(), atol=1e-7)
    assert torch.equal(taps.logits, backbone.logits(IMAGES))
    # classifier rows still explain the logits: CAM's mean is the class logit without bias
    cam = create_explainer("cam", backbone).attribute(IMAGES, 1)
    bias = backbone.classifier_bias[1]
    assert torch.allclose(cam.mean((2, 3))[:, 0] + bias, taps.logits[:, 1], atol=1e-5)
    assert torch.allclose(cam, -create_explainer("cam", backbone).attribute(IMAGES, 0), atol=1e-6)


def test_multilabel_probabilities_are_sigmoids_of_their_own_logits():
    backbone = small(4, "multilabel")
    logits = backbone.logits(IMAGES)
    assert torch.equal(logits, backbone.model(backbone.normalize(IMAGES)))
    assert torch.allclose(backbone.probabilities(logits), logits.double().sigmoid())


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "vit"])
def test_networks_of_torchvision_with_1000_outputs_have_imagenets_names(name):
    def net(outputs):
        if name == "vit":
            zoo = torchvision.models.VisionTransformer
            return zoo(32, 16, 2, 2, 8, 16, num_classes=outputs)
        return torchvision.models.get_model(name, weights=None, num_classes=outputs)

    known = load_backbone(net(1000), input_size=32, mean=0.5, std=0.5)
    assert known.class_names[0] == "tench" and known.class_names[281] == "tabby"
    assert load_backbone(net(999), input_size=32, mean=0.5, std=0.5).class_names[0] == "class 0"
    own = type("Own", (type(net(5)),), {})  # a class of the user's may have learned anything
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine = net(1000)
        mine.__class__ = own
        assert load_backbone(mine, input_size=32).class_names[0] == "class 0"


@pytest.mark.parametrize(
    "outputs, task, hint", [(1, "multiclass", "binary"), (3, "binary", "multi")]
)
def test_a_task_that_does_not_fit_the_outputs_is_refused(outputs, task, hint):
    with pytest.raises(ValueError, match=rf"task='{task}'.*has {outputs} outputs; choose {hint}"):
        small(outputs, task)
    with pytest.raises(ValueError, match="task: got 'ranking'"):
        small(outputs, "ranking")


@pytest.mark.parametrize(
    "outputs, task, score, p",
    [
        (4, "multilabel", "sigmoid", lambda z: z.double().sigmoid().amax(1)),
        (
            1,
            "binary",
            "binary",
            lambda z: torch.maximum(z.sigmoid(), (-z).sigmoid()).double()[:, 0],
        ),
        (4, "multiclass", "probability", lambda z: z.double().softmax(1).amax(1)),
    ],
)
def test_metrics_define_p_by_the_task_and_the_protocol_says_so(outputs, task, score, p):
    backbone = small(outputs, task)
    found = evaluate(
        backbone,
        {"gradcam": create_explainer("gradcam", backbone)},
        IMAGES,
        max_forward_batch=4,
        progress=False,
    )
    assert found.protocol.score == score and found.protocol.id.startswith(f"{score[:4]}-pred")
    z = backbone.model(backbone.normalize(IMAGES))
    assert np.allclose([r.p for r in found.images], p(z), atol=1e-6)
    # q of the masked image is of the same kind
    method = found.methods["gradcam"]
    target = torch.tensor([r.target for r in found.images])
    maps = create_explainer("gradcam", backbone).attribute(IMAGES, target)
    from xattn.eval.functional import saliency

    masked = IMAGES * saliency(maps, (64, 64))[0]
    q = backbone.probabilities(backbone.logits(masked)).gather(1, target[:, None])[:, 0]
    valid = method.valid
    assert valid.any()
    assert np.allclose(method.scores["q@100"][valid], q.numpy()[valid], atol=1e-6)


def test_protocols_of_different_tasks_have_different_ids():
    ids = {xattn.eval.Protocol(score=s).id for s in ("probability", "sigmoid", "binary")}
    assert len(ids) == 3


def test_multilabel_targets_take_turns_among_the_positive_labels():
    logits = torch.tensor([[3.0, 1.0, -1.0]]).repeat(4, 1)
    assert predicted_targets(logits, "multilabel").tolist() == [0, 1, 0, 1]
    assert predicted_targets(-logits.abs(), "multilabel").tolist() == [
        1,
        1,
        1,
        1,
    ]  # none positive: the top one
    assert predicted_targets(logits, "multiclass").tolist() == [0, 0, 0, 0]


def test_the_multilabel_loss_looks_at_the_target_alone():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 2, 1, 1])
    expected = -logits.sigmoid().gather(1, target[:, None]).log().mean()
    assert torch.allclose(classification_loss(logits, target, "multilabel"), expected)
    other = logits.clone()
    other[0, 1] += 5
    assert classification_loss(other, target, "multilabel") == pytest.approx(float(expected))


@pytest.mark.parametrize("outputs, task", [(1, "binary"), (4, "multilabel")])
def test_heads_of_both_fusions_get_gradients_on_other_tasks(outputs, task):
    backbone = small(outputs, task)
    for fusion in ("classifier", "per_class"):
        head = create_head("ttame", backbone, fusion=fusion).train()
        for mode in ("own", "batch", "top"):
            step = Step(head, backbone, IMAGES, TrainConfig("small", class_mode=mode))
            Mask().on_photos(step)["loss"].backward()
        grads = [p.grad for p in head.fusion.parameters() if p.grad is not None]
        assert grads and all(g.isfinite().all() for g in grads) and any(g.any() for g in grads)


def test_the_command_line_trains_explains_and_measures_a_multilabel_model(tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    shared = ["-b", "test_resnet", "--weights", str(tmp_path / "mine.pth"), "--task", "multilabel"]
    shared += ["--input-size", "64", "--device", "cpu"]
    run = [*shared, str(tmp_path), "--output", str(tmp_path / "run"), "--epochs", "1"]
    assert main(["train", *run, "--recipe", "small", "--workers", "0"]) == 0
    head = str(tmp_path / "run/head")
    out = str(tmp_path / "pack")
    assert (
        main(["explain", str(tmp_path), *shared, "--heads", head, "--output", out, "--top", "3"])
        == 0
    )
    pack = xattn.load_pack(out)
    assert sum(e.probability for e in pack if e.image_id == "0.png") != pytest.approx(1, abs=1e-3)
    assert pack[0].protocol["probability"] == "sigmoid" and pack[0].protocol["task"] == "multilabel"
    forgotten = [a for a in shared if a not in ("--task", "multilabel")]
    assert main(["explain", str(tmp_path), *forgotten, "--heads", head]) == 2
    assert "head was trained for task='multilabel'" in capsys.readouterr().err
    out = str(tmp_path / "eval")
    assert main(["evaluate", str(tmp_path), *shared, "--heads", head, "--output", out]) == 0
    assert (
        json.loads((tmp_path / "eval/results.json").read_text())["protocol"]["score"] == "sigmoid"
    )
    capsys.readouterr()


def test_an_adapter_may_have_no_parameters():
    class Means(torch.nn.Module):
        def forward_taps(self, x):
            return x.mean((2, 3)), [x]

    assert load_backbone(Means(), input_size=8).taps == ("adapter.0",)


# ------------------------------------------------------------------ torchvision


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_torchvision_models_give_logits_and_maps_in_one_pass(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=7).eval()
    x = torch.rand(2, 3, 96, 96)
    backbone = load_backbone(from_torchvision(model), input_size=96)
    taps = backbone(x)
    assert torch.allclose(taps.logits, model(backbone.normalize(x)), atol=1e-6)
    sides = [m.shape[-1] for m in taps.maps]
    assert len(sides) == 3 and sides == sorted(sides, reverse=True)
    heat = create_explainer("gradcam", backbone).attribute(x, torch.tensor([1, 6]))
    assert heat.shape == (2, 1, *taps.maps[-1].shape[2:])


def test_torchvision_taps_are_the_named_modules_outputs_and_gradcam_equals_autograd():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).eval()
    backbone = load_backbone(from_torchvision(model, ["layer3", "layer4"]), input_size=96)
    x = torch.rand(2, 3, 96, 96)
    seen = {}
    for name in ("layer3", "layer4"):
        getattr(model, name).register_forward_hook(lambda m, i, o, n=name: seen.update({n: o}))
    z = model(backbone.normalize(x).requires_grad_())
    for tap, name in zip(backbone(x).maps, seen, strict=True):
        assert torch.allclose(tap, seen[name], atol=1e-5)
    assert backbone.pools_linearly  # so CAM and the classifier fusion start from the classifier
    target = torch.tensor([4, 0])
    (grad,) = torch.autograd.grad(z.gather(1, target[:, None]).sum(), seen["layer4"])
    expected = (grad.mean((2, 3), keepdim=True) * seen["layer4"]).sum(1, keepdim=True).relu()
    found = create_explainer("gradcam", backbone).attribute(x, target)
    assert torch.allclose(found, expected, atol=1e-6) and found.any()


def test_a_torchvision_vit_gives_its_tokens_as_maps():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 16, 2, 2, 24, 48, num_classes=4).eval()
    torch.nn.init.normal_(model.heads.head.weight)
    names = [f"encoder.layers.encoder_layer_{i}.ln_1" for i in (0, 1)]
    preprocessing = xattn.Preprocessing(input_size=(32, 32))
    backbone = load_backbone(from_torchvision(model, names, preprocessing=preprocessing))
    seen = []
    model.encoder.layers.encoder_layer_1.ln_1.register_forward_hook(lambda m, i, o: seen.append(o))
    x = torch.rand(3, 3, 32, 32)
    model(backbone.normalize(x))
    taps = backbone(x)
    assert taps.maps[1].shape == (3, 24, 2, 2)
    assert torch.allclose(taps.maps[1].flatten(2).transpose(1, 2), seen[0][:, 1:], atol=1e-6)
    head = create_head("ttame", backbone, fusion="per_class").eval()
    assert head(taps, torch.tensor([0, 1, 3])).shape == (3, 1, 2, 2)
    assert create_explainer("gradcam", backbone).attribute(x, 1).shape == (3, 1, 2, 2)


def test_patches_that_tokens_follow_are_no_default_taps():
    class Patches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.norm = torch.nn.Conv2d(3, 8, 16, 16), torch.nn.LayerNorm(8)
            self.fc = torch.nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(self.norm(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

    with pytest.raises(ValueError, match=r"taps: Patches does not end in .*give its token nodes"):
        load_backbone(Patches(), mean=0.5, std=0.5)
    assert load_backbone(Patches(), taps="norm", mean=0.5, std=0.5).tap_sizes == ((14, 14),)
    swin = torchvision.models.SwinTransformer([4, 4], 12, [1, 1], [2, 2], [4, 4], num_classes=4)
    backbone = load_backbone(from_torchvision(swin))
    assert backbone.tap_sizes[-1] == (28, 28) and backbone.pools_linearly  # ends in a map


def test_a_tap_before_an_in_place_activation_is_the_modules_output():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3).eval()
    seen = {}
    for block in (0, 1):
        model.layer3[block].bn1.register_forward_hook(
            lambda m, i, o, n=block: seen.update({n: o.clone()})
        )
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    logits, maps = from_torchvision(model, ["layer3.0.bn1", "layer3.1.bn1"]).forward_taps(x)
    assert torch.allclose(logits, expected, atol=1e-6) and seen[0].min() < 0
    for block in (0, 1):
        assert torch.allclose(maps[block], seen[block], atol=1e-5)


def test_a_head_of_other_torchvision_taps_is_refused(tmp_path):
    model = torchvision.models.resnet18(num_classes=3)
    one, other = (
        load_backbone(from_torchvision(model, taps), input_size=64)
        for taps in (["layer3.0", "layer4"], ["layer3.1", "layer4"])
    )
    assert one.taps == ("layer3.0.relu", "layer4.1.relu")
    xattn.save_head(create_head("ttame", one, fusion="per_class"), tmp_path / "head")
    xattn.load_head(tmp_path / "head", one)
    with pytest.raises(ValueError, match=r"reads the taps \['layer3.0.relu', 'layer4.1.relu'\]"):
        xattn.load_head(tmp_path / "head", other)


def test_unknown_torchvision_names_taps_and_untraceable_modules_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"torchvision has no classifier 'resnet19'.*resnet18"):
        load_backbone("torchvision/resnet19", weights=None)
    model = torchvision.models.resnet18(num_classes=2)
    with pytest.raises(
        ValueError, match=r"taps: 'layer9' is not in the graph; did you mean .*layer"
    ):
        from_torchvision(model, ["layer9"])
    with pytest.raises(ValueError, match=r"input_size: got \(64, 96\); .* a square"):
        load_backbone("torchvision/vit_b_16", weights=None, input_size=(64, 96))
    torch.save(model.state_dict(), tmp_path / "18.pth")
    with pytest.raises(ValueError, match=r"weights: .*18.pth does not fit .*give a file for this"):
        load_backbone("torchvision/squeezenet1_1", weights=tmp_path / "18.pth")
    with pytest.raises(ValueError, match="taps: 'fc' has shape"):
        from_torchvision(model, ["fc"])

    class Branching(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="cannot trace Branching.*forward_taps"):
        from_torchvision(Branching())
    torch.save(torchvision.models.resnet34(num_classes=2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit torchvision's resnet18"):
        load_backbone("torchvision/resnet18", weights=tmp_path / "other.pth")


def test_photos_are_prepared_as_torchvision_does():
    pixels = np.random.default_rng(1).integers(0, 256, (301, 417, 3), dtype=np.uint8)
    for name in ("squeezenet1_1", "mobilenet_v2"):  # resized to 256 and to 232
        backbone = load_backbone(f"torchvision/{name}", weights=None)
        transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        found, _ = prepare(Image.fromarray(pixels), backbone.preprocessing)
        expected = transforms(Image.fromarray(pixels))
        assert torch.allclose(backbone.normalize(found[None])[0], expected, atol=1e-5)


def test_a_fine_tuned_torchvision_file_is_loaded_by_name(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    backbone = load_backbone("torchvision/resnet18", weights=tmp_path / "mine.pth", input_size=64)
    assert backbone.num_classes == 3 and backbone.preprocessing.interpolation == "bilinear"
    z = model(backbone.normalize(IMAGES))
    assert torch.allclose(backbone.logits(IMAGES), z, atol=1e-6)


# ------------------------------------------------------------------ sizes


def test_a_vit_of_dynamic_size_explains_other_and_oblong_sizes():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, dynamic_img_size=True)
    backbone = load_backbone(model, input_size=(96, 64))
    assert backbone.tap_sizes == ((6, 4),) * 3
    head = create_head("ttame", backbone, fusion="per_class").eval()
    for height, width in ((96, 64), (64, 128)):
        x = torch.rand(2, 3, height, width)
        taps = backbone(x)
        assert torch.allclose(taps.logits, model(backbone.normalize(x)), atol=1e-5)
        grid = (height // 16, width // 16)
        assert head(taps, 1).shape == (2, 1, *grid)
        assert create_explainer("gradcam", backbone).attribute(x, 1).shape == (2, 1, *grid)
    found = xattn.explain(Image.new("RGB", (90, 140), "red"), backbone, head)
    assert found[0].map.shape == (6, 4)


def test_a_vit_file_of_its_own_size_is_resized_and_one_of_another_size_loads_as_it_is(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "own.pth")
    side = model.patch_embed.img_size[0]
    backbone = load_backbone("test_vit", weights=tmp_path / "own.pth", input_size=side // 2)
    assert backbone.preprocessing.input_size == (side // 2, side // 2)
    model.set_input_size(img_size=side // 2)
    x = torch.rand(2, 3, side // 2, side // 2)
    assert torch.allclose(backbone.logits(x), model(backbone.normalize(x)), atol=1e-5)
    torch.save(model.state_dict(), tmp_path / "half.pth")
    again = load_backbone("test_vit", weights=tmp_path / "half.pth", input_size=side // 2)
    assert torch.equal(again.logits(x), backbone.logits(x))
    with pytest.raises(ValueError, match="does not fit test_vit"):
        load_backbone("test_vit", weights=tmp_path / "half.pth")


def test_a_cnn_takes_another_input_size():
    backbone = load_backbone("test_resnet", weights=None, input_size=(64, 128))
    taps = backbone(torch.rand(1, 3, 64, 128))
    assert all(m.shape[3] == 2 * m.shape[2] for m in taps.maps)


class Bare(torch.nn.Module):
    """An adapter with the one method that is asked for."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 16, 16)
        self.fc = torch.nn.Linear(6, 3)

    def forward_taps(self, x):
        maps = self.conv(x)
        return self.fc(maps.mean((2, 3))), [maps]


def test_a_module_with_forward_taps_alone_is_enough():
    backbone = load_backbone(Bare(), input_size=64)
    assert backbone.preprocessing.input_size == (64, 64) and backbone.num_classes == 3
    assert backbone(IMAGES).maps[0].shape == (5, 6, 4, 4)


def test_a_classifier_of_zeros_gives_flat_maps_and_no_nan():
    for name in ("test_vit", "test_resnet"):
        model = timm.create_model(name, num_classes=3)
        torch.nn.init.zeros_(model.get_classifier().weight)
        backbone = load_backbone(model, input_size=64)
        maps = create_head("ttame", backbone).eval()(backbone(IMAGES))
        assert maps.isfinite().all() and maps.std((2, 3)).max() < 1e-4
