"""The layer that CAM methods read: its activations, and gradients, as maps (B, C, h, w).

By default the map that a CNN pools; in a ViT the tokens after ``norm1`` of the last block, without
prefix tokens, as a map.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xattn.backbone import Backbone
from xattn.explainers.base import Explainer


class LayerReader:
    """Reads a module's output, (B, C, h, w), or (B, N, C) tokens in a ViT.

    Raises:
        ValueError: ``layer`` is not a module of the backbone, or is needed and was not given.
    """

    def __init__(self, backbone: Backbone, layer: nn.Module | None, method: str) -> None:
        if layer is None:
            layer = backbone.cam_layer
        if layer is None and backbone.adapter:
            layer = getattr(backbone.model, "gradcam_layer", None)
        if layer is None and backbone.adapter:
            raise ValueError(
                f"layer: {backbone.name} is not a timm model, so {method} does not know its last map; "
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
        return self.read(images)[0]

    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Activations (B, C, h, w) and logits (B, K) of one pass."""
        found: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found.append(output.clone())  # what follows may work in place

        handle = self.layer.register_forward_hook(keep)
        try:
            with torch.no_grad():
                logits = self.backbone.logits(images)
        finally:
            handle.remove()
        if not found:
            raise ValueError(
                f"layer: {self.name} is not called in a pass of {self.backbone.name}; give a layer "
                f"inside it"
            )
        return self.as_map(found[-1], images), logits

    def gradients(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and the gradients of the class's logit, both (B, C, h, w)."""
        # Imported late: captum takes longer to load than the maps take to compute.
        from captum._utils.gradient import compute_layer_gradients_and_eval

        try:
            gradients, values = compute_layer_gradients_and_eval(
                self.backbone.logits, self.layer, (images,), target
            )
        except AssertionError as error:
            raise ValueError(
                f"layer: {self.name} has no output to read in a pass of {self.backbone.name} "
                f"({error}); give a layer inside it"
            ) from None
        return self.as_map(values[0], images), self.as_map(gradients[0], images)

    def as_map(self, output: Tensor, images: Tensor) -> Tensor:
        """The layer's output as (B, C, h, w)."""
        if output.ndim == 4:
            return output.movedim(self.channel_axis(output, images), 1)
        height, width = images.shape[-2:]
        grids = []
        if output.ndim == 3 and self.tokens:
            if self.backbone.knows_grid:
                return self.backbone.tokens_to_map(output, self.backbone.grid(height, width))
            # Mixers and XCiT do not report their grid: it has the image's aspect ratio. Their prefix
            # tokens, if any, may join only after the blocks.
            grids = [output.shape[1] - self.backbone.prefix_tokens, output.shape[1]]
        for count in grids:
            rows = max(1, round((count * height / width) ** 0.5))
            if rows * (count // rows) == count:
                return self.backbone.tokens_to_map(output, (rows, count // rows))
        raise ValueError(
            f"layer: {self.name or type(self.layer).__name__} of {self.backbone.name} gives "
            f"{tuple(output.shape)} for images of {height} x {width}, which is not a map; give "
            f"layer=<a module whose output is (B, C, h, w)>"
        )

    def channel_axis(self, output: Tensor, images: Tensor) -> int:
        """The channel axis of (B, h, w, C) or (B, C, h, w): h and w have the image's aspect ratio."""
        if output.ndim == 3:
            return 2
        height, width = images.shape[-2:]

        def fits(h: int, w: int) -> bool:
            return abs(h * width - w * height) < max(height, width)

        first, last = fits(*output.shape[1:3]), fits(*output.shape[2:])
        if first and last:  # as many channels as positions along a side
            layout = isinstance(self.layer, nn.Conv2d | nn.BatchNorm2d | nn.Identity)
            first = not layout and (self.tokens or self.backbone.channels_last)
        return 3 if first else 1


@dataclass(kw_only=True, eq=False, repr=False)
class LayerExplainer(Explainer):
    """Base of explainers that read the activations of one layer.

    Args:
        layer: the module whose output is read, (B, C, h, w), or (B, N, C) tokens in a ViT; by
            default the pooled map of a CNN, ``blocks[-1].norm1`` of a ViT.
    """

    layer: nn.Module | None = None
    layer_name: str = field(init=False, default="")
    reader: LayerReader = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reader = LayerReader(self.backbone, self.layer, self.name)
        self.layer, self.layer_name = self.reader.layer, self.reader.name
