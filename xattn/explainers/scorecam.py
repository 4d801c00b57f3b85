"""Score-CAM: each channel's activation masks the image, and the class logit says what it is worth.

    map = ReLU( sum_c alpha_c f_c ),   alpha = softmax_c S(x o H_c),   H_c = minmax(upsample(f_c))

Wang et al., arXiv 1910.01279. The paper subtracts the logit of a baseline image from every S, which
the softmax does not notice. Constant channels mask nothing and weigh 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xattn.explainers.base import register_explainer
from xattn.explainers.gradients import probe_image
from xattn.explainers.layers import LayerReader
from xattn.explainers.masked_passes import PerturbationExplainer

if TYPE_CHECKING:
    from xattn.backbone import Backbone
    from xattn.heads import Head


@register_explainer("scorecam")
class ScoreCam(PerturbationExplainer):
    """Score-CAM: one forward pass a channel that is not constant.

    Args:
        layer: as for Grad-CAM.
        fill: ``"black"`` or ``"mean"`` behind a mask; the paper masks normalised images, ``"mean"``.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head | None = None,
        seed: int = 0,
        max_forward_batch: int = 32,
        layer: nn.Module | None = None,
        fill: str = "mean",
    ) -> None:
        super().__init__(backbone, head, seed, max_forward_batch, fill)
        self.reader = LayerReader(backbone, layer, self.name)
        self.layer, self.layer_name = self.reader.layer, self.reader.name
        with self._guard():
            blank = self._move(probe_image(backbone))
            self.forwards = 1 + self.reader.activations(blank).shape[1]

    def _explain(self, image: Tensor, classes: Tensor) -> Tensor:
        activations = self.reader.activations(image[None])[0].double()
        flat = activations.flatten(1)
        varies = (flat.amax(1) > flat.amin(1)).nonzero().flatten()
        if not len(varies):
            return activations.new_zeros(len(classes), *activations.shape[1:])

        def masks(index: Tensor) -> Tensor:
            channel = varies[index.to(varies.device)]
            up = F.interpolate(activations[channel, None], image.shape[1:], mode="bilinear")
            low, high = up.amin((2, 3), keepdim=True), up.amax((2, 3), keepdim=True)
            return ((up - low) / (high - low)).to(image.dtype)

        scores = self._scores(image, classes, len(varies), masks, logits=True)
        weights = scores.softmax(0).to(activations.device)
        return torch.relu(torch.einsum("cm,chw->mhw", weights, activations[varies]))
