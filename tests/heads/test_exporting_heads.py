"""Backbone and attentive head as one graph: the head's logits and its class maps."""

from __future__ import annotations

import pytest
import torch
from attentive_fakes import HEADS, make, read_by

from xattn.explaining.exporting import export
from xattn.heads.probed import probed

pytestmark = pytest.mark.slow


def pair(name):
    backbone = read_by(name)
    head = make(name, backbone)
    return probed(backbone, head), head


def assert_same(run, backbone, head):
    images = torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([4, 0, 2])
    with torch.no_grad():
        logits, maps = run(images, index)
        taps = backbone(images)
        torch.testing.assert_close(logits, taps.logits, rtol=1e-4, atol=1e-4)
        shown = head(taps, index)
        low, high = shown.amin((2, 3), keepdim=True), shown.amax((2, 3), keepdim=True)
        if head.name != "linear":  # reads the class token: maps of zeros
            expected = (shown - low) / (high - low)
            size = images.shape[2:]
            expected = torch.nn.functional.interpolate(expected, size, mode="bilinear")
            torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-3)


def test_a_probed_network_is_one_graph(tmp_path):
    backbone, head = pair("efficient_probe")
    path = export(backbone, head, tmp_path / "probed.pt2")
    assert_same(torch.export.load(path).module(), backbone, head)


@pytest.mark.parametrize("name", HEADS)
def test_every_head_goes_into_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    backbone, head = pair(name)
    path = export(backbone, head, tmp_path / "probed.onnx")
    session = runtime.InferenceSession(str(path))

    def run(images, index):
        values = session.run(None, {"images": images.numpy(), "class_index": index.numpy()})
        return [torch.from_numpy(v) for v in values]

    assert_same(run, backbone, head)
