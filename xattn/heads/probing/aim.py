"""AIM's attentive probe (arXiv 2401.08541): batch-normalised tokens, learned queries, no W_q and W_o.

X' = BN(X),   z = mean_q concat_h W_v,h (A_qh X'),   A_qh = softmax(q_h (W_k,h X')^T / sqrt(d))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attended import AttentionTerms, Tokens
from xattn.heads.attentive import AttentiveHead, SharedOptions
from xattn.heads.base import register_head
from xattn.heads.cross_attention import CrossAttention
from xattn.heads.pullback import Step, mean
from xattn.runtime.option_checks import Count


@register_head("aim")
class Aim(AttentiveHead):
    """AIM's probe, with 2 D^2 + Q D parameters. In training, tokens are normalised with batch statistics.

    Args:
        heads: the number of attention heads; for None see
            :func:`~xattn.heads.cross_attention.head_count`.
        queries: Q, the number of queries; their outputs are averaged.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("aim", net, classes=5, heads=4)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: Count | None = None,
        queries: Count = 1,
        **shared: Unpack[SharedOptions],
    ) -> None:
        width = backbone.channels[-1]
        super().__init__(backbone, {"heads": heads, "queries": queries}, width, **shared)
        self.tokens_norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.attention = CrossAttention(width, heads, query=False, output=False)
        self.query = nn.Parameter(0.02 * torch.randn(1, queries, width))

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        x = tokens.patches[-1]
        x = self.tokens_norm(x.flatten(0, 1)).view_as(x)
        return AttentionTerms(self.attention.queries(self.query, x), x[:, None])

    def finish(self, pooled: Tensor, attended: AttentionTerms) -> Step:
        y, back = self.attention.project(pooled)
        z, pull = mean(y)
        return z, lambda rows: back(pull(rows))
