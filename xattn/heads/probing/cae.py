"""The attentive probe of context autoencoders, CAE (arXiv 2202.03026).

    z = W_o concat_h W_v,h (A_h LN_v(X)),   A_h = softmax(W_q,h LN_q(q) (W_k,h LN_k(X))^T / sqrt(d))

q is a single learned query. Queries, values and output have biases, and there is no residual.
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
from xattn.runtime.option_checks import Count, Positive


@register_head("cae")
class Cae(AttentiveHead):
    """CAE's probe: query, keys and values each have a layer norm. It has 4 D^2 + 10 D parameters.

    Args:
        heads: the number of attention heads; for None see
            :func:`~xattn.heads.cross_attention.head_count`.
        eps: epsilon of the layer norms; 1e-5 as in the probing benchmark's "cae" (arXiv 2506.10178).
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("cae", net, classes=5)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    inert = ("norm_k.bias",)

    def __init__(
        self,
        backbone: Backbone,
        heads: Count | None = None,
        eps: Positive = 1e-5,
        **shared: Unpack[SharedOptions],
    ) -> None:
        width = backbone.channels[-1]
        super().__init__(backbone, {"heads": heads, "eps": eps}, width, **shared)
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width, eps=eps) for _ in range(3))
        self.attention = CrossAttention(width, heads, bias=True)

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        x = tokens.patches[-1]
        scores = self.attention.queries(self.norm_q(self.query), self.norm_k(x))
        return AttentionTerms(scores, self.norm_v(x)[:, None])

    def finish(self, pooled: Tensor, attended: AttentionTerms) -> Step:
        y, back = self.attention.project(pooled)
        z, pull = mean(y)
        return z, lambda rows: back(pull(rows))
