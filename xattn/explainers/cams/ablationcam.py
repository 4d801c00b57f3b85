"""Ablation-CAM: a channel's weight is the drop in the class logit when the channel is removed.

    map = ReLU( sum_c (y - y_c) / |y| f_c ),   y_c the logit with channel c of the layer set to 0

Desai and Ramaswamy, WACV 2020. The paper divides by y, which inverts the map if the logit is negative.
Here the divisor is |y| (1 if y = 0), which only scales the map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xattn.explainers.base import ImageByImage, register_explainer
from xattn.explainers.cams.layers import LayerExplainer
from xattn.explainers.gradients import probe_image
from xattn.runtime.memory import ForwardBatches


@register_explainer("ablationcam", title="Ablation-CAM")
class AblationCam(LayerExplainer, ImageByImage):
    """Ablation-CAM: one pass per channel.

    If the layer is the map that a CNN pools, only the classifier is run again. For other layers, and in
    ViTs, the whole network is run again, in micro-batches that all have the same shape.

    Args:
        layer, layers, reshape: see :class:`~xattn.explainers.cams.layers.LayerExplainer`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("ablationcam", net, layer="layer3")
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 4, 4])
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers:
            self.perturbs = any(part.perturbs for part in self._parts)
            return
        backbone = self.backbone
        self.classifier_only = backbone.has_pooled_tap and self.layer is backbone.head_point
        if not self.classifier_only:
            with self._guard():
                blank = self._move(probe_image(backbone))
                self.forwards = 1 + self.reader.activations(blank).shape[1]
            self.perturbs = True

    def _explain(self, image: Tensor, classes: Tensor) -> Tensor:
        """Maps (M, h, w) float64 of the classes (M,) for one image (3, H, W), all from the same
        passes."""
        activations, whole = self.reader.read(image[None])

        def ablated(index: Tensor) -> Tensor:
            if not self.classifier_only:
                return self._without(image, index)
            copies = activations.expand(len(index), *activations.shape[1:]).clone()
            copies[torch.arange(len(index), device="cpu"), index] = 0
            return self.backbone.head_logits(copies)

        y = whole[0, classes].double().cpu()
        scores = self._run(ablated, activations.shape[1], classes)
        weights = ((y - scores) / torch.where(y != 0, y.abs(), 1.0)).to(activations.device)
        return torch.relu(torch.tensordot(weights.T, activations[0].double(), 1))

    def _run(self, ablated: Callable[[Tensor], Tensor], channels: int, classes: Tensor) -> Tensor:
        """The logits (C, M) float64 with each channel removed in turn, in micro-batches of one shape."""
        steps = -(-channels // self.max_forward_batch)
        batches = ForwardBatches(-(-channels // steps))

        def step(index: Tensor) -> Tensor:
            repeats = torch.arange(batches.size, device="cpu").clamp_max(len(index) - 1)
            return ablated(index[repeats])[: len(index), classes].double().cpu()

        scores = torch.cat(batches.run(step, torch.arange(channels, device="cpu")))
        if batches.halved:
            self.max_forward_batch = batches.size
        return scores

    def _without(self, image: Tensor, index: Tensor) -> Tensor:
        """Logits (n, K) of n copies of the image; copy i has channel ``index[i]`` of the layer set to 0."""
        images = image.expand(len(index), *image.shape)

        def ablate(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            output = output.clone()
            rows = output.movedim(self.reader.channel_axis(output, images), 1)
            rows[torch.arange(len(index), device="cpu"), index] = 0
            return output

        handle = self.reader.layer.register_forward_hook(ablate)
        try:
            return self.backbone.logits(images)
        finally:
            handle.remove()
