"""SimPool: single-query attention pooling with the mean token as the query (arXiv 2309.06891).

q = W_q mean(X),  K = W_k LN(X),  V = LN(X),  a = softmax(q K^T / sqrt(D)),
z = sum_n a_n V_n   or, with gamma,   (sum_n a_n (V_n - min V + eps)^gamma)^(1/gamma)

The form "esimpool" has no projections: q = LN(mean(X)),  K = LN(X),  V = X, with 12 heads.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attended import AttentionTerms, Queries, Tokens
from xattn.heads.attentive import AttentiveHead, SharedOptions
from xattn.heads.base import register_head
from xattn.heads.cross_attention import head_count
from xattn.heads.pullback import Step, root
from xattn.runtime.option_checks import Count, Positive

EPS = 1e-6
HEADS = 12


@register_head("simpool", cases=({}, {"gamma": 1.5}, {"project": False, "heads": 4}))
class SimPool(AttentiveHead):
    """SimPool: values are not projected, and each head reads its own D / H channels.

    min V is taken over the tokens and channels of each image. With ``gamma``, shares are those of
    (V - min V + eps)^gamma, with the gain of the outer root held constant.

    Args:
        gamma: the exponent of the power mean, published as 1.25 for transformers and 2 for CNNs; None
            uses the weighted mean.
        project: whether to use W_q and W_k.
        heads: H; None means 1, or 12 for the form "esimpool" (if 12 does not divide D, see
            :func:`~xattn.heads.cross_attention.head_count`).
        form: which variant to use without projections. ``"esimpool"`` is the variant of the probing
            benchmark (arXiv 2506.10178), as above; ``"layer_norm"`` is SimPool with W_q = W_k = I, whose
            query is mean(X) and whose values are LN(X).
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Raises:
        ValueError: if ``heads`` does not divide the width.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("simpool", net, classes=5)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    def __init__(
        self,
        backbone: Backbone,
        gamma: Positive | None = None,
        project: bool = True,
        heads: Count | None = None,
        form: Literal["esimpool", "layer_norm"] = "esimpool",
        **shared: Unpack[SharedOptions],
    ) -> None:
        width = backbone.channels[-1]
        options = {"gamma": gamma, "project": project, "heads": heads, "form": form}
        super().__init__(backbone, options, width, **shared)
        self.gamma, self.gated = gamma, gamma is not None
        self.raw_values = not project and form == "esimpool"
        if heads is None and (not self.raw_values or width % HEADS == 0):
            heads = HEADS if self.raw_values else 1
        self.heads = head_count(width, heads)
        self.tokens_norm = nn.LayerNorm(width, eps=EPS)
        self.q = nn.Linear(width, width, bias=False) if project else None
        self.k = nn.Linear(width, width, bias=False) if project else None

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        x = tokens.patches[-1]
        query, k = x.mean(1, keepdim=True), self.tokens_norm(x)
        if self.raw_values:
            query = self.tokens_norm(query)
        if self.q is not None and self.k is not None and self.heads == 1:
            query = self.q(query) @ self.k.weight  # cheaper than projected keys
            source: Tensor | Queries = Queries(query, k, x.shape[-1] ** -0.5)
        else:
            keys = k if self.k is None else self.k(k)
            query = self._split(query if self.q is None else self.q(query))
            query = query * query.shape[-1] ** -0.5
            source = (query @ self._split(keys).transpose(2, 3))[:, :, 0]
        v = x if self.raw_values else k
        if self.gamma is not None:
            v = (v - v.amin((1, 2), keepdim=True) + EPS) ** self.gamma
        return AttentionTerms(source, self._split(v))

    def _split(self, x: Tensor) -> Tensor:
        """Split the channels among the heads: (B, N, D) -> (B, H, N, D / H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def finish(self, pooled: Tensor, attended: AttentionTerms) -> Step:
        y, pull = super().finish(pooled, attended)
        if self.gamma is None:
            return y, pull
        z, back = root(y, self.gamma)
        return z, lambda rows: pull(back(rows))
