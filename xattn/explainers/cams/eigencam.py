"""Eigen-CAM: the activations' first principal component, alone or weighted by gradients.

    f, or f o g (hw x C) = U S V^T,   map = f v_1,  or (f o g) v_1

Muhammad and Yeasin, arXiv 2008.00299; the form with the gradients g of a class's logit is known from
pytorch-grad-cam. What is decomposed is not centred, as in the paper (pytorch-grad-cam centres it). A
singular vector has no sign of its own: it is chosen so that Eigen-CAM's map has a positive sum, and that
Eigen-Grad-CAM's goes along with the sum over the channels, HiResCAM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.explainers.base import register_explainer
from xattn.explainers.cams.gradcam import GradientCam
from xattn.explainers.cams.layers import LayerExplainer


@register_explainer("eigencam", title="Eigen-CAM")
class EigenCam(LayerExplainer):
    """Eigen-CAM: what activates the network, not what supports a class; no gradient is needed.

    Args:
        layer, layers, reshape: see :class:`~xattn.explainers.cams.layers.LayerExplainer`.
    """

    @torch.no_grad()
    def _layer_maps(self, images: Tensor, classes: Tensor) -> Tensor:
        maps = [_component(f) for f in self.reader.activations(images)]
        maps = [-m if m.sum() < 0 else m for m in maps]
        one = torch.stack(maps).to(torch.promote_types(images.dtype, torch.float32))
        return one.expand(-1, classes.shape[1], *one.shape[2:])


@register_explainer("eigengradcam", title="Eigen-Grad-CAM")
class EigenGradCam(GradientCam):
    """Eigen-Grad-CAM: the strongest common pattern of the channels, each weighted by its gradient.

    Args:
        layer, layers, reshape, relu: see :class:`~xattn.explainers.cams.gradcam.GradientCam`.
    """

    def _map(self, images: Tensor, target: Tensor) -> Tensor:
        activations, gradients = self.reader.gradients(images, target)
        maps = []
        for weighted in (activations.double() * gradients).detach():
            component = _component(weighted)
            along = (component * weighted.sum(0)).sum()
            maps.append(-component if along < 0 else component)
        found = torch.stack(maps).to(torch.promote_types(images.dtype, torch.float32))
        return torch.relu(found) if self.relu else found


def _component(channels: Tensor) -> Tensor:
    """(C, h, w) -> their first principal component (1, h, w), float64, of either sign."""
    rows = channels.flatten(1).T.double()
    # The smaller of the two Gram matrices has the same largest singular value.
    if len(rows) <= rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        projected = vectors[:, -1] * values[-1].clamp_min(0).sqrt()
    else:
        projected = rows @ torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]
    return projected.view(1, *channels.shape[1:])
