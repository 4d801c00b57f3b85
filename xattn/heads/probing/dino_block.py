"""One more encoder block on frozen tokens, as in DINO's ViTs (arXiv 2104.14294), followed by pooling.

Y = X + MHSA(LN(X)),   z = mean_t (y_t + MLP(LN(y_t)))                              "benchmark"
y = c + MHSA(LN([c; registers; X]))_c,   z = y + MLP(LN(y))                         "class_token"
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attended import AttentionTerms, Queries, Tokens
from xattn.heads.attentive import AttentiveHead, SharedOptions
from xattn.heads.base import register_head
from xattn.heads.cross_attention import SelfAttention, head_count
from xattn.heads.probing.cait import ClassAttention
from xattn.heads.pullback import Step, mean, mlp, residual
from xattn.runtime.option_checks import Count, Positive


@register_head("dino_block", cases=({}, {"form": "class_token"}))
class DinoBlock(ClassAttention):
    """A pre-norm ViT block, followed by the mean of its tokens, or by its class token.

    With the mean, every token is a query, and the residual keeps each patch's own part. The share of a
    patch is what all tokens take from it plus what it keeps. There is one query map per head, averaged over
    the tokens.

    Args:
        heads: the number of attention heads, 8 in the benchmark; for None see
            :func:`~xattn.heads.cross_attention.head_count`.
        mlp_ratio: the hidden width divided by D.
        form: ``"benchmark"`` is the "dinovit" of the probing benchmark (arXiv 2506.10178). It averages only
            patches, has no biases for queries, keys and values, and uses an eps of 1e-5 in its norms.
            ``"class_token"`` also reads prefix tokens and ends in the class token (a learned one if the
            backbone has none); it has biases for queries, keys and values, and an eps of 1e-6.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("dino_block", net, classes=5)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    registers = True

    def __init__(
        self,
        backbone: Backbone,
        heads: Count | None = None,
        mlp_ratio: Positive = 4.0,
        form: Literal["benchmark", "class_token"] = "benchmark",
        **shared: Unpack[SharedOptions],
    ) -> None:
        options = {"heads": heads, "mlp_ratio": mlp_ratio, "form": form}
        if form == "class_token":
            super().__init__(backbone, options, heads, mlp_ratio, None, False, **shared)
        else:
            width = backbone.channels[-1]
            AttentiveHead.__init__(self, backbone, options, width, **shared)
            self.tokens_norm = nn.LayerNorm(width)
            self.mix = SelfAttention(width, head_count(width, heads), bias=True)
            self.mlp = mlp(width, mlp_ratio)
        self.averages = form == "benchmark"

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        if not self.averages:
            return super().scores_and_values(tokens)
        x = tokens.patches[-1]
        q, k, v = self.mix.split(self.tokens_norm(x))
        values = torch.cat([v, self.mix.by_head(x)], 1)
        return AttentionTerms(Queries(q, k, q.shape[-1] ** -0.5), values)

    def pool(self, attended: AttentionTerms) -> Tensor:
        if not self.averages:
            return attended.pool()
        if not isinstance(attended.source, Queries):
            return super().pool(attended)
        (q, k, scale), v = attended.source, attended.values
        mixed = F.scaled_dot_product_attention(q, k, v[:, : self.mix.heads], scale=scale)
        return torch.cat([mixed, v[:, self.mix.heads :]], 1).flatten(1, 2)

    def weights(self, scores: Tensor) -> Tensor:
        """Convert scores (B, H N, N) to weights (B, 2 H N, N): attention, then each token's residual."""
        weights = super().weights(scores)
        if not self.averages:
            return weights
        own = torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
        return torch.cat([weights, own.repeat(self.mix.heads, 1).expand_as(weights)], 1)

    def finish(self, pooled: Tensor, attended: AttentionTerms) -> Step:
        if not self.averages:
            return super().finish(pooled, attended)
        parts = pooled.unflatten(1, (2, self.mix.heads, -1)).transpose(2, 3).flatten(3)
        mixed, x = parts.unbind(1)  # (B, N, D)
        y, back = residual(x + self.mix.proj(mixed), self.mlp)
        z, first = mean(y)

        def pull(rows: Tensor) -> Tensor:
            rows = back(first(rows))
            both = torch.stack([rows @ self.mix.proj.weight, rows], 2)  # (B, M, 2, N, D)
            return both.unflatten(-1, (self.mix.heads, -1)).transpose(3, 4).flatten(2, 4)

        return z, pull

    def query_maps(self, tokens: Tokens) -> Tensor:
        maps = super().query_maps(tokens)
        return maps.unflatten(1, (self.mix.heads, -1)).mean(2) if self.averages else maps
