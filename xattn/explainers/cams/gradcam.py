"""CAM methods that weight a layer's activations f by gradients g of the class logit.

    Grad-CAM    ReLU( sum_c mean(g_c) f_c )                        Selvaraju et al., arXiv 1610.02391
    Grad-CAM++  ReLU( sum_c sum_uv(alpha_c relu(g_c)) f_c )        Chattopadhay et al., arXiv 1710.11063
                alpha = g^2 / (2 g^2 + sum_ab(f) g^3) = 1 / (2 + sum_ab(f) g), 0 at a pole
    LayerCAM    ReLU( sum_c relu(g_c) f_c )                        Jiang et al., IEEE TIP 2021
    HiResCAM    ReLU( sum_c g_c f_c )                              Draelos & Carin, arXiv 2011.08891
    XGrad-CAM   ReLU( sum_c (sum_uv(g_c f_c) / sum_uv(f_c)) f_c )  Fu et al., BMVC 2020, arXiv 2008.02312

Grad-CAM++ takes the derivatives of exp(logit), whose common factor cancels. f (B, C, h, w) is the
layer of :mod:`xattn.explainers.cams.layers`. The ReLU is part of all these methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.explainers.base import register_explainer
from xattn.explainers.cams.layers import LayerExplainer, axes_of


@dataclass(kw_only=True, eq=False, repr=False)
class GradientCam(LayerExplainer):
    """Base class of these methods, which take one forward pass, and one backward pass down to the layer.

    Args:
        layer, layers, reshape: see :class:`~xattn.explainers.cams.layers.LayerExplainer`.
        relu: keep only positive evidence, as the papers do.
    """

    relu: bool = True

    def _layer_maps(self, images: Tensor, classes: Tensor) -> Tensor:
        return torch.cat([self._map(images, target) for target in classes.unbind(1)], 1)

    def _map(self, images: Tensor, target: Tensor) -> Tensor:
        """(b, 1, h, w) for the classes (b,)."""
        activations, gradients = self.reader.gradients(images, target)
        maps = (self._weights(activations, gradients) * activations).sum(1, keepdim=True).detach()
        return torch.relu(maps) if self.relu else maps

    def _weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        """One weight per channel, (B, C, 1, 1), or per channel and position, (B, C, h, w)."""
        raise NotImplementedError


@register_explainer("gradcam", title="Grad-CAM")
class GradCam(GradientCam):
    """Grad-CAM, with Captum's gradients.

    Args:
        layer, layers, reshape, relu: see :class:`GradientCam`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("gradcam", net, layer="layer3")
        >>> maps = method.attribute(torch.rand(2, 3, 64, 64), target=torch.tensor([0, 3]))
        >>> maps.shape, bool((maps >= 0).all())
        (torch.Size([2, 1, 4, 4]), True)
    """

    def _weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return gradients.mean(axes_of(gradients), keepdim=True)


@register_explainer("gradcam_plusplus", title="Grad-CAM++")
class GradCamPlusPlus(GradientCam):
    """Grad-CAM++: positions are weighted so that several objects of one class count equally.

    Args:
        layer, layers, reshape, relu: see :class:`GradientCam`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("gradcam_plusplus", net)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 2, 2])
    """

    def _weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        # The reduced fraction, because g^2 and g^3 of typical gradients underflow in float16.
        denominator = 2 + activations.sum(axes_of(activations), keepdim=True) * gradients
        alpha = torch.where(denominator != 0, 1 / denominator, 0.0)
        return (alpha * torch.relu(gradients)).sum(axes_of(activations), keepdim=True)


@register_explainer("layercam", title="LayerCAM")
class LayerCam(GradientCam):
    """LayerCAM: one weight per position, which makes early layers usable as well.

    Args:
        layer, layers, reshape, relu: see :class:`GradientCam`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("layercam", net, layer="layer1")
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 16, 16])
    """

    def _weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return torch.relu(gradients)


@register_explainer("hirescam", title="HiResCAM")
class HiResCam(GradientCam):
    """HiResCAM: the layer times its gradient at each position, (B, 1, h, w).

    If only average pooling and a linear layer follow and ``relu`` is False, the map sums to the logit
    without its bias and equals Grad-CAM.

    Args:
        layer, layers, reshape, relu: see :class:`GradientCam`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("hirescam", net, relu=False)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 2, 2])
    """

    def _weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        return gradients


@register_explainer("xgradcam", title="XGrad-CAM")
class XGradCam(GradientCam):
    """XGrad-CAM: Grad-CAM with gradients averaged in proportion to the channel's activation.

    As in HiResCAM, a channel's part of the map sums to sum(g f). If the rest of the network is linear,
    this is the drop in the logit when the channel is removed (sensitivity). If gradients are the
    same at all positions, the map equals Grad-CAM's. Activations of both signs, as in a ViT, may
    cancel in the denominator; where they sum to 0, the weight is 0.

    Args:
        layer, layers, reshape, relu: see :class:`GradientCam`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("xgradcam", net)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 2, 2])
    """

    def _weights(self, activations: Tensor, gradients: Tensor) -> Tensor:
        total = activations.sum(axes_of(activations), keepdim=True)
        weighted = (gradients * activations).sum(axes_of(activations), keepdim=True)
        return torch.where(total != 0, weighted / total, 0.0)
