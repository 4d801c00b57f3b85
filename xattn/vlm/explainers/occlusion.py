"""Occlusion: s_i = mean over the windows w that hide token i of score(f) - score(f without w).

Zeiler and Fergus, arXiv 1311.2901, applied to image tokens. A window of one token misses evidence that
is present in two tokens; windows of 2 x 2 at every position find it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from xattn.runtime.option_checks import Count
from xattn.vlm.explainers.base import (
    Context,
    TokenExplainer,
    TokenScores,
    Where,
    register_token_explainer,
)
from xattn.vlm.layout import Layout

Box = tuple[int, int, int, int]


@register_token_explainer(
    "occlusion",
    title="Occlusion",
    passes="a window",
    source="arXiv 1311.2901",
    cases=({}, {"size": 1}, {"where": "pixel", "stride": 2}),
)
@dataclass(kw_only=True, eq=False)
class Occlusion(TokenExplainer):
    """How much a word's score falls, on average, when a square window hides an image token.

    Args:
        size: the window's side, in cells of the finest grid of image tokens.
        stride: cells between windows, at most ``size``.
        where: "token": hidden tokens are replaced by the mean image token; "pixel": their cells are filled
            with the photo's mean colour, and the image tower runs again.

    Tokens without positions, as from a resampler, are hidden one by one.
    """

    size: Count = 2
    stride: Count = 1
    where: Where = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride > self.size:
            raise ValueError(
                f"stride: got {self.stride} with windows of {self.size}, which leaves tokens out; give at "
                f"most {self.size}"
            )

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        windows = [(layout, box) for layout in context.layouts for box in self._windows(layout)]
        masks = torch.zeros(len(windows), len(context.features), dtype=torch.bool)
        for mask, (layout, box) in zip(masks, windows, strict=True):
            mask[layout.tokens] = torch.from_numpy(layout.hidden_by(box))
        if not context.grids:
            masks = torch.eye(len(context.features), dtype=torch.bool)
        with torch.no_grad():
            fall = (context.scores() - context.hidden(masks, self.where)).cpu()
        covers = masks.float()
        return TokenScores((covers.T @ fall / covers.sum(0)[:, None].clamp_min(1)).T)

    def notes(self, context: Context) -> list[str]:
        single = "image tokens have no positions, so each is hidden by itself"
        return [] if context.grids else [single]

    def _windows(self, layout: Layout) -> Iterator[Box]:
        """Boxes (top, left, bottom, right) of cells."""
        height, width = layout.shape
        for top, left in product(self._starts(height), self._starts(width)):
            yield top, left, min(top + self.size, height), min(left + self.size, width)

    def _starts(self, cells: int) -> list[int]:
        last = max(cells - self.size, 0)
        return sorted({*range(0, last + 1, self.stride), last})
