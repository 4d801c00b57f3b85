"""Attention-based multiple-instance learning pooling, AbMILP (arXiv 1802.04712; as a probe 2410.20980).

    s_n = w . tanh(W x_n + b) + c,   z = sum_n softmax(s)_n x_n

with X replaced by S X W_v W_o before, self-attention in one head, for scores and values or for the
scores alone.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from xattn.attention.operator import SoftmaxOperator
from xattn.backbone import Backbone
from xattn.heads.attentive import Attended, AttentiveHead, Shared, Tokens
from xattn.heads.base import register_head


@register_head("abmilp")
class AbMilp(AttentiveHead):
    """A two-layer scorer of tokens.

    Maps speak of the patches, not of what self-attention made of them: with ``"both"`` the weights
    are a S, of values x_n W_v W_o, so that a (S x W_v W_o) = (a S) (x W_v W_o).

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
        width = backbone.channels[-1]
        super().__init__(backbone, {"self_attention": self_attention}, width, **shared)
        self.self_attention = self_attention
        self.mix = SelfAttention(width) if self_attention != "none" else None
        self.score = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))

    def attend(self, tokens: Tokens) -> Attended:
        x = tokens.patches[-1]
        if self.mix is None:
            return Attended(self.score(x).transpose(1, 2), x[:, None])
        q, k, v = self.mix.split(x)
        mixed = self.mix.proj(F.scaled_dot_product_attention(q, k, v))
        scores = self.score(mixed[:, 0]).transpose(1, 2)
        if self.self_attention == "map":
            return Attended(scores, x[:, None])
        return Attended(scores, mixed, (q, k, v))

    def sources(self, weights: Tensor, attended: Attended) -> tuple[Tensor, Tensor]:
        if self.mix is None or attended.context is None:
            return weights, attended.values
        q, k, v = attended.context
        if torch.compiler.is_compiling():  # ONNX has no operator for the kernel
            rows = weights @ (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)[:, 0]
        else:
            rows = SoftmaxOperator(q, k).vecmat(weights)[:, 0]
        return rows.to(weights.dtype), self.mix.proj(v)


class SelfAttention(nn.Module):
    """Weights of softmax(X W_q (X W_k)^T / sqrt(D)) X W_v W_o, without biases: 4 D^2 parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> q, k and v, (B, 1, N, D)."""
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return q, k, v
