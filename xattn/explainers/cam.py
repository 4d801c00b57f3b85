"""Class activation map: the classifier's weights of a class, applied at every position of the last map.

``map_k = w_k . f``, f (B, C, h, w) the tensor that is average-pooled before the linear classifier:
its mean over the positions is the logit of class k without the bias (Zhou et al., arXiv 1512.04150).
Negative evidence stays: no ReLU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.explainers.base import Choose, Explainer, register_explainer


@register_explainer("cam", networks=("cnn",))
class Cam(Explainer):
    """Unrectified CAM: for classifiers that end in average pooling and one linear layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        backbone = self.backbone
        if not backbone.pools_linearly:
            raise ValueError(
                f"explainer: cam needs average pooling and one linear layer after the tap 'head', "
                f"which {backbone.name} with taps {backbone.taps} does not have; use 'gradcam' or a head"
            )

    @torch.no_grad()
    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self._maps(self.backbone(images).maps[-1], target[:, None])

    @torch.no_grad()
    def _attribute_classes(self, images: Tensor, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
        taps = self.backbone(images)
        classes = self._chosen(choose, taps.logits)
        return taps.logits, classes, self._maps(taps.maps[-1], classes)

    def _maps(self, last: Tensor, classes: Tensor) -> Tensor:
        """(b, C, h, w) and classes (b, M) -> (b, M, h, w)."""
        weight = self.backbone.classifier_weight
        assert weight is not None
        return torch.einsum("bmc,bchw->bmhw", weight[classes].to(last.dtype), last)
