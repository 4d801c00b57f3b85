"""Generalised mean pooling (GeM), per channel z = (1/N sum_n max(x_n, eps)^p)^(1/p) (arXiv 1711.02512)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attended import AttentionTerms, Tokens
from xattn.heads.attentive import AttentiveHead, SharedOptions
from xattn.heads.base import register_head
from xattn.heads.pullback import Step, root
from xattn.runtime.option_checks import Positive


@register_head("gem")
class Gem(AttentiveHead):
    """Pooling between the mean (p = 1) and the maximum (p large); p is learned.

    As published, values below ``eps`` are replaced by ``eps``. GeM was designed for features after a ReLU,
    so it uses only the positive part of a ViT's tokens. Shares are computed from x^p, with the gain of the
    outer root held constant.

    Args:
        p: the initial value of the exponent.
        eps: the lower bound of the values.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("gem", net, classes=5, p=2.0)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    learns_scores = False
    gated = True

    def __init__(
        self,
        backbone: Backbone,
        p: Positive = 3.0,
        eps: Positive = 1e-6,
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(backbone, {"p": p, "eps": eps}, backbone.channels[-1], **shared)
        self.p = nn.Parameter(torch.tensor(float(p)))
        self.eps = eps

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        x = tokens.patches[-1].clamp_min(self.eps)
        # Dividing each channel by its maximum leaves the result unchanged and avoids overflow of powers.
        most = x.amax(1).detach()
        return AttentionTerms(
            x.new_zeros(x.shape[0], 1, x.shape[1]), ((x / most[:, None]) ** self.p)[:, None], most
        )

    def finish(self, pooled: Tensor, attended: AttentionTerms) -> Step:
        y, pull = super().finish(pooled, attended)
        z, back = root(y, self.p)
        most = attended.context
        return z * most, lambda rows: pull(back(rows * most[:, None]))
