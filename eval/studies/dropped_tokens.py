"""A plain ViT on some of its tokens: tokens that are not kept leave the sequence and are not filled in.

Tokens are grouped into square cells. An order of the cells is measured by insertion, which is p of a
class while the first k cells are kept, and by deletion, which is p while all the others are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from xattn.backbone import Backbone


def steps_of(cells: int) -> tuple[int, ...]:
    """The numbers of cells that are kept when an order of ``cells`` is measured: the first few one by
    one, then in steps.

    >>> steps_of(10)
    (0, 1, 2, 3, 4, 6, 8, 10)
    """
    few = [0, 1, 2, 3, 4, 6, *range(8, cells, 4)]
    return (*(k for k in few if k < cells), cells)


class Curves(NamedTuple):
    """Curves of B orders after each of S steps, all (B, S): p of the class with the first cells ``kept``,
    p with them ``left`` out, and whether the class is the likeliest with them kept, ``same``."""

    kept: Tensor
    left: Tensor
    same: Tensor


class DroppedTokens:
    """A ViT whose tokens are grouped into ``cells`` x ``cells`` cells."""

    def __init__(self, backbone: Backbone, cells: int = 7) -> None:
        model: Any = backbone.model
        if not isinstance(model, VisionTransformer) or backbone.task != "multiclass":
            raise ValueError(
                f"backbone: {backbone.name} is no plain ViT with one class a photo; give one, such as "
                f"vit_tiny_patch16_224"
            )
        height, width = backbone.grid(*backbone.preprocessing.input_size)
        if height % cells or width % cells:
            raise ValueError(
                f"cells: got {cells}; give a divisor of the grid, {height} x {width} tokens"
            )
        self.backbone, self.model, self.cells = backbone, model, cells
        of_cell = torch.arange(height * width, device="cpu").view(
            cells, height // cells, cells, width // cells
        )
        self.tokens_of = of_cell.transpose(1, 2).reshape(cells**2, -1) + backbone.prefix_tokens

    @torch.no_grad()
    def embedded(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) -> the first block's input (B, P + N, C), and the logits (B, K)."""
        found: list[Tensor] = []
        hook = self.model.blocks[0].register_forward_pre_hook(
            lambda module, inputs: found.append(inputs[0])
        )
        try:
            logits = self.backbone.logits(images)
        finally:
            hook.remove()
        return found[0], logits

    @torch.no_grad()
    def logits(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """Logits (B, K) of ``tokens`` (B, P + N, C) with only the cells ``kept`` (B, n)."""
        rows = self.tokens_of.to(kept.device)[kept].flatten(1)
        prefix = torch.arange(self.backbone.prefix_tokens, device=rows.device)
        index = torch.cat([prefix.expand(len(rows), -1), rows], 1).to(tokens.device)
        x = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))
        for block in self.model.blocks:
            x = block(x)
        return self.model.forward_head(self.model.norm(x))  # type: ignore[no-any-return]

    def curves(
        self, tokens: Tensor, orders: Tensor, classes: Tensor, steps: Sequence[int]
    ) -> Curves:
        """The curves of p of ``classes`` (B,) under ``orders`` (B, cells^2); see :class:`Curves`."""
        kept, left, same = [], [], []
        for k in steps:
            p = self.logits(tokens, orders[:, :k]).double().softmax(1)
            same.append(p.argmax(1) == classes)
            kept.append(p.gather(1, classes[:, None])[:, 0])
            p = self.logits(tokens, orders[:, k:]).double().softmax(1)
            left.append(p.gather(1, classes[:, None])[:, 0])
        return Curves(torch.stack(kept, 1), torch.stack(left, 1), torch.stack(same, 1))


def area(p: Tensor, steps: Sequence[int]) -> Tensor:
    """Area under p (..., S) over the share of cells, 0 to 1, by the trapezoidal rule."""
    at = torch.tensor(steps, dtype=torch.float64, device=p.device)
    return torch.trapezoid(p.double(), at / at[-1], dim=-1)
