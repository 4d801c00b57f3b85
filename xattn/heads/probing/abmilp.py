"""Attention-based multiple-instance learning pooling, AbMILP (arXiv 1802.04712; as a probe, 2410.20980).

    s_n = w . tanh(W x_n + b) + c,   z = sum_n softmax(s)_n x_n

Single-head self-attention may come first. It replaces X by S X W_v W_o + b_o, either for the scores and the
values or only for the scores.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from xattn.attention.operators.base import SoftmaxOperator
from xattn.backbone import Backbone
from xattn.heads.attended import AttentionTerms, Tokens
from xattn.heads.attentive import AttentiveHead, SharedOptions
from xattn.heads.base import register_head
from xattn.heads.cross_attention import SelfAttention
from xattn.heads.pullback import Step


@register_head("abmilp", cases=({}, {"self_attention": "map"}, {"self_attention": "none"}))
class AbMilp(AttentiveHead):
    """Attention pooling with scores from a two-layer network.

    Maps refer to the patches themselves, before self-attention. With ``"both"`` the weights are a S and the
    values are x_n W_v W_o, because a (S x W_v W_o) = (a S) (x W_v W_o); the share of b_o belongs to
    ``rest``.

    Args:
        self_attention: ``"both"`` (the default of the probing benchmarks), ``"map"`` or ``"none"``.
        projection_bias: whether to add b_o, as in "abmilp" of the probing benchmark (arXiv 2506.10178).
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("abmilp", net, classes=5)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    inert = ("score.2.bias",)

    def __init__(
        self,
        backbone: Backbone,
        self_attention: Literal["none", "map", "both"] = "both",
        projection_bias: bool = True,
        **shared: Unpack[SharedOptions],
    ) -> None:
        width = backbone.channels[-1]
        options = {"self_attention": self_attention, "projection_bias": projection_bias}
        super().__init__(backbone, options, width, **shared)
        self.self_attention = self_attention
        self.mix: SelfAttention | None = None
        if self_attention != "none":
            self.mix = SelfAttention(width, bias=projection_bias)
        self.score = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        x = tokens.patches[-1]
        if self.mix is None:
            return AttentionTerms(self.score(x).transpose(1, 2), x[:, None])
        q, k, v = self.mix.split(x)
        mixed = F.linear(F.scaled_dot_product_attention(q, k, v), self.mix.proj.weight)
        bias = self.mix.proj.bias
        scores = self.score((mixed if bias is None else mixed + bias)[:, 0]).transpose(1, 2)
        if self.self_attention == "map":
            return AttentionTerms(scores, x[:, None])
        return AttentionTerms(scores, mixed, (q, k, v))

    def finish(self, pooled: Tensor, attended: AttentionTerms) -> Step:
        y, pull = super().finish(pooled, attended)
        if attended.context is not None and self.mix is not None and self.mix.proj.bias is not None:
            y = y + self.mix.proj.bias
        return y, pull

    def sources(self, weights: Tensor, attended: AttentionTerms) -> tuple[Tensor, Tensor]:
        if self.mix is None or attended.context is None:
            return weights, attended.values
        q, k, v = attended.context
        if torch.compiler.is_compiling():  # ONNX has no operator for the kernel
            rows = weights @ (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)[:, 0]
        else:
            rows = SoftmaxOperator(q, k).vecmat(weights)[:, 0]
        return rows.to(weights.dtype), F.linear(v, self.mix.proj.weight)
