"""Relative attention: a_i(t) / a_i(reference), what a word looks at beyond what every word looks at.

Zhang et al., ICLR 2025, arXiv 2502.17422, whose reference is the last row under a general prompt. Here it
is the mean row of the answer by default, which costs no pass.
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
    """Attention to image tokens divided by that of a reference; 0 where the reference looks at none.

    Args:
        reference: "answer", the mean row of all tokens of the answer, or a prompt, of which the row that
            would produce the first token counts.
        layers, heads, first, sinks, sink_ratio: as of :class:`~xattn.vlm.explainers.attention.Attention`.
    """

    reference: str = "answer"

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        rows = super().explain(_by_token(context), seen).image  # (T, n)
        reference = rows.mean(0) if self.reference == "answer" else self._row(context)
        looked = reference > 0
        ratio = rows / torch.where(looked, reference, 1) * looked
        return TokenScores(context.word_mean(ratio))

    def _row(self, context: Context) -> Tensor:
        """(n,) of the prompt that is the reference."""
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
    """The same conversation, every token of the answer a word."""
    words = [Word("", (0, 0), (t,)) for t in range(len(context.ids))]
    return replace(context, words=words, asked=range(len(words)), instead={})
