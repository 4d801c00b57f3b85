"""DELF's attention as used in DOLG (arXiv 1612.06321, 2108.02927): softplus weights and unit features.

f_n = BN(W x_n),   a_n = softplus(w . relu(f_n) + b),   z = 1/N sum_n a_n f_n / |f_n|
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attended import AttentionTerms, Tokens
from xattn.heads.attentive import AttentiveHead, SharedOptions
from xattn.heads.base import register_head
from xattn.runtime.option_checks import Count


@register_head("delf", cases=({"features": 24},))
class Delf(AttentiveHead):
    """Local features of one width, weighted by positive scores that do not sum to 1.

    Args:
        features: the width of the features; 1024 in the paper.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("delf", net, classes=5, features=64)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    def __init__(
        self, backbone: Backbone, features: Count = 1024, **shared: Unpack[SharedOptions]
    ) -> None:
        super().__init__(backbone, {"features": features}, features, **shared)
        self.feature = nn.Linear(backbone.channels[-1], features, bias=False)
        self.feature_norm = nn.BatchNorm1d(features)
        self.score = nn.Linear(features, 1)

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        f = self.feature(tokens.patches[-1])
        f = self.feature_norm(f.flatten(0, 1)).view_as(f)
        scores = self.score(F.relu(f)).transpose(1, 2)
        return AttentionTerms(scores, F.normalize(f, dim=-1)[:, None])

    def weights(self, scores: Tensor) -> Tensor:
        return F.softplus(scores) / scores.shape[-1]
