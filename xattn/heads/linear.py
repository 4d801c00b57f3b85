"""Linear probing: classify the class token, the mean of the patches, or their concatenation.

z = x_class,   z = 1/N sum_n x_n,   or   z = [x_class; 1/N sum_n x_n]
"""

from __future__ import annotations

from typing import Literal

import torch
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attended import AttentionTerms, Tokens
from xattn.heads.attentive import AttentiveHead, SharedOptions, has_class_token
from xattn.heads.base import register_head


@register_head("linear", cases=({}, {"read": "mean"}, {"read": "both"}))
class Linear(AttentiveHead):
    """The linear probe. The pooling weights are fixed: 1 for a single token, or equal for all patches.

    In a probe that reads only the class token, patches have no shares: the complete logit is in
    ``rest``, and its maps are zero. Patches contribute to the class token inside the backbone, which
    attention explainers can show.

    Args:
        read: ``"class"``, ``"mean"`` or ``"both"``; None reads the class token if the backbone has
            one, else the mean.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("linear", net, classes=5, read="class")
        >>> tokens = head.tokens(net(torch.rand(2, 3, 32, 32)))
        >>> head.logits(tokens).shape
        torch.Size([2, 5])
    """

    learns_scores = False

    def __init__(
        self,
        backbone: Backbone,
        read: Literal["class", "mean", "both"] | None = None,
        **shared: Unpack[SharedOptions],
    ) -> None:
        width = backbone.channels[-1] * (2 if read == "both" else 1)
        reads_prefix = read in ("class", "both") or (read is None and has_class_token(backbone))
        super().__init__(backbone, {"read": read}, width, reads_prefix=reads_prefix, **shared)
        if read in ("class", "both") and not self.has_class_token:
            raise ValueError(
                f"read={read!r}: {backbone.name} has no class token; choose read='mean'"
            )
        self.read = read or ("class" if self.has_class_token else "mean")
        self.options["read"] = self.read

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        x = tokens.patches[-1]
        scores = x.new_zeros(1, x.shape[1])
        token = self.class_token(tokens)
        if token is not None and self.read != "mean":
            x = torch.cat([token[:, None].to(x.dtype), x], 1)
            scores = x.new_full((2, x.shape[1]), -torch.inf)
            scores[0, 0] = scores[1, 1:] = 0
            scores = scores[:1] if self.read == "class" else scores
        return AttentionTerms(scores.expand(x.shape[0], -1, -1), x[:, None])
