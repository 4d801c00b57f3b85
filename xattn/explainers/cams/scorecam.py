"""Score-CAM: a channel's weight is the class logit of the image, masked with that channel's activation.

    map = ReLU( sum_c alpha_c f_c ),   alpha = softmax_c S(x o H_c),   H_c = minmax(upsample(f_c))

Wang et al., arXiv 1910.01279. The paper subtracts the logit of a baseline image from every S, which
the softmax cancels. Constant channels give no mask, so their weight is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xattn.backbone.taps import resized
from xattn.explainers.base import register_explainer
from xattn.explainers.cams.layers import LayerExplainer, axes_of
from xattn.explainers.gradients import probe_image
from xattn.explainers.masking.masked_passes import PerturbationExplainer


@register_explainer("scorecam", title="Score-CAM")
@dataclass(kw_only=True, eq=False, repr=False)
class ScoreCam(LayerExplainer, PerturbationExplainer):
    """Score-CAM: one forward pass per channel that is not constant.

    Args:
        layer, layers, reshape: see :class:`~xattn.explainers.cams.layers.LayerExplainer`.
        fill: the colour of masked pixels, ``"black"`` or ``"mean"``; the paper masks normalised images,
            which corresponds to ``"mean"``.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("scorecam", net, fill="black")
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 2, 2])
    """

    fill: Literal["black", "mean"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers:
            return
        with self._guard():
            blank = self._move(probe_image(self.backbone))
            self.forwards = 1 + self.reader.activations(blank).shape[1]

    def _explain(self, image: Tensor, classes: Tensor) -> Tensor:
        activations = self.reader.activations(image[None])[0].double()
        flat = activations.flatten(1)
        varies = (flat.amax(1) > flat.amin(1)).nonzero().flatten()
        if not len(varies):
            return activations.new_zeros(len(classes), *activations.shape[1:])

        def masks(index: Tensor) -> Tensor:
            channel = varies[index.to(varies.device)]
            up = resized(activations[channel, None], image.shape[1:])
            low, high = (of(up, axes_of(up), keepdim=True) for of in (torch.amin, torch.amax))
            return ((up - low) / (high - low)).to(image.dtype)

        scores = self._scores(image, classes, len(varies), masks, logits=True)
        weights = scores.softmax(0).to(activations.device)
        return torch.relu(torch.tensordot(weights.T, activations[varies], 1))
