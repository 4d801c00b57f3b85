"""Efficient probing (EP): Q learned queries attend to raw tokens (arXiv 2506.10178).

    A_q = softmax_n(U_q . X_n / sqrt(D)),   z_q = (A_q X) W_q,   z = concat_q z_q   (B, D / reduction)

The published order is A_q (X W_q); pooling first gives the same numbers without the N D^2 projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from xattn.backbone import Backbone
from xattn.heads.attentive import Attended, AttentiveHead, Pull, Tokens
from xattn.heads.base import register_head


@register_head("efficient_probe")
class EfficientProbe(AttentiveHead):
    """Multi-query attention whose keys are the tokens themselves.

    Args:
        queries: Q; it has to divide D / reduction.
        reduction: the pooled vector is D / reduction wide.
        classes, class_names, norm, explain_with: see :class:`~xattn.heads.attentive.AttentiveHead`.
    """

    def __init__(
        self,
        backbone: Backbone,
        queries: int = 32,
        reduction: int = 1,
        classes: int | None = None,
        class_names: Sequence[str] | None = None,
        norm: bool = True,
        explain_with: Literal["scores", "mask", "attention"] = "scores",
    ) -> None:
        width = backbone.channels[-1]
        pooled = width // reduction if reduction >= 1 else 0
        if queries < 1 or pooled < 1 or width % reduction or pooled % queries:
            raise ValueError(
                f"queries={queries}, reduction={reduction}: tokens are {width} wide; the queries "
                f"have to divide {width} / reduction evenly"
            )
        options = {
            "queries": queries,
            "reduction": reduction,
            "classes": classes,
            "class_names": class_names,
            "norm": norm,
            "explain_with": explain_with,
        }
        super().__init__(backbone, options, pooled)
        self.queries = nn.Parameter(0.02 * torch.randn(queries, width))
        # W_q of all queries, (Q, D, D / reduction / Q)
        self.value = nn.Parameter(torch.empty(queries, width, pooled // queries))
        nn.init.uniform_(self.value, -(width**-0.5), width**-0.5)

    def attend(self, tokens: Tokens) -> Attended:
        x = tokens.patches[-1]
        return Attended((self.queries * x.shape[-1] ** -0.5) @ x.transpose(1, 2), x[:, None])

    def finish(self, pooled: Tensor, attended: Attended) -> tuple[Tensor, Pull]:
        queries, _, width = self.value.shape

        def pull(rows: Tensor) -> Tensor:
            return torch.einsum("bmqo,qdo->bmqd", rows.unflatten(-1, (queries, width)), self.value)

        return torch.einsum("bqd,qdo->bqo", pooled, self.value).flatten(1), pull
