"""Eigen-CAM: the activations' first principal component, alone or weighted by gradients.

    f, or f o g (hw x C) = U S V^T,   map = f v_1,  or (f o g) v_1

Muhammad and Yeasin, arXiv 2008.00299; the variant with the gradients g of a class logit comes from
pytorch-grad-cam. As in the paper, the activations are not centred (pytorch-grad-cam centres them). The sign
of a singular vector is arbitrary; here it is chosen so that Eigen-CAM's map has a positive sum, and so that
Eigen-Grad-CAM's map agrees in sign with HiResCAM, the sum over the channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.explainers.base import register_explainer
from xattn.explainers.cams.gradcam import GradientCam
from xattn.explainers.cams.layers import LayerExplainer


@register_explainer("eigencam", title="Eigen-CAM")
class EigenCam(LayerExplainer):
    """Eigen-CAM: where the layer is most active; the map does not depend on the class and needs no
    gradient.

    Args:
        layer, layers, reshape: see :class:`~xattn.explainers.cams.layers.LayerExplainer`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("eigencam", net)
        >>> image = torch.rand(1, 3, 64, 64)
        >>> torch.equal(method.attribute(image, 0), method.attribute(image, 9))  # any class
        True
    """

    @torch.no_grad()
    def _layer_maps(self, images: Tensor, classes: Tensor) -> Tensor:
        maps = [_component(f) for f in self.reader.activations(images)]
        maps = [-m if m.sum() < 0 else m for m in maps]
        one = torch.stack(maps).to(torch.promote_types(images.dtype, torch.float32))
        return one.expand(-1, classes.shape[1], *one.shape[2:])


@register_explainer("eigengradcam", title="Eigen-Grad-CAM")
class EigenGradCam(GradientCam):
    """Eigen-Grad-CAM: the strongest pattern common to the channels, each weighted by its gradient.

    Args:
        layer, layers, reshape, relu: see :class:`~xattn.explainers.cams.gradcam.GradientCam`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("eigengradcam", net)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 2, 2])
    """

    def _map(self, images: Tensor, target: Tensor) -> Tensor:
        activations, gradients = self.reader.gradients(images, target)
        maps = []
        for weighted in (activations.double() * gradients).detach():
            component = _component(weighted)
            along = (component * weighted.sum(0)).sum()
            maps.append(-component if along < 0 else component)
        stacked = torch.stack(maps).to(torch.promote_types(images.dtype, torch.float32))
        return torch.relu(stacked) if self.relu else stacked


def _component(channels: Tensor) -> Tensor:
    """The first principal component (1, h, w) of (C, h, w), float64, of either sign."""
    rows = channels.flatten(1).T.double()
    # The smaller of the two Gram matrices has the same largest singular value.
    if len(rows) <= rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        projected = vectors[:, -1] * values[-1].clamp_min(0).sqrt()
    else:
        projected = rows @ torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]
    return projected.view(1, *channels.shape[1:])
