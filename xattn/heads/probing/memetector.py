"""MemeTector's attention over the taps of a ViT (arXiv 2205.13268).

    linear:    s_lj = w . [y; Z_lj] + b          additive (ours):  s_lj = v . tanh(W_y y + W_z Z_lj)
    g_l = sum_j softmax_j(s_l)_j Z_lj,           z = MLP([g_1; ...; g_L])

y is the class token of the last layer, and Z_l are the patches of tap l. In the published, linear form
w_y . y + b is the same for every patch, so the softmax cancels it: the attention does not depend on y,
and w_y and b get no gradient. In the additive form the attention does depend on y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attended import AttentionTerms, Tokens
from xattn.heads.attentive import AttentiveHead, SharedOptions
from xattn.heads.base import register_head
from xattn.heads.pullback import Step, chain
from xattn.runtime.option_checks import Count, Share

TAPS = 4


@register_head("memetector", cases=({"hidden": (24, 12)},))
class MemeTector(AttentiveHead):
    """One map per tap; y is used only as the query and does not enter z.

    When shares are computed, the MLP's gates are held constant. If the backbone has no class token, y is
    the mean token of the last tap. Taps whose width differs from the last tap's are projected to the last
    tap's width.

    Args:
        form: ``"linear"`` (as published) or ``"additive"``.
        hidden: the widths of the MLP's layers.
        dropout: the dropout probability after each of these layers.
        num_taps: how many of the backbone's last taps are read; None reads all, at most four.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("memetector", net, classes=5, hidden=(32, 16))
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    gated = True

    def __init__(
        self,
        backbone: Backbone,
        form: Literal["linear", "additive"] = "linear",
        hidden: Sequence[Count] = (2048, 1024),
        dropout: Share = 0.5,
        num_taps: Count | None = None,
        **shared: Unpack[SharedOptions],
    ) -> None:
        if not hidden:
            raise ValueError("hidden: got no width; give one or more widths")
        count = min(TAPS, len(backbone.taps)) if num_taps is None else num_taps
        options = {"form": form, "hidden": list(hidden), "dropout": dropout, "num_taps": count}
        super().__init__(backbone, options, hidden[-1], count, True, **shared)
        self.form = form
        width = backbone.channels[-1]
        self.projections = nn.ModuleList(
            nn.Identity() if c == width else nn.Linear(c, width) for c in backbone.channels[-count:]
        )
        if form == "linear":
            self.score_y = nn.Linear(width, 1, bias=False)
            self.score_z = nn.Linear(width, 1, bias=False)
            self.score_bias = nn.Parameter(torch.zeros(1))
            self.inert = ("score_y.weight", "score_bias")
        else:
            self.score_y = nn.Linear(width, width, bias=False)
            self.score_z = nn.Linear(width, width)
            self.score = nn.Linear(width, 1, bias=False)
        widths = [count * width, *hidden]
        layers: list[nn.Module] = []
        for before, after in zip(widths, hidden, strict=False):
            layers += [nn.Linear(before, after), nn.GELU(), nn.Dropout(dropout)]
        self.mlp = nn.Sequential(*layers)

    @staticmethod
    def default_taps(depth: int) -> tuple[str, ...]:
        """Return the taps of four evenly spaced blocks, beginning with the first; of 8 blocks, these are
        the 1st, 3rd, 5th and 7th."""
        return tuple(f"block.{i}" for i in sorted({depth * i // TAPS for i in range(TAPS)}))

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        taps = [project(z) for project, z in zip(self.projections, tokens.patches, strict=True)]
        z = torch.stack(taps, 1)  # (B, L, N, D)
        token = self.class_token(tokens)
        y = z[:, -1].mean(1) if token is None else token.to(z.dtype)
        if self.form == "linear":
            scores = self.score_y(y)[:, None, None] + self.score_z(z) + self.score_bias
        else:
            scores = self.score((self.score_y(y)[:, None, None] + self.score_z(z)).tanh())
        return AttentionTerms(scores[..., 0], z)

    def finish(self, pooled: Tensor, attended: AttentionTerms) -> Step:
        g, split = super().finish(pooled, attended)
        z, pull = chain(g, self.mlp)
        return z, lambda rows: split(pull(rows))
