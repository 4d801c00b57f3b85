"""Eigen-CAM: the activations' first principal component, the same for all classes.

    f (hw x C) = U S V^T,   map = f v_1

Muhammad and Yeasin, arXiv 2008.00299. The activations are not centred, as in the paper
(pytorch-grad-cam centres them). A singular vector has no sign of its own: it is chosen so that the map's
sum is positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.explainers.base import register_explainer
from xattn.explainers.layers import LayerExplainer


@register_explainer("eigencam")
class EigenCam(LayerExplainer):
    """Eigen-CAM: what activates the network, not what supports a class; no gradient is needed.

    Args:
        layer, layers, reshape: see :class:`~xattn.explainers.layers.LayerExplainer`.
    """

    @torch.no_grad()
    def _layer_maps(self, images: Tensor, classes: Tensor) -> Tensor:
        maps = [self._component(f) for f in self.reader.activations(images)]
        one = torch.stack(maps).to(torch.promote_types(images.dtype, torch.float32))
        return one.expand(-1, classes.shape[1], -1, -1)

    @staticmethod
    def _component(activations: Tensor) -> Tensor:
        """(C, h, w) -> (1, h, w) float64."""
        rows = activations.flatten(1).T.double()
        # The smaller of the two Gram matrices has the same largest singular value.
        if len(rows) <= rows.shape[1]:
            values, vectors = torch.linalg.eigh(rows @ rows.T)
            projected = vectors[:, -1] * values[-1].clamp_min(0).sqrt()
        else:
            projected = rows @ torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]
        sign = -1 if projected.sum() < 0 else 1
        return (sign * projected).view(1, *activations.shape[1:])
