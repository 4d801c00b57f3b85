"""Decoder: a small pyramid of convolutions over all taps, from the coarsest to the finest.

    d_i = up(d_{i+1}) + W_i f_i,    d_i <- d_i + conv3x3(GELU(norm(d_i))),    S_k = row(k) . d_1

Trained explainers of CNNs use such a decoder as one half of a U-Net (FastSHAP, ICLR 2022; "Learn to Rank",
ECCV 2026); here, the frozen network's features replace the other half, a separate encoder. Published
versions have an output or an embedding for each class; here the last layer uses the classifier's rows
(:class:`~xattn.heads.fusion.ClassifierFusion`), unless ``fusion="per_class"``.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from xattn.backbone import Backbone, Taps
from xattn.heads.base import Head, register_head
from xattn.heads.fusion import create_fusion, resize
from xattn.heads.maps.evidence import grid_size
from xattn.runtime.option_checks import Count


@register_head("decoder", cases=({"width": 4}, {"fusion": "per_class"}), recipe="outcomes")
class Decoder(Head):
    """The decoder head on the taps of ``backbone``; maps have at most 28 cells per side.

    Args:
        width: number of channels.
        fusion: ``"classifier"`` (ours) or ``"per_class"``, as published.
        explain_with: show raw ``"scores"`` or the ``"mask"`` sigmoid(scores). Both rank cells in the
            same order.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("decoder", net, width=16)
        >>> head(net(torch.rand(2, 3, 32, 32)), torch.tensor([3, 7])).shape
        torch.Size([2, 1, 2, 2])
    """

    def __init__(
        self,
        backbone: Backbone,
        width: Count = 64,
        fusion: Literal["classifier", "per_class"] = "classifier",
        explain_with: Literal["scores", "mask"] = "scores",
    ) -> None:
        options = {"width": width, "fusion": fusion, "explain_with": explain_with}
        super().__init__(backbone, options)
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1) for c in backbone.channels)
        self.refine = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, width),
                nn.GELU(),
                nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate"),
            )
            for _ in backbone.channels
        )
        self.fusion = create_fusion(fusion, backbone, [width], None, raw_last=False)

    def forward(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        size, d = grid_size(taps), None
        steps = list(zip(self.laterals, self.refine, taps.maps, strict=True))
        for lateral, refine, f in reversed(steps):
            x = lateral(f)
            d = x if d is None else x + resize(d, tuple(x.shape[2:]))
            d = d + refine(d)
        assert d is not None
        return self.fusion([resize(d, size)], class_index, size)
