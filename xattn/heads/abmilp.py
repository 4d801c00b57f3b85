"""Attention-based multiple-instance learning pooling, AbMILP (arXiv 1802.04712; as a probe 2410.20980).

    s_n = w . tanh(W x_n + b) + c,   z = sum_n softmax(s)_n x_n

with X = SelfAttention(X) before it, in one head, for the scores and the values or for the scores alone.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attentive import Attended, AttentiveHead, Shared, Tokens
from xattn.heads.base import register_head

SELF_ATTENTION = ("none", "map", "both")


@register_head("abmilp")
class AbMilp(AttentiveHead):
    """A two-layer scorer of tokens.

    With ``self_attention="both"`` the shares are those of the mixed tokens that stand at the patches'
    places; ``"none"`` and ``"map"`` share out among the raw tokens.

    Args:
        self_attention: ``"both"`` (the default of the probing benchmarks), ``"map"`` or ``"none"``.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.
    """

    inert = ("score.2.bias",)

    def __init__(
        self,
        backbone: Backbone,
        self_attention: Literal["none", "map", "both"] = "both",
        **shared: Unpack[Shared],
    ) -> None:
        if self_attention not in SELF_ATTENTION:
            raise ValueError(
                f"self_attention: got {self_attention!r}; choose one of {', '.join(SELF_ATTENTION)}"
            )
        width = backbone.channels[-1]
        super().__init__(backbone, {"self_attention": self_attention}, width, **shared)
        self.self_attention = self_attention
        self.mix = SelfAttention(width) if self_attention != "none" else None
        self.score = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))

    def attend(self, tokens: Tokens) -> Attended:
        x = tokens.patches[-1]
        mixed = x if self.mix is None else self.mix(x)
        values = mixed if self.self_attention == "both" else x
        return Attended(self.score(mixed).transpose(1, 2), values[:, None])


class SelfAttention(nn.Module):
    """softmax(X W_q (X W_k)^T / sqrt(D)) X W_v W_o in one head, without biases: 4 D^2 parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v)[:, 0])
