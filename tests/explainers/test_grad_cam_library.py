"""Our Grad-CAM and pytorch-grad-cam's: one map, which the library scales to [0, 1] a second time."""

import pytest
import timm
import torch
import torch.nn.functional as F

from xattn import load_backbone
from xattn.explainers import create_explainer

library = pytest.importorskip("pytorch_grad_cam", reason="needs the extra bench")


def unit(maps):
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)


def upsampled(maps):
    return F.interpolate(maps, (64, 64), mode="bilinear")


@pytest.mark.parametrize("name", ["GradCAM", "GradCAMPlusPlus", "LayerCAM", "HiResCAM"])
def test_the_library_scales_once_more_after_upsampling(name):
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=5).eval()
    net.fc.weight.data *= (
        1e4  # the library adds 1e-7 to the largest value, which shows in tiny maps
    )
    backbone = load_backbone(net, input_size=64)
    images = torch.rand(3, 3, 64, 64)
    targets = [library.utils.model_targets.ClassifierOutputTarget(k) for k in (1, 2, 3)]
    with getattr(library, name)(net, [net.layer3]) as cam:
        theirs = torch.from_numpy(cam(backbone.normalize(images), targets))[:, None]
    method = {"GradCAMPlusPlus": "gradcam_plusplus"}.get(name, name.lower())
    ours = create_explainer(method, backbone, layer=net.layer3).attribute(
        images, torch.tensor([1, 2, 3])
    )
    once = upsampled(unit(ours))  # what explanation.numpy() shows
    torch.testing.assert_close(unit(once), theirs, atol=1e-4, rtol=1e-4)
    cell = 64 / ours.shape[-1]  # no pixel lies nearer to a cell's middle than half a pixel
    largest = 1 - (1 - 1 / (2 * cell)) ** 2
    assert once.max() < 1 and 1e-3 < (theirs - once).abs().max() <= largest + 1e-4
