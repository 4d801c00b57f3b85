"""Relative attention: a_i(t) / a_i(reference), which shows where a word attends more than words do in
general.

Zhang et al., ICLR 2025, arXiv 2502.17422, where the reference is the last row under a general prompt.
By default, this explainer uses the mean row of the answer, which needs no pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xattn.vlm.explainers.attention import Attention
from xattn.vlm.explainers.base import Context, TokenScores, register_token_explainer
from xattn.vlm.words import Word

GENERAL = "Write a general description of the image."


@register_token_explainer(
    "relative_attention",
    title="Relative attention",
    passes="none; 1 with a prompt as reference",
    source="arXiv 2502.17422",
    cases=({}, {"reference": GENERAL}),
)
@dataclass(kw_only=True, eq=False)
class RelativeAttention(Attention):
    """Attention to image tokens divided by the attention of a reference; 0 where the reference pays no
    attention.

    Args:
        reference: "answer" for the mean row of all tokens of the answer, or the text of a prompt, of which
            the row that produces the first token of an answer is used.
        layers, heads, first, sinks, sink_ratio: as in :class:`~xattn.vlm.explainers.attention.Attention`.
    """

    reference: str = "answer"

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        rows = super().explain(_by_token(context), seen).image  # (T, n)
        reference = rows.mean(0) if self.reference == "answer" else self._row(context)
        looked = reference > 0
        ratio = rows / torch.where(looked, reference, 1) * looked
        return TokenScores(context.word_mean(ratio))

    def _row(self, context: Context) -> Tensor:
        """The row (n,) for the reference prompt."""
        vlm = context.vlm
        inputs = vlm.inputs(context.photos, self.reference)
        first = replace(
            context,
            prompt=self.reference,
            prompt_ids=inputs["input_ids"][0].cpu(),
            ids=context.ids[:1],
            forced=vlm.forced(inputs, context.ids[:1]),
        )
        return super().explain(_by_token(first)).image[0]


def _by_token(context: Context) -> Context:
    """The same conversation, with every token of the answer as a word."""
    words = [Word("", (0, 0), (t,)) for t in range(len(context.ids))]
    return replace(context, words=words, asked=range(len(words)), instead={})
