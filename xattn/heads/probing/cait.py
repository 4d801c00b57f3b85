"""CaiT's class attention (arXiv 2103.17239): only the class token attends, with LayerScale.

y = c + g_1 o CA(LN([c; X])),   z = LN(y + g_2 o MLP(LN(y)))

This is one transformer block, computed only for the class token.

    u = LN(S),  y = c + g_1 W_o concat_h W_v,h (A_h u),  z = y + g_2 MLP(LN(y)),
    A_h = softmax(W_q,h u_c (W_k,h u)^T / sqrt(d)),       S = [c; (registers;) X]

In a single block the outputs of other tokens never reach the class token, so class attention (CaiT) and a
whole encoder block from which only the class token is taken differ only in norms and scales.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attended import AttentionTerms, Tokens
from xattn.heads.attentive import AttentiveHead, SharedOptions
from xattn.heads.base import register_head
from xattn.heads.cross_attention import CrossAttention
from xattn.heads.pullback import Step, mean, mlp, residual, step
from xattn.runtime.option_checks import Count, Positive


class ClassAttention(AttentiveHead):
    """Base class of heads that end in a class token, a learned one if the backbone has none.

    The contributions of the class token itself and of prefix tokens to a logit belong to ``rest``.
    """

    gated = True
    registers: ClassVar[bool]  # whether the class token sees the backbone's registers

    def __init__(
        self,
        backbone: Backbone,
        options: dict[str, Any],
        heads: int | None,
        mlp_ratio: float,
        layer_scale: float | None,
        final_norm: bool,
        **shared: Unpack[SharedOptions],
    ) -> None:
        width = backbone.channels[-1]
        super().__init__(backbone, options, width, reads_prefix=True, **shared)
        self.token: nn.Parameter | None = None
        if not self.has_class_token:
            self.token = nn.Parameter(0.02 * torch.randn(width))
        self.tokens_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = CrossAttention(width, heads, bias=True)
        self.mlp = mlp(width, mlp_ratio, 1e-6)
        self.gammas = (
            None
            if layer_scale is None
            else nn.ParameterList(torch.full((width,), layer_scale) for _ in range(2))
        )
        self.final = nn.LayerNorm(width, eps=1e-6) if final_norm else nn.Identity()

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        x = tokens.patches[-1]
        parts = [tokens.prefix.to(x.dtype), x]
        if self.token is not None:
            parts.insert(0, self.token.expand(x.shape[0], 1, -1))
        if not self.registers:
            parts = [parts[0][:, :1], x]
        u = torch.cat(parts, 1)
        normed = self.tokens_norm(u)
        return AttentionTerms(
            self.attention.queries(normed[:, :1], normed), normed[:, None], u[:, 0]
        )

    def finish(self, pooled: Tensor, attended: AttentionTerms) -> Step:
        scales: Any = (1.0, 1.0) if self.gammas is None else self.gammas
        mixed, back = self.attention.project(pooled)
        mixed, first = mean(mixed)
        y, middle = residual(attended.context + scales[0] * mixed, self.mlp, scale=scales[1])
        z, last = step(self.final, y)
        return z, lambda rows: back(first(middle(last(rows)) * scales[0]))


@register_head("cait")
class Cait(ClassAttention):
    """One class-attention layer on the backbone's class token, or on a learned one if there is none.

    Registers are not read.

    Args:
        heads: the number of attention heads; for None see
            :func:`~xattn.heads.cross_attention.head_count`.
        mlp_ratio: the hidden width divided by D.
        layer_scale: initial value of both gains g.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("cait", net, classes=5)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    registers = False

    def __init__(
        self,
        backbone: Backbone,
        heads: Count | None = None,
        mlp_ratio: Positive = 4.0,
        layer_scale: float = 1e-5,
        **shared: Unpack[SharedOptions],
    ) -> None:
        options = {"heads": heads, "mlp_ratio": mlp_ratio, "layer_scale": layer_scale}
        super().__init__(backbone, options, heads, mlp_ratio, layer_scale, True, **shared)
