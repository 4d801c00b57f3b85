"""LAMA: low-rank multi-head attention, with one bilinear form per head from two thin matrices (1912.00835).

E_j(t) = c^T W_j h_t,   W_j = sum_r p_jr q_jr^T,   A = softmax_t(act(E)),   S_j = sum_t A_jt h_t
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attended import AttentionTerms, Queries, Tokens
from xattn.heads.attentive import AttentiveHead, SharedOptions
from xattn.heads.base import register_head
from xattn.runtime.option_checks import Count


@register_head("lama")
class Lama(AttentiveHead):
    """LAMA, with 2 D m r parameters for m maps; the classifier reads m D channels.

    Args:
        heads: m, the number of heads.
        rank: r, the rank of each bilinear form.
        act: ``"tanh"`` bounds the scores to (-1, 1) before the softmax; ``"none"`` does not.
        context: c, which is the ``"mean"`` token or a ``"learned"`` vector (D more parameters).
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("lama", net, classes=5, heads=4)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: Count = 8,
        rank: Count = 1,
        act: Literal["none", "tanh"] = "tanh",
        context: Literal["mean", "learned"] = "mean",
        **shared: Unpack[SharedOptions],
    ) -> None:
        width = backbone.channels[-1]
        options = {"heads": heads, "rank": rank, "act": act, "context": context}
        super().__init__(backbone, options, heads * width, **shared)
        self.act = act
        # p_jr and q_jr in rows, (m, r, D)
        shape, scale = (heads, rank, width), width**-0.5
        self.p, self.q = (nn.Parameter(torch.randn(shape) * scale) for _ in range(2))
        self.context = nn.Parameter(torch.randn(width)) if context == "learned" else None

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        h = tokens.patches[-1]
        c = h.mean(1) if self.context is None else self.context[None]
        # sum_r (p_jr . c) q_jr, so that a score is one product with the token
        rows = torch.einsum("bd,mrd,mre->bme", c, self.p, self.q)
        if self.act == "none":
            return AttentionTerms(Queries(rows, h), h[:, None])
        return AttentionTerms((rows @ h.transpose(1, 2)).tanh(), h[:, None])
