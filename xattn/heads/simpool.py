"""SimPool: one attention whose query is the mean token (arXiv 2309.06891).

q = W_q mean(X),  K = W_k LN(X),  V = LN(X),  a = softmax(q K^T / sqrt(D)),
z = sum_n a_n V_n   or, with gamma,   (sum_n a_n (V_n - min V + eps)^gamma)^(1/gamma)
"""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.affine import Step, root
from xattn.heads.attentive import Attended, AttentiveHead, Shared, Tokens
from xattn.heads.base import register_head
from xattn.heads.options import Positive

EPS = 1e-6


@register_head("simpool")
class SimPool(AttentiveHead):
    """Values are not projected; the keys' projection is folded into the query.

    min V is taken over tokens and channels of each image. Shares under ``gamma`` are those of
    (V - min V + eps)^gamma, with the outer root's gain held.

    Args:
        gamma: the power mean's exponent, published as 1.25 for transformers and 2 for CNNs; None
            leaves the weighted mean.
        project: False is "esimpool", without W_q and W_k.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.
    """

    def __init__(
        self,
        backbone: Backbone,
        gamma: Positive | None = None,
        project: bool = True,
        **shared: Unpack[Shared],
    ) -> None:
        width = backbone.channels[-1]
        super().__init__(backbone, {"gamma": gamma, "project": project}, width, **shared)
        self.gamma, self.gated = gamma, gamma is not None
        self.tokens_norm = nn.LayerNorm(width, eps=EPS)
        self.q = nn.Linear(width, width, bias=False) if project else None
        self.k = nn.Linear(width, width, bias=False) if project else None

    def attend(self, tokens: Tokens) -> Attended:
        x = tokens.patches[-1]
        query, v = x.mean(1, keepdim=True), self.tokens_norm(x)
        if self.q is not None and self.k is not None:
            query = self.q(query) @ self.k.weight
        scores = (query * x.shape[-1] ** -0.5) @ v.transpose(1, 2)
        if self.gamma is not None:
            v = (v - v.amin((1, 2), keepdim=True) + EPS) ** self.gamma
        return Attended(scores, v[:, None])

    def finish(self, pooled: Tensor, attended: Attended) -> Step:
        y, pull = super().finish(pooled, attended)
        if self.gamma is None:
            return y, pull
        z, back = root(y, self.gamma)
        return z, lambda rows: pull(back(rows))
