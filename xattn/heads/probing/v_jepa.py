"""V-JEPA's attentive probe (arXiv 2404.08471): a cross-attention block with one learned query.

y = q + W_o concat_h W_v,h (A_h LN(X)),   z = y + MLP(LN(y))
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
from xattn.heads.pullback import Step, mean, mlp, residual
from xattn.runtime.option_checks import Count, Positive


@register_head("v_jepa")
class VJepa(AttentiveHead):
    """Cross-attention and MLP with residuals; the query's contribution to a logit belongs to ``rest``.

    Args:
        heads: the number of attention heads; for None see
            :func:`~xattn.heads.cross_attention.head_count`.
        mlp_ratio: the hidden width divided by D.
        eps: epsilon of both layer norms; 1e-5 as in the authors' code and the probing benchmark's "jepa"
            (arXiv 2506.10178).
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("v_jepa", net, classes=5)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    gated = True

    def __init__(
        self,
        backbone: Backbone,
        heads: Count | None = None,
        mlp_ratio: Positive = 4.0,
        eps: Positive = 1e-5,
        **shared: Unpack[SharedOptions],
    ) -> None:
        width = backbone.channels[-1]
        options = {"heads": heads, "mlp_ratio": mlp_ratio, "eps": eps}
        super().__init__(backbone, options, width, **shared)
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.tokens_norm = nn.LayerNorm(width, eps=eps)
        self.attention = CrossAttention(width, heads, bias=True)
        self.mlp = mlp(width, mlp_ratio, eps)

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        x = self.tokens_norm(tokens.patches[-1])
        return AttentionTerms(self.attention.queries(self.query, x), x[:, None])

    def finish(self, pooled: Tensor, attended: AttentionTerms) -> Step:
        y, back = self.attention.project(pooled)
        y, first = mean(self.query + y)
        z, pull = residual(y, self.mlp)
        return z, lambda rows: back(first(pull(rows)))
