"""The layer that CAM methods read: its activations, and gradients, as maps (B, C, h, w).

By default the map that a CNN pools; in a ViT the tokens after ``norm1`` of the last block, prefix
tokens left out, as a map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from xattn.backbone import Backbone


class LayerReader:
    """Reads a module's output, (B, C, h, w), or (B, N, C) tokens in a ViT.

    Raises:
        ValueError: ``layer`` is no module of the backbone, or has to be given and is not.
    """

    def __init__(self, backbone: Backbone, layer: nn.Module | None, method: str) -> None:
        if layer is None and backbone.adapter:
            layer = getattr(backbone.model, "gradcam_layer", None)
        if layer is None and backbone.adapter:
            raise ValueError(
                f"layer: {backbone.name} is no timm model, so {method} does not know its last map; "
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
        self.backbone, self.layer = backbone, layer
        self.name = next(name for name, m in backbone.named_modules() if m is layer)
        self.tokens = backbone.is_vit or bool(getattr(backbone.model, "token_taps", False))

    def activations(self, images: Tensor) -> Tensor:
        """(B, C, h, w) of images (B, 3, H, W)."""
        found: list[Tensor] = []
        handle = self.layer.register_forward_hook(lambda m, i, output: found.append(output))
        try:
            with torch.no_grad():
                self.backbone.logits(images)
        finally:
            handle.remove()
        return self.as_map(found[-1], images)

    def gradients(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and the gradients of the class's logit, both (B, C, h, w)."""
        # Imported late: captum takes longer to load than the maps take to compute.
        from captum._utils.gradient import compute_layer_gradients_and_eval

        gradients, values = compute_layer_gradients_and_eval(
            self.backbone.logits, self.layer, (images,), target
        )
        return self.as_map(values[0], images), self.as_map(gradients[0], images)

    def as_map(self, output: Tensor, images: Tensor) -> Tensor:
        """The layer's output as (B, C, h, w)."""
        if not self.tokens:
            if output.ndim != 4:
                raise ValueError(
                    f"layer: {self.backbone.name} ends in tokens, not in a (B, C, h, w) map; "
                    f"give layer=<a module with such an output>"
                )
            return output
        if output.ndim == 4:  # blocks that keep the grid, (B, h, w, C)
            return output.permute(0, 3, 1, 2)
        height, width = images.shape[-2:]
        if hasattr(getattr(self.backbone.model, "patch_embed", None), "dynamic_feat_size"):
            return self.backbone.tokens_to_map(output, self.backbone.grid(height, width))
        # Mixers and XCiT do not tell their grid: it has the image's aspect. Their prefix tokens, if
        # any, may join only after the blocks.
        for count in (output.shape[1] - self.backbone.prefix_tokens, output.shape[1]):
            rows = max(1, round((count * height / width) ** 0.5))
            if rows * (count // rows) == count:
                return self.backbone.tokens_to_map(output, (rows, count // rows))
        raise ValueError(
            f"layer: {output.shape[1]} tokens of {self.backbone.name} form no grid on images of "
            f"{height} x {width}; give layer=<a module whose output is (B, C, h, w)>"
        )

    def channel_axis(self, output: Tensor) -> int:
        """Which axis of the layer's output is the channels."""
        return output.ndim - 1 if self.tokens else 1
