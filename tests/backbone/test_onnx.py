"""Classifiers in ONNX files: the converted network equals onnxruntime's, and the black box has what it needs."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

import xattn
from xattn import load_backbone
from xattn.backbone.families.onnx_models import OnnxClassifier
from xattn.cli import main
from xattn.explainers import create_explainer, list_explainers
from xattn.explainers.base import explainer_class
from xattn.packs.reader import Pack

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
GIVEN = {"mean": 0.5, "std": 0.5}


class Last(nn.Module):
    """Images (B, H, W, C), and probabilities at the end."""

    def __init__(self, end):
        super().__init__()
        self.conv, self.fc, self.end = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(6, 4), end

    def forward(self, x):
        return self.end(self.fc(self.conv(x.permute(0, 3, 1, 2)).relu().mean((2, 3))))


class Sine(nn.Module):
    def forward(self, x):
        return x.sin()


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))  # fmt: skip


def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2, num_classes=4
    )  # fmt: skip


def exported(net, path, batch=None, images=IMAGES, new=False):
    """``net`` in a file, for any batch or a fixed one, by the ``new`` exporter or the old, which is faster."""
    given = (images[: batch or 2],)
    if new:
        shapes = ({0: torch.export.Dim("batch")},) if batch is None else None
        about = {"dynamo": True, "dynamic_shapes": shapes, "external_data": False}
    else:
        axes = {"x": {0: "batch"}} if batch is None else None
        about = {"dynamo": False, "dynamic_axes": axes, "input_names": ["x"]}
    torch.onnx.export(net.eval(), given, str(path), verbose=False, **about)
    return str(path)


@pytest.fixture(scope="module")
def black_box(tmp_path_factory):
    """A backbone without gradients, and its network: Sin has no counterpart."""
    path = tmp_path_factory.mktemp("onnx") / "box.onnx"
    torch.manual_seed(0)
    net = nn.Sequential(Sine(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 4))
    exported(net, path, 1)
    with pytest.warns(UserWarning, match="without gradients.*Sin"):
        backbone = load_backbone(str(path), **GIVEN)
    return backbone, net


def squeezenet():
    torch.manual_seed(0)
    return torchvision.models.squeezenet1_1(num_classes=4)


@pytest.mark.parametrize(
    "make, batch, new",
    [
        (small, 1, False),
        (vit, None, False),
        (vit, 1, True),
        (squeezenet, None, True),
        (squeezenet, 1, False),
    ],
)
def test_a_converted_file_is_the_network_it_was_exported_from(make, batch, new, tmp_path):
    net = make()
    path = exported(net, tmp_path / "net.onnx", batch, new=new)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone = load_backbone(path, **GIVEN)
    own = load_backbone(net, input_size=32, **GIVEN)
    assert torch.allclose(backbone.logits(IMAGES), own.logits(IMAGES), atol=1e-4)
    x = create_explainer("input_x_gradient", backbone).attribute(IMAGES, 1)
    assert torch.allclose(
        x, create_explainer("input_x_gradient", own).attribute(IMAGES, 1), atol=1e-4
    )
    cam = create_explainer("gradcam", backbone).attribute(IMAGES, 1)
    assert cam.shape[0] == 3 and cam.shape[-1] > 1
    if make is small:
        assert torch.allclose(cam, create_explainer("gradcam", own).attribute(IMAGES, 1), atol=1e-5)
        named = create_explainer("gradcam", backbone, layer=backbone.taps[-1])
        assert torch.equal(named.attribute(IMAGES, 1), cam)


@pytest.mark.parametrize("end, task", [(nn.Softmax(1), "multiclass"), (nn.Sigmoid(), "multilabel")])
def test_channels_may_come_last_and_what_makes_p_of_logits_is_taken_off(end, task, tmp_path):
    net = Last(end)
    path = exported(net, tmp_path / "last.onnx", images=IMAGES.permute(0, 2, 3, 1))
    backbone = load_backbone(path, **GIVEN)
    assert backbone.task == task
    expected = net(backbone.normalize(IMAGES).permute(0, 2, 3, 1))
    assert torch.allclose(
        backbone.probabilities(backbone.logits(IMAGES)), expected.double(), atol=1e-5
    )


def test_a_black_box_answers_as_its_network_in_any_batch_also_when_copied(black_box, tmp_path):
    backbone, net = black_box
    expected = net(backbone.normalize(IMAGES))
    assert isinstance(backbone.model, OnnxClassifier)
    for other in (backbone, copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert torch.allclose(other.logits(IMAGES), expected, atol=1e-5)
        assert other.fingerprint == backbone.fingerprint
    changed = nn.Sequential(*net[:3], nn.Linear(48, 4))
    with pytest.warns(UserWarning, match="Sin"):
        again = load_backbone(exported(changed, tmp_path / "other.onnx", 1), **GIVEN)
    assert again.fingerprint != backbone.fingerprint


def test_methods_that_hide_pixels_and_metrics_run_on_a_black_box_others_say_why_not(black_box):
    backbone, net = black_box
    twin = load_backbone(_Pixels(net), input_size=32, **GIVEN)
    ran = set()
    for name in list_explainers():
        entry = explainer_class(name)
        if entry.needs_head or name in ("extremal_perturbation", "mda"):
            continue
        options = {"rise": {"masks": 20}, "lime": {"samples": 20}, "kernel_shap": {"samples": 20}}
        try:
            maps = create_explainer(name, backbone, **options.get(name, {})).attribute(
                IMAGES[:1], 1
            )
        except ValueError as error:
            assert "\n" not in str(error), name
            continue
        ran.add(name)
        if name in (*options, "occlusion"):
            own = create_explainer(name, twin, **options.get(name, {})).attribute(IMAGES[:1], 1)
            assert torch.allclose(maps, own, atol=1e-5), name
    assert ran >= {"occlusion", "rise", "lime", "kernel_shap"} and not ran & {"gradcam", "saliency"}
    with pytest.raises(ValueError, match="no gradients .*Sin.*; use a method that hides"):
        create_explainer("saliency", backbone).attribute(IMAGES, 1)
    rows, metrics = {"occlusion": "occlusion"}, "insertion-deletion"
    found = [
        xattn.evaluate(b, rows, IMAGES, metrics=metrics, progress=False) for b in (backbone, twin)
    ]
    tables = [one.to_pandas().select_dtypes("number").to_numpy() for one in found]
    assert np.allclose(*tables, atol=1e-4)


class _Pixels(nn.Module):
    """A network without a map of its own."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward_taps(self, x):
        return self.net(x), [x]


