"""Side: a narrow network beside the frozen one, which reads the output of each of its blocks (AutoGnothi).

    t_l = Block_l(t_{l-1} + GELU(W_l h_l)),    t_0 = 0,    S_k(n) = row(k) . MLP(LayerNorm(Block(t_L)))_n

h_l (C) are the tokens after block l of a ViT; all blocks of the side are C / 8 wide (Wang et al.,
AutoGnothi, ICLR 2025). Its last layer has an output for each class; here it reads them by the
classifier's rows (:class:`~xattn.heads.fusion.ClassifierFusion`), so that classes without photos have maps
too, unless ``fusion="per_class"``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from xattn.backbone import Backbone, Taps
from xattn.heads.base import Head, register_head
from xattn.heads.cross_attention import head_count
from xattn.heads.fusion import create_fusion
from xattn.runtime.option_checks import Count

NARROWER = 8  # times than the network


def token_mlp(width: int) -> nn.Sequential:
    """What follows the last block, token by token: C -> 4C -> 4C -> C."""
    layers = [nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU()]
    return nn.Sequential(
        *layers, nn.Linear(4 * width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
    )


def token_rows(taps: Taps) -> list[Tensor]:
    """The tokens (B, P + N, C) of each tap, prefix tokens first."""
    prefixes = taps.prefixes or (None,) * len(taps.maps)
    rows = [m.flatten(2).transpose(1, 2) for m in taps.maps]
    return [r if p is None else torch.cat([p, r], 1) for p, r in zip(prefixes, rows, strict=True)]


def on_grid(tokens: Tensor, taps: Taps) -> Tensor:
    """Tokens (B, P + N, C) -> the patches' (B, C, h, w)."""
    grid = taps.maps[0].shape[2:]
    return tokens[:, -grid.numel() :].transpose(1, 2).unflatten(2, grid)


def check_vit(name: str, backbone: Backbone) -> Any:
    """The ViT, if it has blocks that a head can read or copy."""
    model: Any = backbone.model
    if not backbone.is_vit or not hasattr(model, "blocks"):
        raise ValueError(
            f"head: {name!r} reads the blocks of a ViT, and {backbone.name} has none; train 'evidence' "
            f"or 'ttame'"
        )
    return model


@register_head("side", recipe="outcomes", taps="block")
class Side(Head):
    """The side head of a timm ViT; it reads the outputs of all blocks.

    Args:
        width: channels, a multiple of the attention heads, of which there is one for 64 channels of the
            network; by default about an eighth of the network's.
        fusion: ``"classifier"`` (ours) or ``"per_class"``, as published.
        explain_with: show raw ``"scores"`` or the ``"mask"`` sigmoid(scores). Both rank pixels alike.
    """

    def __init__(
        self,
        backbone: Backbone,
        width: Count | None = None,
        fusion: Literal["classifier", "per_class"] = "classifier",
        explain_with: Literal["scores", "mask"] = "scores",
    ) -> None:
        options = {"width": width, "fusion": fusion, "explain_with": explain_with}
        super().__init__(backbone, options)
        check_vit("side", backbone)
        heads = head_count(backbone.channels[0], None)
        width = width or max(1, backbone.channels[0] // NARROWER // heads) * heads
        if width % heads:
            raise ValueError(f"width: got {width}; give a multiple of the {heads} attention heads")
        self.inputs = nn.ModuleList(nn.Linear(c, width) for c in backbone.channels)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in backbone.taps)
        self.last = nn.Sequential(Block(width, heads, qkv_bias=True), token_mlp(width))
        self.fusion = create_fusion(fusion, backbone, [width], None, raw_last=False)

    def forward(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        t: Tensor | float = 0.0
        for layer, block, h in zip(self.inputs, self.blocks, token_rows(taps), strict=True):
            t = block(t + F.gelu(layer(h)))
        maps = on_grid(self.last(t), taps)
        return self.fusion([maps], class_index, (int(maps.shape[2]), int(maps.shape[3])))
