"""Small networks, and the explainers of the registry that explain them."""

import timm
import torch
from small_detectors import torchvision_detector

from xattn import load_backbone
from xattn.detection import load_detector
from xattn.explainers import create_explainer, list_explainers
from xattn.explainers.base import EXPLAINERS
from xattn.models.agunet import AGUNet
from xattn.models.masks import MaskClassifier

PAIRS = [
    (name, kind)
    for name in list_explainers()
    for kind in EXPLAINERS.entry(name).networks
    if kind != "detector"  # tests/detection has these
]


def cheap(name, backbone, head=None):
    """The explainer of that name with the first options of its entry."""
    return create_explainer(name, backbone, head, **EXPLAINERS.entry(name).cases[0])


def made(kind):
    """A backbone of seven classes for images of 32 x 32; ``kind`` is "cnn", "vit", "masks" or
    "detector", whose classes are detections."""
    torch.manual_seed(0)
    if kind == "detector":
        detector = load_detector(torchvision_detector("fcos"), input_size=32)
        return detector.of(detector.best_candidates(torch.rand(3, 32, 32), 7))
    if kind == "masks":
        net = AGUNet(channels=3, masks=7, filters=(4, 8, 8))
        return load_backbone(MaskClassifier(net, (32, 32)), task="multiclass")
    if kind == "cnn":
        model = timm.create_model("test_resnet", num_classes=7)
    else:
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2,
            num_classes=7,
        )  # fmt: skip
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    # By default taps of so few blocks are their outputs, which say nothing of what a class token reads.
    return load_backbone(model, input_size=32, taps=None if kind == "cnn" else ["norm1.1"])
