"""ONNX graphs that were changed by hand or by other tools: their ends, sizes, names, and hostile ones."""

import numpy as np
import pytest
import torch
from test_onnx import GIVEN, IMAGES, exported, refused, small
from torch import nn

from xattn import load_backbone
from xattn.explainers import create_explainer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
helper, numpy_helper = onnx.helper, onnx.numpy_helper


class Wide(nn.Module):
    """Logits far apart, so that probabilities taken for logits are seen; with an ``end``."""

    def __init__(self, end=None, mask=False):
        super().__init__()
        self.net, self.end = small(), end or nn.Identity()
        with torch.no_grad():
            self.net[-1].weight.mul_(20)
        self.register_buffer("mask", torch.arange(3)[:, None, None] > 0 if mask else None)

    def forward(self, x):
        if self.mask is not None:
            x = torch.where(self.mask, x, torch.zeros(()))
        return self.end(self.net(x))


class Divided(nn.Module):
    """A softmax of other operators."""

    def forward(self, z):
        return z.exp() / z.exp().sum(1, keepdim=True)


def graph_of(net, path, batch=None):
    return onnx.load(exported(net, path, batch))


def saved(model, path):
    onnx.save(model, str(path))
    return str(path)


@pytest.mark.parametrize(
    "kinds",
    [["Identity"], ["Cast"], ["Flatten"], ["Unsqueeze", "Squeeze"], ["Reshape", "Identity"]],
)
def test_a_softmax_before_operators_that_move_numbers_is_taken_off(kinds, tmp_path):
    net = Wide(nn.Softmax(1))
    model = graph_of(net, tmp_path / "net.onnx")
    wanted, last = model.graph.output[0].name, model.graph.node[-1]
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([2]), "axes"),
            numpy_helper.from_array(np.array([0, 4]), "shape"),
        ]
    )
    last.output[0] = "part 0"
    for i, kind in enumerate(kinds):
        more = {"Unsqueeze": ["axes"], "Squeeze": ["axes"], "Reshape": ["shape"]}.get(kind, [])
        output = wanted if i == len(kinds) - 1 else f"part {i + 1}"
        node = helper.make_node(
            kind, [f"part {i}", *more], [output], **({"to": 1} if kind == "Cast" else {})
        )
        model.graph.node.append(node)
    backbone = load_backbone(saved(model, tmp_path / "moved.onnx"), **GIVEN)
    expected = net(backbone.normalize(IMAGES)).double()
    assert torch.allclose(backbone.probabilities(backbone.logits(IMAGES)), expected, atol=1e-5)


def test_a_label_beside_the_probabilities_is_left_out(tmp_path):
    net = Wide(nn.Softmax(1))
    model = graph_of(net, tmp_path / "net.onnx")
    label = helper.make_tensor_value_info("label", onnx.TensorProto.INT64, ["n"])
    model.graph.node.append(helper.make_node("ArgMax", [model.graph.output[0].name], ["label"], axis=1, keepdims=0))  # fmt: skip
    model.graph.output.insert(0, label)
    backbone = load_backbone(saved(model, tmp_path / "two.onnx"), **GIVEN)
    expected = net(backbone.normalize(IMAGES)).double()
    assert torch.allclose(backbone.probabilities(backbone.logits(IMAGES)), expected, atol=1e-5)


def test_answers_that_are_no_logits_are_refused(tmp_path):
    path = tmp_path / "net.onnx"
    exported(Wide(Divided()), path)
    refused(path, "returns probabilities that are not from a Softmax")
    for batch in (None, 1):
        exported(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()), path, batch)
        refused(path, r"returns \(\d, 5, 30, 30\) for .* images; give a classifier")
    model = graph_of(small(), path)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, -1]), "one row"))
    last = model.graph.node[-1]
    output, last.output[0] = last.output[0], "before"
    model.graph.node.append(helper.make_node("Reshape", ["before", "one row"], [output]))
    refused(saved(model, path), r"returns \(1, 8\) for 2 images")


def test_a_size_of_minus_one_is_open(tmp_path):
    net, path = small(), tmp_path / "net.onnx"
    model = graph_of(net, path)
    for i in (0, 2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[i].dim_value = -1
    saved(model, path)
    refused(path, "input_size: .* takes any")
    backbone = load_backbone(path, input_size=32, **GIVEN)
    assert torch.allclose(backbone.logits(IMAGES), net(backbone.normalize(IMAGES)), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["input", "output", "steps", "preprocessing", "keys", "constant_0"]
)
def test_a_node_may_have_any_name(name, tmp_path):
    model = graph_of(Wide(mask=True), tmp_path / "net.onnx")
    model.graph.node[-1].name = name
    backbone = load_backbone(saved(model, tmp_path / "named.onnx"), **GIVEN)
    assert create_explainer("gradcam", backbone).attribute(IMAGES, 1).shape[0] == 3


def test_constants_follow_the_network_to_another_device(tmp_path):
    backbone = load_backbone(exported(Wide(mask=True), tmp_path / "net.onnx", 1), **GIVEN)
    net = backbone.model.net.to("meta")
    assert net(IMAGES.to("meta")).shape == (3, 4)


# ------------------------------------------------------------------ hostile files


def bomb(model, leads, kind):
    """A graph that adds the first of 10^13 numbers to its logits, or lets them lead nowhere."""
    count = 10**13
    given = {"Range": [0, count, 1], "Expand": [[1.0], [count]], "Tile": [[1.0], [count]]}[kind]
    for i, value in enumerate(given):
        array = np.array(
            value, dtype=np.float32 if isinstance(value, list) and i == 0 else np.int64
        )
        model.graph.initializer.append(numpy_helper.from_array(array, f"given {i}"))
    names = [f"given {i}" for i in range(len(given))]
    added = [helper.make_node(kind, names, ["much"])]
    if leads:
        last = model.graph.node[-1]
        output, last.output[0] = last.output[0], "before"
        model.graph.initializer.append(numpy_helper.from_array(np.array(0), "zero"))
        added += [
            helper.make_node("Gather", ["much", "zero"], ["first"]),
            helper.make_node("Cast", ["first"], ["first float"], to=1),
        ]
        model.graph.node.append(helper.make_node("Add", ["before", "first float"], [output]))
    for node in reversed(added):
        model.graph.node.insert(0, node)
    return model


@pytest.mark.parametrize("kind", ["Range", "Expand", "Tile"])
def test_constants_that_would_fill_the_memory_are_not_computed(kind, tmp_path):
    path = tmp_path / "net.onnx"
    whole = graph_of(small(), path).SerializeToString()
    dead = bomb(onnx.ModelProto.FromString(whole), False, kind)
    assert load_backbone(saved(dead, path), **GIVEN).logits(IMAGES).shape == (3, 4)
    live = bomb(onnx.ModelProto.FromString(whole), True, kind)
    refused(saved(live, path), "is rejected: its constants")
    next(one for one in live.graph.node if one.op_type == "Conv").input[0] = "sine"
    live.graph.node.insert(0, helper.make_node("Sin", ["x"], ["sine"]))  # which does not convert
    refused(saved(live, path), "is rejected: its constants")


@pytest.mark.parametrize("sides", [[2**31, 3, 32, 32], [2, 3, 20_000, 20_000]])
def test_batches_and_images_that_would_fill_the_memory_are_refused(sides, tmp_path):
    model = graph_of(small(), tmp_path / "net.onnx")
    for one, side in zip(model.graph.input[0].type.tensor_type.shape.dim, sides, strict=True):
        one.dim_value = side
    refused(
        saved(model, tmp_path / "large.onnx"), "more than 134217728 numbers; export it for fewer"
    )
