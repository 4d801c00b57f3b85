"""Class activation map: the classifier's weights for a class, applied at every position of the last map.

    pooled maps     map_k = w_k . f
    a class token   map_k = w_k . (sum over the tapped blocks of what attention adds from each patch)

f (B, C, h, w) is the tensor that is average-pooled before the linear classifier: the mean of map_k over the
positions is the logit of class k without the bias (Zhou et al., arXiv 1512.04150).
:mod:`~xattn.heads.class_reading` covers other networks. Negative evidence is kept: there is no ReLU.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from xattn.backbone import Backbone, Taps
from xattn.explainers.base import Choose, Explainer, register_explainer
from xattn.heads.class_reading import class_reading


class TapsExplainer(Explainer):
    """Base class of explainers that compute maps of any classes from the taps of a single pass."""

    per_class = True

    @property
    def tapped(self) -> Backbone:
        """The backbone with the taps that this explainer reads."""
        return self.backbone

    @abstractmethod
    def _maps(self, taps: Taps, classes: Tensor) -> Tensor:
        """Classes (b, M) -> (b, M, h, w)."""

    @torch.no_grad()
    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self._maps(self.tapped(images), target[:, None])

    @torch.no_grad()
    def _attribute_classes(self, images: Tensor, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
        taps = self.tapped(images)
        classes = self._chosen(choose, taps.logits)
        return taps.logits, classes, self._maps(taps, classes)


@register_explainer("cam", title="CAM")
class Cam(TapsExplainer):
    """CAM without a ReLU, for networks with a linear classifier on pooled maps or on a class token.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("cam", net)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 2, 2])
    """

    clips = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reading = class_reading(self.backbone, "explainer: cam")

    def _maps(self, taps: Taps, classes: Tensor) -> Tensor:
        return self.reading.to(taps.logits.device).own(taps, classes)
