"""Ablation-CAM: a channel is worth what the class logit loses without it.

    map = ReLU( sum_c (y - y_c) / |y| f_c ),   y_c the logit with channel c of the layer set to 0

Desai and Ramaswamy, WACV 2020. The paper divides by y, which turns the map over where a logit is
negative; here it is |y|.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xattn.explainers.base import Explainer, register_explainer
from xattn.explainers.gradients import probe_image
from xattn.explainers.layers import LayerReader
from xattn.memory import ForwardBatches

if TYPE_CHECKING:
    from xattn.backbone import Backbone
    from xattn.heads import Head


@register_explainer("ablationcam")
class AblationCam(Explainer):
    """Ablation-CAM. On the map that a CNN pools only the classifier runs again, once a channel.

    Elsewhere (ViTs, other layers) the whole network does, in micro-batches of one shape.

    Args:
        layer: as for Grad-CAM.
    """

    one_by_one = True

    def __init__(
        self,
        backbone: Backbone,
        head: Head | None = None,
        seed: int = 0,
        max_forward_batch: int = 32,
        layer: nn.Module | None = None,
    ) -> None:
        super().__init__(backbone, head, seed, max_forward_batch)
        self.reader = LayerReader(backbone, layer, self.name)
        self.layer, self.layer_name = self.reader.layer, self.reader.name
        pooled = backbone.taps[-1] == "head" and not backbone.is_vit and not backbone.adapter
        self.classifier_only = pooled and self.layer is backbone.head_point
        if not self.classifier_only:
            with self._guard():
                blank = self._move(probe_image(backbone))
                self.forwards = 1 + self.reader.activations(blank).shape[1]
            self.perturbs = True

    @torch.no_grad()
    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        maps = [self._explain(x, k) for x, k in zip(images, target.tolist(), strict=True)]
        return torch.stack(maps).to(torch.promote_types(images.dtype, torch.float32))

    def _explain(self, image: Tensor, target: int) -> Tensor:
        """(1, h, w) float64 of one image (3, H, W)."""
        activations, whole = self.reader.read(image[None])
        channels = activations.shape[1]
        if self.classifier_only:

            def ablated(index: Tensor) -> Tensor:
                copies = activations.repeat(len(index), 1, 1, 1)
                copies[torch.arange(len(index)), index] = 0
                return self.backbone.head_logits(copies)

        else:

            def ablated(index: Tensor) -> Tensor:
                return self._without(image, index)

        y = float(whole[0, target].double())
        scores = self._run(ablated, channels, target)
        weights = (y - scores) / (abs(y) or 1.0)
        weighted = weights.to(activations.device)[:, None, None] * activations[0].double()
        return torch.relu(weighted.sum(0, keepdim=True))

    def _run(self, ablated: Callable[[Tensor], Tensor], channels: int, target: int) -> Tensor:
        """The logits (C,) float64 without each channel, in micro-batches of one shape."""
        steps = -(-channels // self.max_forward_batch)
        batches = ForwardBatches(-(-channels // steps))

        def step(index: Tensor) -> Tensor:
            repeats = torch.arange(batches.size).clamp_max(len(index) - 1)
            return ablated(index[repeats])[: len(index), target].double().cpu()

        scores = torch.cat(batches.run(step, torch.arange(channels)))
        if batches.halved:
            self.max_forward_batch = batches.size
        return scores

    def _without(self, image: Tensor, index: Tensor) -> Tensor:
        """Logits (n, K) of n copies of the image, of each of which one channel is 0."""

        def ablate(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            output = output.clone()
            rows = output.movedim(self.reader.channel_axis(output, image[None]), 1)
            rows[torch.arange(len(index)), index] = 0
            return output

        handle = self.layer.register_forward_hook(ablate)
        try:
            return self.backbone.logits(image.expand(len(index), -1, -1, -1))
        finally:
            handle.remove()
