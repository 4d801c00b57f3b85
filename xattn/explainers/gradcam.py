"""CAM methods that weigh a layer's activations f by gradients g of the class logit.

    Grad-CAM    ReLU( sum_c mean(g_c) f_c )                        Selvaraju et al., arXiv 1610.02391
    Grad-CAM++  ReLU( sum_c sum_uv(alpha_c relu(g_c)) f_c )        Chattopadhay et al., arXiv 1710.11063
                alpha = g^2 / (2 g^2 + sum_ab(f) g^3) = 1 / (2 + sum_ab(f) g), 0 at a pole
    LayerCAM    ReLU( sum_c relu(g_c) f_c )                        Jiang et al., IEEE TIP 2021

Grad-CAM++ takes the derivatives of exp(logit), whose common factor drops out. f (B, C, h, w) is the
layer of :mod:`xattn.explainers.layers`. The ReLU is part of the methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from xattn.explainers.base import Explainer, register_explainer
from xattn.explainers.layers import LayerReader

if TYPE_CHECKING:
    from xattn.backbone import Backbone
    from xattn.heads import Head


class _GradientCam(Explainer):
    """One forward pass and a backward pass as far as the layer.

    Args:
        layer: the module whose output is read, (B, C, h, w), or (B, N, C) tokens in a ViT; by
            default the pooled map of a CNN, ``blocks[-1].norm1`` of a ViT.
        relu: keep only positive evidence, as the papers do.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head | None = None,
        seed: int = 0,
        max_forward_batch: int = 32,
        layer: nn.Module | None = None,
        relu: bool = True,
    ) -> None:
        super().__init__(backbone, head, seed, max_forward_batch)
        self.reader = LayerReader(backbone, layer, self.name)
        self.layer, self.layer_name = self.reader.layer, self.reader.name
        self.relu = relu

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        activations, gradients = self.reader.gradients(images, target)
        maps = (self._weights(activations, gradients) * activations).sum(1, keepdim=True).detach()
        return torch.relu(maps) if self.relu else maps

    def _weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """Of every channel, (B, C, 1, 1), or of every channel and place, (B, C, h, w)."""
        raise NotImplementedError


@register_explainer("gradcam")
class GradCam(_GradientCam):
    """Grad-CAM, with Captum's gradients."""

    def _weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return gradients.mean((2, 3), keepdim=True)


@register_explainer("gradcam_plusplus")
class GradCamPlusPlus(_GradientCam):
    """Grad-CAM++: places are weighed so that several objects of one class count alike."""

    def _weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        # The reduced fraction: g^2 and g^3 of usual gradients underflow in float16.
        denominator = 2 + activations.sum((2, 3), keepdim=True) * gradients
        alpha = torch.where(denominator != 0, 1 / denominator, 0.0)
        return (alpha * torch.relu(gradients)).sum((2, 3), keepdim=True)


@register_explainer("layercam")
class LayerCam(_GradientCam):
    """LayerCAM: a weight a place, so that early layers can be read, too."""

    def _weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return torch.relu(gradients)
