"""Localization heads: the mean row of the few heads that look at one compact region of the image.

Kang et al., CVPR 2025, arXiv 2503.06287. For the row m = A^lh[q_t, image] of each head

    sum               s = sum m; heads with s at or above the elbow of all sorted sums are kept
    spatial entropy   E = -sum_k p_k ln p_k, p_k the shares of the 8-connected parts of max(m - mean m, 0)
                      above 0.576 / n; infinite if there is none

Heads whose values above the threshold fill the whole bottom row of a grid of image tokens are dropped. The
mean of the heads with the lowest E is smoothed by a Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xattn.runtime.option_checks import Count, NotNegative
from xattn.vlm.explainers.base import Context, TokenScores, register_token_explainer
from xattn.vlm.explainers.layers import HeadRows, unsupported_error
from xattn.vlm.explainers.sinks import SinkExplainer
from xattn.vlm.model import VLM
from xattn.vlm.words import PhotoError

THRESHOLD = 0.576  # divided by n; the paper's is 0.001 for 576 tokens


@register_token_explainer(
    "localization_heads",
    title="Localization heads",
    passes="none",
    source="arXiv 2503.06287",
    cases=({}, {"heads": 1, "smooth": 0}, {"released": True}),
    needs="places",
)
@dataclass(kw_only=True, eq=False)
class LocalizationHeads(SinkExplainer):
    """The rows of the heads that localize, chosen for each word.

    Args:
        heads: number of heads to use.
        smooth: standard deviation of the Gaussian, in tokens; 0 means none.
        released: follow the authors' code, which keeps heads whose number, counted through all layers,
            is above the elbow's position in the sorted list.
        sinks, sink_ratio: as in :class:`~xattn.vlm.explainers.attention.Attention`.
    """

    watches = True

    heads: Count = 3
    smooth: NotNegative = 1.0
    released: bool = False
    vague: list[str] = field(default_factory=list, init=False)
    """Words of the last answer that no head localizes."""

    def watch(
        self, vlm: VLM, prompt_ids: Tensor, rows: Sequence[int] | None = None
    ) -> AbstractContextManager[HeadRows | None]:
        return nullcontext() if self.sinks == "drop" else HeadRows.watched(vlm, rows)

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        sides = [side for grid in context.grids for side in grid.shape]
        if not sides:
            raise unsupported_error(
                context, "localization_heads", "needs image tokens on a grid", "has none"
            )
        if min(sides) == 1:
            raise PhotoError(
                "photo: its image tokens form a single row or column, but localization_heads "
                "needs more; give another explainer"
            )
        words, self.vague = [], []
        rows = (seen or HeadRows(context.vlm)).of_words(context, self.without_sinks(context))
        for i, own in zip(context.asked, rows, strict=True):  # (L H, S)
            heads = self.chosen(context, own)
            if not len(heads):
                self.vague.append(context.words[i].text)
                sums = HeadRows.of_image(context, own).sum(1)
                heads = sums.argsort(descending=True)[: self.heads]
            words.append(own[heads].mean(0))
        found = torch.stack(words)
        image = self._smoothed(context, HeadRows.of_image(context, found))
        if context.vlm.kind != "decoder":
            return TokenScores(image)
        return TokenScores(image, found[:, context.text])

    def notes(self, context: Context) -> list[str]:
        vague = ", ".join(repr(word) for word in dict.fromkeys(self.vague))
        told = f"no head localizes {vague}; the heads with the largest sums are shown"
        return super().notes(context) + [told] * bool(vague and context.asked)

    def chosen(self, context: Context, rows: Tensor) -> Tensor:
        """The numbers of the selected heads, given the rows (L H, S) of all heads; fewer if too few heads
        localize."""
        image = HeadRows.of_image(context, rows)
        sums = image.sum(1)
        ordered = sums.sort().values
        place = elbow(ordered)
        if self.released:
            kept = torch.arange(len(sums)) > place
        else:
            kept = sums >= ordered[place]
        numbers = kept.nonzero()[:, 0]
        entropies = torch.tensor([self._entropy(context, m) for m in image[numbers]])
        order = entropies.argsort(stable=True)[: self.heads]
        return numbers[order[entropies[order].isfinite()]]

    def _entropy(self, context: Context, m: Tensor) -> float:
        """E of a row (n,); also infinite for heads that are dropped."""
        above = (m - m.mean()).clamp_min(0)
        limit, parts = THRESHOLD / len(m), list[Tensor]()
        for grid in context.grids:
            own = above[grid]
            if (own[-1] > limit).all():
                return math.inf
            parts += connected_sums(own, own > limit)
        if not parts:
            return math.inf
        shares = torch.stack(parts) / sum(parts)
        return float(-(shares * shares.log()).sum())

    def _smoothed(self, context: Context, scores: Tensor) -> Tensor:
        """Smoothed scores (W, n); the Gaussian is reflected at the edges of a grid, so that sums are
        preserved."""
        from scipy.ndimage import gaussian_filter  # imported late: it loads slowly

        made = scores.clone()
        for grid in context.grids if self.smooth else ():
            own, widths = scores[:, grid].numpy(), (0, self.smooth, self.smooth)
            made[:, grid] = torch.from_numpy(gaussian_filter(own, widths, mode="reflect"))
        return made


def elbow(ordered: Tensor) -> int:
    """The position of the value that is farthest from the straight line between the first and last values.

    >>> elbow(torch.tensor([0.0, 0.1, 0.2, 5.0]))
    2
    """
    share = torch.arange(len(ordered)) / max(len(ordered) - 1, 1)
    line = ordered[0] + share * (ordered[-1] - ordered[0])
    return int((ordered - line).abs().argmax())


def connected_sums(values: Tensor, inside: Tensor) -> list[Tensor]:
    """The sum of ``values`` (h, w) over each part of ``inside``; cells that touch at a side or corner
    belong to the same part."""
    from scipy.ndimage import label  # imported late: it loads slowly

    labels, count = label(inside.numpy(), torch.ones(3, 3))
    return [values[torch.from_numpy(labels == i + 1)].sum() for i in range(count)]
