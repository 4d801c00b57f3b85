"""CoCa's attentional pooling (arXiv 2205.01917): several learned queries, with layer norms on both sides.

z = mean_q W_o concat_h W_v,h (A_qh LN(X)),   A_qh = softmax(W_q,h LN(q) (W_k,h LN(X))^T / sqrt(d))
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


@register_head("coca")
class Coca(AttentiveHead):
    """CoCa pools with 1 query for contrast and 256 for captions; here the queries' outputs are averaged.

    Args:
        queries: Q; every query uses all heads, so there are Q x heads maps.
        heads: the number of attention heads; for None see
            :func:`~xattn.heads.cross_attention.head_count`.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("coca", net, classes=5, queries=2)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    def __init__(
        self,
        backbone: Backbone,
        queries: Count = 4,
        heads: Count | None = None,
        **shared: Unpack[SharedOptions],
    ) -> None:
        width = backbone.channels[-1]
        super().__init__(backbone, {"queries": queries, "heads": heads}, width, **shared)
        self.queries = nn.Parameter(torch.randn(1, queries, width))
        self.norm_q, self.norm_k = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attention = CrossAttention(width, heads, bias=True)

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        x = self.norm_k(tokens.patches[-1])
        return AttentionTerms(self.attention.queries(self.norm_q(self.queries), x), x[:, None])

    def finish(self, pooled: Tensor, attended: AttentionTerms) -> Step:
        y, back = self.attention.project(pooled)
        z, pull = mean(y)
        return z, lambda rows: back(pull(rows))
