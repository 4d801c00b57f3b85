"""Segmentation networks, logits (B, K, h, w), as backbones.

    backbone = load_backbone(fcn_resnet50(weights="DEFAULT"))
    explain("photo.jpg", backbone, explainer="gradcam", target=at_mask(12, mask))

As a classifier, a network answers for class k the mean log-odds of the pixels where it is the likeliest
answer above one half, or the largest log-odds where there is no such pixel: above 0 exactly where there is
such a pixel, as for masks of :class:`~xattn.models.masks.MaskClassifier`. Its sigmoid is p.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xattn.photos.preprocessing import Preprocessing


class Segmenter(nn.Module):
    """A :class:`~xattn.backbone.TapModule` of torchvision's segmentation networks, and of those with the
    parts ``encoder``, ``decoder`` and ``segmentation_head`` (segmentation_models_pytorch).

    Its tap is the coarsest map of the features that the classifier reads.

    Args:
        net: gets normalised images (B, 3, H, W).
        preprocessing: by default 224 x 224 pixels, the whole photo's crop, ImageNet's mean and std.

    Raises:
        ValueError: a network with other parts.
    """

    default_task = "multilabel"

    def __init__(self, net: nn.Module, preprocessing: Preprocessing | None = None) -> None:
        super().__init__()
        if not is_segmentation(net):
            raise ValueError(
                f"net: a {type(net).__name__} has neither backbone and classifier (torchvision) nor "
                f"encoder, decoder and segmentation_head; give a module with forward_taps(x) and "
                f"forward_pixels(x)"
            )
        self.net = net
        # torchvision's weights were trained with ImageNet's mean and std; else that is a guess.
        self.assumes_preprocessing = preprocessing is None and not _of_torchvision(net)
        self.preprocessing = preprocessing or Preprocessing(interpolation="bilinear", crop_pct=1.0)
        self.tap_names = ["features"]
        self.gradcam_layer = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_taps(x)[0]

    def forward_taps(self, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        """The score (B, K) of each class, and the map that the classifier reads."""
        logits, maps = self.forward_pixels(x)
        return class_scores(logits), maps

    def forward_pixels(self, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        """Logits (B, K, H, W) of the pixels, and the map."""
        net: Any = self.net
        if hasattr(net, "segmentation_head"):
            features = list(net.encoder(x))
            features[-1] = self.gradcam_layer(features[-1])
            return net.segmentation_head(net.decoder(features)), (features[-1],)
        features = net.backbone(x)
        key = "high" if "high" in features else "out"  # LR-ASPP reads two maps
        features[key] = self.gradcam_layer(features[key])
        logits = net.classifier(features if key == "high" else features[key])
        size = x.shape[-2:]
        pixels = nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return pixels, (features[key],)


def is_segmentation(net: nn.Module) -> bool:
    """Whether :class:`Segmenter` knows the parts of a network."""
    smp = all(hasattr(net, part) for part in ("encoder", "decoder", "segmentation_head"))
    return smp or (_of_torchvision(net) and hasattr(net, "backbone") and hasattr(net, "classifier"))


def _of_torchvision(net: nn.Module) -> bool:
    return type(net).__module__.startswith("torchvision.models.segmentation")


def class_scores(logits: Tensor) -> Tensor:
    """(B, K, h, w) -> (B, K): mean log-odds of the pixels where class k has more than one half, or the
    largest where there is none."""
    odds = log_odds(logits).flatten(2)
    inside = odds > 0
    mean = (odds * inside).sum(2) / inside.sum(2).clamp(min=1)
    return torch.where(inside.any(2), mean, odds.amax(2))


def log_odds(logits: Tensor) -> Tensor:
    """log(p / (1 - p)) of the softmax over K classes, (B, K, ...); of a single mask the logit itself."""
    if logits.shape[1] == 1:
        return logits
    log_p = logits.log_softmax(1)
    return log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-7))
