"""CLIP's attention pooling (arXiv 2103.00020): multi-head attention of one query, then a projection.

    z = W_o concat_h W_v,h (A_h X),   A_h = softmax(W_q,h q (W_k,h X)^T / sqrt(d))

q is learned, or it is the mean token. This is also the multi-head cross-attention that serves as a baseline
for probing (arXiv 2506.10178), here with keys and values folded, see :mod:`xattn.heads.cross_attention`.
"""

from __future__ import annotations

from typing import Literal

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


@register_head("clip_pool")
class ClipPool(AttentiveHead):
    """CLIP's pooling, except that CLIP adds the mean to the tokens and gives them position embeddings.

    Args:
        heads: the number of attention heads; for None see
            :func:`~xattn.heads.cross_attention.head_count`.
        query: ``"learned"`` or ``"mean"``.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("clip_pool", net, classes=5)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: Count | None = None,
        query: Literal["learned", "mean"] = "learned",
        **shared: Unpack[SharedOptions],
    ) -> None:
        width = backbone.channels[-1]
        super().__init__(backbone, {"heads": heads, "query": query}, width, **shared)
        self.attention = CrossAttention(width, heads)
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width)) if query == "learned" else None

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        x = tokens.patches[-1]
        query = x.mean(1, keepdim=True) if self.query is None else self.query
        return AttentionTerms(self.attention.queries(query, x), x[:, None])

    def finish(self, pooled: Tensor, attended: AttentionTerms) -> Step:
        y, back = self.attention.project(pooled)
        z, pull = mean(y)
        return z, lambda rows: back(pull(rows))
