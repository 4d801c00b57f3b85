"""A vision transformer at a larger input whose position embeddings are repeated instead of resized.

A window of the training grid's size then holds every trained position exactly once, wherever it lies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def tile_positions(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Give a timm ViT another input size in place, its position embeddings repeated over the new grid.

    Raises:
        ValueError: the model has no learned position embedding on a grid of its own.
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
