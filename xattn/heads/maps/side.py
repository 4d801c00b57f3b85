"""Side: a narrow network that runs beside the frozen one and reads the output of each of its blocks
(AutoGnothi).

    t_l = Block_l(t_{l-1} + GELU(W_l h_l)),    t_0 = 0
    S_k(n) = row(k) . MLP(LayerNorm(Block(LayerNorm(t_L))))_n

h_l (C) are the tokens after block l of a ViT. All blocks of the side network are C / 8 wide, and the last
one has no first norm (Wang et al., AutoGnothi, ICLR 2025). The paper's last layer has an output for each
class. Here it uses the classifier's rows (:class:`~xattn.heads.fusion.ClassifierFusion`), so that classes
without photos have maps too, unless ``fusion="per_class"``.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from xattn.backbone import Backbone, Taps
from xattn.backbone.taps import block_taps
from xattn.heads.base import Head, register_head
from xattn.heads.cross_attention import head_count
from xattn.heads.fusion import create_fusion
from xattn.runtime.option_checks import Count

NARROWER = 8  # the network's width over the side network's


def token_mlp(width: int) -> nn.Sequential:
    """The MLP after the last block, applied to each token: (B, N, C) -> 4C -> 4C -> (B, N, C)."""
    layers = [nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU()]
    return nn.Sequential(
        *layers, nn.Linear(4 * width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
    )


def tokens_of(taps: Taps) -> list[Tensor]:
    """The tokens (B, P + N, C) of each tap, prefix tokens first if the taps contain them."""
    prefixes = taps.prefixes or (None,) * len(taps.maps)
    rows = [m.flatten(2).transpose(1, 2) for m in taps.maps]
    return [r if p is None else torch.cat([p, r], 1) for p, r in zip(prefixes, rows, strict=True)]


@register_head("side", recipe="outcomes", taps=block_taps)
class Side(Head):
    """The side head of a ViT; it reads the outputs of all blocks.

    Args:
        width: number of channels, a multiple of the number of attention heads, which is one per 64 channels
            of the network; by default about an eighth of the network's width.
        fusion: ``"classifier"`` (ours) or ``"per_class"``, as published.
        explain_with: show raw ``"scores"`` or the ``"mask"`` sigmoid(scores). Both rank cells in the
            same order.

    Raises:
        ValueError: the network is not a ViT, or it has no single linear classifier and ``fusion`` is
            ``"classifier"``.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("side", net)
        >>> head(head.tapped(net)(torch.rand(2, 3, 32, 32)), torch.tensor([3, 7])).shape
        torch.Size([2, 1, 2, 2])
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
        if not backbone.is_vit:
            raise ValueError(
                f"head: 'side' reads the blocks of a ViT, but {backbone.name} has none; train 'evidence' "
                f"or 'ttame'"
            )
        heads = head_count(backbone.channels[0], None)
        width = width or max(1, backbone.channels[0] // NARROWER // heads) * heads
        if width % heads:
            raise ValueError(f"width: got {width}; give a multiple of the {heads} attention heads")
        self.inputs = nn.ModuleList(nn.Linear(c, width) for c in backbone.channels)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in backbone.taps)
        last = Block(width, heads, qkv_bias=True)
        last.norm1 = nn.Identity()
        self.last = nn.Sequential(nn.LayerNorm(width), last, token_mlp(width))
        self.fusion = create_fusion(fusion, backbone, [width], None, raw_last=False)

    def forward(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        """Scores (B, M or K, h, w) on the grid of patches."""
        self.check_taps(taps)
        size = int(taps.maps[0].shape[2]), int(taps.maps[0].shape[3])
        t: Tensor | float = 0.0
        for layer, block, h in zip(self.inputs, self.blocks, tokens_of(taps), strict=True):
            t = block(t + F.gelu(layer(h)))
        return self.fusion([Backbone.tokens_to_map(self.last(t), size)], class_index, size)
