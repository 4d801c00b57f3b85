"""Grad-CAM through Captum: ReLU( sum_c a_c f_c ), a_c the mean gradient of the class logit.

Selvaraju et al., arXiv 1610.02391. f (B, C, h, w) is the map that a CNN pools; in a ViT the tokens
after ``norm1`` of the last block, prefix tokens left out, as a map. The ReLU is part of the method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from xattn.explainers.base import Explainer, register_explainer

if TYPE_CHECKING:
    from xattn.backbone import Backbone
    from xattn.heads import Head


@register_explainer("gradcam")
class GradCam(Explainer):
    """Grad-CAM (Captum's): one forward pass and a backward pass as far as the layer.

    Args:
        layer: the module whose output is read, (B, C, h, w), or (B, N, C) tokens in a ViT; by
            default the pooled map of a CNN, ``blocks[-1].norm1`` of a ViT.
        relu: keep only positive evidence, as the paper does.
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
        if layer is None and backbone.adapter:
            layer = getattr(backbone.model, "gradcam_layer", None)
        if layer is None and backbone.adapter:
            raise ValueError(
                f"layer: {backbone.name} is no timm model, so gradcam does not know its last map; "
                f"give layer=<the module whose output is (B, C, h, w)>"
            )
        if layer is not None and not any(layer is m for m in backbone.modules()):
            raise ValueError(f"layer: {type(layer).__name__} is not a module of {backbone.name}")
        if layer is None:
            layer = (
                backbone.model.blocks[-1].norm1  # type: ignore[index,union-attr]
                if backbone.is_vit
                else backbone.head_point
            )
        self.layer = layer
        self.relu = relu
        self.reads_tokens = backbone.is_vit or getattr(backbone.model, "token_taps", False)

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        # Imported late: captum takes longer to load than the maps take to compute.
        from captum._utils.gradient import compute_layer_gradients_and_eval
        from captum.attr import LayerGradCam

        if not self.reads_tokens:
            captum = LayerGradCam(self.backbone.logits, self.layer)
            maps = captum.attribute(images, target, relu_attributions=self.relu)
            if maps.ndim != 4:  # type: ignore[union-attr]
                raise ValueError(
                    f"layer: {self.backbone.name} ends in tokens, not in a (B, C, h, w) map; "
                    f"give layer=<a module with such an output>"
                )
            return maps.detach()  # type: ignore[union-attr]
        gradients, values = compute_layer_gradients_and_eval(
            self.backbone.logits, self.layer, (images,), target
        )
        gradient, value = (self._as_map(t[0], images) for t in (gradients, values))
        weights = gradient.mean((2, 3), keepdim=True)
        maps = (weights * value).sum(1, keepdim=True).detach()
        return torch.relu(maps) if self.relu else maps

    def _as_map(self, tokens: Tensor, images: Tensor) -> Tensor:
        if tokens.ndim == 4:  # blocks that keep the grid, (B, h, w, C)
            return tokens.permute(0, 3, 1, 2)
        height, width = images.shape[-2:]
        if hasattr(getattr(self.backbone.model, "patch_embed", None), "dynamic_feat_size"):
            return self.backbone.tokens_to_map(tokens, self.backbone.grid(height, width))
        # Mixers and XCiT do not tell their grid: it has the image's aspect. Their prefix tokens, if
        # any, may join only after the blocks.
        for count in (tokens.shape[1] - self.backbone.prefix_tokens, tokens.shape[1]):
            rows = max(1, round((count * height / width) ** 0.5))
            if rows * (count // rows) == count:
                return self.backbone.tokens_to_map(tokens, (rows, count // rows))
        raise ValueError(
            f"layer: {tokens.shape[1]} tokens of {self.backbone.name} form no grid on images of "
            f"{height} x {width}; give layer=<a module whose output is (B, C, h, w)>"
        )