# ------------------------------------------------------------------ what is refused


def two_inputs(a, b):
    return a.mean((2, 3)) + b.mean((2, 3))


def refused(path, match, **options):
    with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
        load_backbone(str(path), **GIVEN, **options)
    assert "\n" not in str(error.value)


def test_files_that_are_no_classifiers_of_images_are_refused_in_one_line(tmp_path):
    refused(tmp_path / "none.onnx", "no file")
    path = tmp_path / "net.onnx"
    whole = open(exported(small(), path), "rb").read()
    for content in (b"", b"hello", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused(path, "not a complete ONNX file|takes no input|returns nothing")
    exported(nn.Linear(8, 2), path, images=torch.rand(2, 8))
    refused(path, r"takes .*single input of images")
    outside = onnx.load(exported(small(), path))
    del outside.graph.node[:]
    onnx.save(outside, path)
    refused(path, "not a complete|cannot run|returns")
    exported(small(), path)
    refused(path, "input_size: got .*64.* takes .*32", input_size=64)
    refused(path, "taps: .*nonsense", taps=["nonsense"])
    refused(path, "num_classes: ", num_classes=3)


def test_weights_outside_the_folder_of_a_file_are_not_read(tmp_path):
    model = onnx.load(exported(small(), tmp_path / "net.onnx"))
    (tmp_path / "secret").write_bytes(bytes(4096))
    (tmp_path / "in").mkdir()
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (tmp_path / "in" / "net.onnx").write_bytes(model.SerializeToString())
    refused(tmp_path / "in" / "net.onnx", "not a complete ONNX file")


def test_a_size_that_the_file_leaves_open_and_other_channels_are_asked_for(tmp_path):
    path = tmp_path / "any.onnx"
    net, x = nn.Sequential(nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.rand(2, 6, 32, 32)  # fmt: skip
    axes = {"x": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(
        net.eval(), (x,), str(path), dynamo=False, dynamic_axes=axes, input_names=["x"]
    )
    with pytest.raises(ValueError, match="input_size: .*--input-size"):
        load_backbone(path, **GIVEN)
    with pytest.raises(ValueError, match="mean: .* reads images of 6 channels"):
        load_backbone(path, input_size=32)
    backbone = load_backbone(path, input_size=32, **GIVEN)
    assert torch.allclose(backbone.logits(x), net(backbone.normalize(x)), atol=1e-5)


def test_the_command_explains_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 40), "teal").save("photo.jpg")
    exported(small(), "net.onnx", 1)
    line = "explain photo.jpg -b net.onnx --mean 0.5 --std 0.5 --output pack --explainers gradcam occlusion"
    main(line.split())
    assert Pack(tmp_path / "pack").methods == ("gradcam", "occlusion")
