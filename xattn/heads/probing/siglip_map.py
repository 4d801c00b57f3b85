"""SigLIP's multi-head attention pooling, MAP (arXiv 2303.15343; Set Transformer, 1810.00825).

y = W_o concat_h W_v,h (A_h X) with one learned query,   z = y + MLP(y)   or   z = y + MLP(LN(y))
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
from xattn.heads.pullback import Step, mean, mlp, residual
from xattn.runtime.option_checks import Count, Positive


@register_head("siglip_map")
class SiglipMap(AttentiveHead):
    """Attention pooling with a residual MLP, whose gates and norm are held constant in the shares.

    Args:
        heads: the number of attention heads, 8 in the probing benchmark; for None see
            :func:`~xattn.heads.cross_attention.head_count`.
        mlp_ratio: the hidden width divided by D.
        form: ``"benchmark"`` is the "siglip" of the probing benchmark (arXiv 2506.10178), without a
            norm before the MLP; ``"siglip"`` has SigLIP's own norm, with eps 1e-6.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("siglip_map", net, classes=5)
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
        form: Literal["benchmark", "siglip"] = "benchmark",
        **shared: Unpack[SharedOptions],
    ) -> None:
        width = backbone.channels[-1]
        options = {"heads": heads, "mlp_ratio": mlp_ratio, "form": form}
        super().__init__(backbone, options, width, **shared)
        self.attention = CrossAttention(width, heads, bias=True)
        self.query = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.mlp = mlp(width, mlp_ratio, 1e-6 if form == "siglip" else None)

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        x = tokens.patches[-1]
        return AttentionTerms(self.attention.queries(self.query, x), x[:, None])

    def finish(self, pooled: Tensor, attended: AttentionTerms) -> Step:
        y, back = self.attention.project(pooled)
        y, first = mean(y)
        z, pull = residual(y, self.mlp)
        return z, lambda rows: back(first(pull(rows)))
