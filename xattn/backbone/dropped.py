"""Run a ViT on some of its patches: the other patches are left out, and nothing is filled in for them.

A dropped patch has no token in any block, as if the attention to it were masked everywhere. A pass with n
of N patches therefore costs about (1 + n) / (1 + N) of a pass with all of them. The class token and other
prefix tokens are kept, and every remaining patch keeps its position embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from xattn.backbone.backbone import Backbone
from xattn.photos.classes import as_classes
from xattn.runtime.locking import lock_of


def droppable_grid(backbone: Backbone) -> tuple[int, int]:
    """Return the grid (h, w) of patches of ``backbone``; :func:`logits_of_patches` can drop any of them.

    Raises:
        ValueError: if it is not a ViT that reads a class token, or if its attention was replaced.
    """
    model: Any = backbone.model
    reason = ""
    if type(backbone) is not Backbone:
        reason = "its output is not the network's own"
    elif not isinstance(model, VisionTransformer):
        reason = "it is not a timm ViT"
    elif model.global_pool != "token" or not model.num_prefix_tokens:
        reason = f"it pools its patches by {model.global_pool!r} and reads no class token"
    elif backbone.conversion is not None:
        reason = "its attention was converted to a mechanism that reads the whole grid"
    if reason:
        raise ValueError(
            f"fill: {backbone.name} cannot drop patches: {reason}; give black, blur or mean"
        )
    height, width = backbone.preprocessing.input_size
    return backbone.grid(height, width)


@torch.no_grad()
def logits_of_patches(backbone: Backbone, image: Tensor, kept: Tensor) -> Tensor:
    """Compute the logits (N, K) of an image of which only some patches are kept.

    Args:
        image: (1, 3, H, W) in [0, 1].
        kept: (N, n) patch numbers, counted row by row from the top left; n may be 0.

    Raises:
        ValueError: as in :func:`droppable_grid`.
    """
    droppable_grid(backbone)
    model: Any = backbone.model
    with lock_of(model).shared():
        tokens = model._pos_embed(model.patch_embed(backbone.normalize(image)))[0]
        prefix, patches = tokens[: model.num_prefix_tokens], tokens[model.num_prefix_tokens :]
        x = torch.cat([prefix.expand(len(kept), -1, -1), patches[kept]], 1)
        for block in [model.norm_pre, *model.blocks, model.norm]:
            x = block(x)
        return as_classes(model.forward_head(x), backbone.task)


def apply_by_set_size(kept: Sequence[Tensor], answers: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the results (N, ...) of ``answers`` for N sets of patch numbers.

    ``answers`` maps m sets of n numbers each, (m, n), to (m, ...); it is called once for each n."""
    found: dict[int, Tensor] = {}
    for count in sorted({len(numbers) for numbers in kept}):
        places = [i for i, numbers in enumerate(kept) if len(numbers) == count]
        found.update(zip(places, answers(torch.stack([kept[i] for i in places])), strict=True))
    return torch.stack([found[i] for i in range(len(kept))])
