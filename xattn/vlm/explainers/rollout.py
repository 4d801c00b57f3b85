"""Attention rollout: r = one-hot(q_t); for l = L..1: r <- c r + (1 - c) mean_h(r A^l).

This is one row of the matrix product of Abnar and Zuidema (arXiv 2005.00928); c is the residual's share. If
a layer attends to tokens of an encoder or of the image, these get (1 - c) mean_h(r A^l), and rollout
continues through the layers of the encoder. Every row sums to 1 if all rows of A do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xattn.attention.operators.base import Operator
from xattn.runtime.option_checks import Share
from xattn.vlm.explainers.base import Context, TokenScores, register_token_explainer
from xattn.vlm.explainers.layers import record_pass, start_rows, token_scores
from xattn.vlm.explainers.sinks import SinkExplainer, sink_table


@register_token_explainer(
    "rollout",
    title="Rollout",
    passes="1",
    source="arXiv 2005.00928",
    cases=({}, {"residual": 0.3}),
    needs="calls",
)
@dataclass(kw_only=True, eq=False)
class Rollout(SinkExplainer):
    """How much each token contributed to the rows that produced a word, if each layer mixes tokens
    in proportion to its attention.

    Args:
        residual: c, the share that stays at a token in each layer.
        sinks, sink_ratio: as in :class:`~xattn.vlm.explainers.attention.Attention`.
    """

    residual: Share = 0.5

    @torch.no_grad()
    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        attended = record_pass(context, "rollout")
        start = start_rows(context, attended)
        own = (start / start.sum(1, keepdim=True))[None]
        keys: Tensor | None = None  # what the encoder's positions, or the image tokens, receive
        c, table = (
            self.residual,
            sink_table(context, self.sink_ratio) if self.sinks == "drop" else None,
        )
        for kind, number, call in reversed(attended.layers):
            row = own if kind != "encoder" or keys is None else keys
            keep = None if table is None else ~table[number].to(row.device)
            moved = (1 - c) * _times(row, call.operator, keep).to(start)
            if kind == "encoder":
                keys = c * row + moved
            elif kind == "self":
                own = c * own + moved
            else:
                own, keys = c * own, moved if keys is None else keys + moved
        return token_scores(context, own[0], None if keys is None else keys[0])


def _times(r: Tensor, a: Operator, keep: Tensor | None) -> Tensor:
    """mean_h(r A) for r (1, W, N), with A restricted to the columns in ``keep`` (S,)."""
    if keep is None:
        return a.vecmat(r, "mean")
    columns = keep.to(r).expand(*a.shape[:2], -1)[..., None]
    left = (a.matvec(columns) / a.row_sums()[..., None]).mT.to(
        r
    )  # (1, H, 1, N), the remaining weight of each row
    return a.vecmat(r[:, None] * (left > 0) / left.clamp_min(1e-12)).mean(1) * keep
