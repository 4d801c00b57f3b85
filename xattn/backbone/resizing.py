"""A ViT at another resolution: the weights stay, and the positions are resized or repeated over the grid.

backbone = resized(backbone, 448)                    # 28 x 28 patches of 16 pixels
backbone = resized(backbone, 448, positions="tile")  # each window of 14 x 14 has the trained positions
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from xattn.backbone.backbone import Backbone
from xattn.photos.preprocessing import LARGEST_SIDE
from xattn.runtime.copies import shared_copy


def tile_positions(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Set another input size for a timm ViT in place, repeating its position embeddings over the new grid.

    Raises:
        ValueError: if the model has no learned position embedding on a grid.
    """
    embedding = getattr(model, "pos_embed", None)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if not isinstance(embedding, Tensor) or embedding.ndim != 3 or grid is None:
        raise ValueError(
            f"tile_positions: {type(model).__name__} has no position embedding on a grid; leave it out"
        )
    prefix = embedding.shape[1] - math.prod(grid)
    model.set_input_size(img_size=size)  # type: ignore[operator]
    rows, columns = (
        torch.arange(new, device=embedding.device) % old
        for new, old in zip(model.patch_embed.grid_size, grid, strict=True)  # type: ignore[union-attr,arg-type]
    )
    patches = embedding.detach()[:, prefix:].unflatten(1, tuple(grid))
    tiled = patches[:, rows][:, :, columns].flatten(1, 2)
    tiled = torch.cat([embedding.detach()[:, :prefix], tiled], 1)
    model.pos_embed = nn.Parameter(tiled, requires_grad=embedding.requires_grad)
    return model


POSITIONS = ("resize", "tile")


def resized(backbone: Backbone, size: int | tuple[int, int], positions: str = "resize") -> Backbone:
    """Create a backbone for images of ``size`` that shares all weights except the positions; ``backbone``
    is not changed.

    Args:
        backbone: a timm ViT.
        size: (H, W) in pixels, or one number for a square.
        positions: "resize" interpolates the positions as ``load_backbone(input_size=...)`` does. "tile"
            repeats the trained grid, so that a window of the grid's size contains each trained position
            exactly once, wherever the window is.

    Raises:
        ValueError: if ``size`` is not a multiple of the patch size, the model is not a timm ViT, or it has
            no positions to tile.

    Example:
        >>> import torch, xattn
        >>> from xattn.backbone import resized
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> resized(net, 64).logits(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 1000])
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions: got {positions!r}; choose 'resize' or 'tile'")
    sides = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if not 1 <= min(sides) <= max(sides) <= LARGEST_SIDE:
        raise ValueError(f"size: got {size}; give 1 to {LARGEST_SIDE} pixels, one number or (H, W)")
    if sides == tuple(backbone.preprocessing.input_size):
        return backbone
    model: Any = backbone.model
    if not hasattr(model, "set_input_size") or not backbone.is_vit:
        raise ValueError(f"size: {backbone.name} accepts only one size; choose a timm ViT")
    if positions == "tile" and not isinstance(getattr(model, "pos_embed", None), Tensor):
        raise ValueError(
            f"positions: {backbone.name} adds no trained positions to its tokens; choose 'resize'"
        )
    copied = shared_copy(model)
    try:
        if positions == "tile":
            tile_positions(copied, sides)
        else:
            copied.set_input_size(img_size=sides)
        preprocessing = replace(backbone.preprocessing, input_size=sides)
        return Backbone(
            copied, backbone.name, preprocessing, backbone.taps, backbone.class_names, backbone.task
        )
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"size: {backbone.name} cannot take {sides} ({reason})") from error
