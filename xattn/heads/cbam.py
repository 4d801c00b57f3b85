"""Convolutional block attention, CBAM (arXiv 1807.06521): gate channels, gate places, then average.

c = sigmoid(MLP(mean_n x_n) + MLP(max_n x_n)),                      x' = c o x
m = sigmoid(conv_7x7([max_channel x'; mean_channel x'])),           z = 1/N sum_n m_n x'_n
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attentive import Attended, AttentiveHead, Shared, Tokens
from xattn.heads.base import register_head
from xattn.heads.options import Count


@register_head("cbam")
class Cbam(AttentiveHead):
    """Weights are gates m_n / N, no softmax: they do not sum to 1.

    The channel gate is held in the shares. The 7 x 7 convolution reads neighbours, so the order of
    the patches counts. 2 D^2 / reduction + 98 parameters.

    Args:
        reduction: D over the hidden width of the channel gate's MLP; 16 in the paper.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Raises:
        ValueError: ``reduction`` does not divide the width.
    """

    permutes = False

    def __init__(self, backbone: Backbone, reduction: Count = 16, **shared: Unpack[Shared]) -> None:
        width = backbone.channels[-1]
        if width % reduction:
            raise ValueError(
                f"reduction: got {reduction}; tokens are {width} wide, choose a divisor of that"
            )
        super().__init__(backbone, {"reduction": reduction}, width, **shared)
        self.mlp = nn.Sequential(
            nn.Linear(width, width // reduction, bias=False),
            nn.ReLU(),
            nn.Linear(width // reduction, width, bias=False),
        )
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def attend(self, tokens: Tokens) -> Attended:
        x = tokens.patches[-1]
        channels = (self.mlp(x.mean(1)) + self.mlp(x.amax(1))).sigmoid()[:, None]
        gated = channels * x
        seen = torch.stack([gated.amax(-1), gated.mean(-1)], 1).unflatten(-1, tokens.grid)
        return Attended(self.conv(seen).flatten(2), gated[:, None])

    def weights(self, scores: Tensor) -> Tensor:
        return scores.sigmoid() / scores.shape[-1]
