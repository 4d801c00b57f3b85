"""RISE on image tokens: s_i = mean score where token i is kept - mean score where it is hidden.

Petsiuk et al., BMVC 2018, arXiv 1806.07421, use the mean of (score x mask) / p, in which any constant part
of the score, such as that of a log-probability, becomes noise. In expectation, the difference above is a
linear function of that mean, the same for every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from xattn.runtime.option_checks import Condition, Count
from xattn.vlm.explainers import base
from xattn.vlm.explainers.base import Context, TokenExplainer, TokenScores, register_token_explainer


@register_token_explainer(
    "rise",
    title="RISE",
    passes="masks",
    source="arXiv 1806.07421",
    cases=({"masks": 8}, {"masks": 3, "cells": 2, "where": "pixel"}),
)
@dataclass(kw_only=True, eq=False)
class Rise(TokenExplainer):
    """The mean score of a word under random masks that keep an image token, minus its mean score under
    masks that hide it.

    All words share the masks, which depend only on the seed.

    Args:
        masks: number of masks, one pass each.
        keep: the probability that a token, or cell, is kept.
        cells: None hides single tokens; otherwise cells of a grid with this many cells per side over each
            photo, at a random offset; a token belongs to the cell that contains its centre.
        where: as in :class:`~xattn.vlm.explainers.occlusion.Occlusion`.
    """

    masks: Count = 200
    keep: Annotated[float, Condition(lambda p: 0 < p < 1, "a probability between 0 and 1")] = 0.5
    cells: Count | None = None
    where: base.Where = "token"

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        hidden = self.hidden(context)
        scores = context.hidden(hidden, self.where).cpu().double()  # (M', W)
        kept, gone = (~hidden).double(), hidden.double()
        means = [x.T @ scores / x.sum(0).clamp_min(1)[:, None] for x in (kept, gone)]
        both = kept.any(0) & gone.any(0)  # otherwise nothing is known about a token
        return TokenScores(((means[0] - means[1]) * both[:, None]).T)

    def hidden(self, context: Context) -> Tensor:
        """(masks, n), True where a mask hides a token."""
        random = np.random.default_rng(self.seed % 2**64)
        hidden = random.random((self.masks, len(context.features))) >= self.keep
        for layout in context.layouts:
            if not self.cells or not layout.grids:
                continue
            grid = random.random((self.masks, self.cells + 1, self.cells + 1)) >= self.keep
            places = []
            for shares in (layout.rows, layout.columns):
                centres = shares @ (np.arange(shares.shape[1]) + 0.5) / shares.shape[1]
                places.append((centres * self.cells + random.random((self.masks, 1))).astype(int))
            own = grid[np.arange(self.masks)[:, None], places[0], places[1]]
            tokens = hidden[:, layout.tokens]
            tokens[:, layout.has_place] = own[:, layout.has_place]
        return torch.from_numpy(hidden)
