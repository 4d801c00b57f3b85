"""Efficient probing (EP): Q learned queries attend to raw tokens (arXiv 2506.10178).

    A_q = softmax_n(U_q . X_n / sqrt(D)),   z_q = (A_q X) W_q,   z = concat_q z_q   (B, D / reduction)

The published order is A_q (X W_q); pooling first gives the same result without the N D^2 projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attended import AttentionTerms, Queries, Tokens
from xattn.heads.attentive import AttentiveHead, SharedOptions, prefixed
from xattn.heads.base import register_head
from xattn.heads.pullback import Step
from xattn.runtime.option_checks import Count


@register_head("efficient_probe", cases=({"queries": 8}, {"queries": 8, "prefix": True}))
class EfficientProbe(AttentiveHead):
    """Multi-query attention whose keys are the tokens themselves.

    Args:
        queries: Q, the number of queries; it must divide D / reduction.
        reduction: the pooled vector is D / reduction wide.
        prefix: whether to attend to class and register tokens, too.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("efficient_probe", net, classes=5, queries=8)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    def __init__(
        self,
        backbone: Backbone,
        queries: Count = 32,
        reduction: Count = 1,
        prefix: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        width = backbone.channels[-1]
        pooled = width // reduction
        if pooled < 1 or width % reduction or pooled % queries:
            raise ValueError(
                f"queries={queries}, reduction={reduction}: tokens are {width} wide; the number of queries "
                f"must divide {width} / reduction evenly"
            )
        options = {"queries": queries, "reduction": reduction, "prefix": prefix}
        super().__init__(backbone, options, pooled, reads_prefix=prefix, **shared)
        self.prefix = prefix
        self.queries = nn.Parameter(0.02 * torch.randn(queries, width))
        # W_q of all queries, (Q, D, D / reduction / Q)
        self.value = nn.Parameter(torch.empty(queries, width, pooled // queries))
        nn.init.uniform_(self.value, -(width**-0.5), width**-0.5)

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        x = prefixed(tokens) if self.prefix else tokens.patches[-1]
        return AttentionTerms(Queries(self.queries[None], x, x.shape[-1] ** -0.5), x[:, None])

    def finish(self, pooled: Tensor, attended: AttentionTerms) -> Step:
        queries, _, width = self.value.shape

        def pull(rows: Tensor) -> Tensor:
            return torch.einsum("bmqo,qdo->bmqd", rows.unflatten(-1, (queries, width)), self.value)

        return torch.einsum("bqd,qdo->bqo", pooled, self.value).flatten(1), pull
