"""Gradients at the image features: maps made from G = dz/df, with one backward pass per word.

    gradient x input      s_i = G_i . (f_i - f0_i)                Shrikumar et al., arXiv 1605.01713
    integrated gradients  the same, G the mean from f0 to f       Sundararajan et al., arXiv 1703.01365
    Grad-CAM              s_i = max(f_i . mean_j G_j, 0)          Selvaraju et al., arXiv 1610.02391
    HiResCAM              s_i = G_i . f_i                         Draelos and Carin, arXiv 2011.08891

z is a word's score, f (n, D) the image features that enter the language model, and f0 the baseline
features, which represent no image. Integrated gradients are complete: their sum is z(f) - z(f0), up to
quadrature error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xattn.runtime.option_checks import Count
from xattn.vlm.explainers.base import Context, TokenExplainer, TokenScores, register_token_explainer

COST = "1 + 1 backward a word"
GREY = (128, 128, 128)  # not the colour that processors centre on: some drop all-zero pictures


@register_token_explainer(
    "gradient_x_input",
    title="Gradient x input",
    passes=COST,
    source="arXiv 1605.01713",
    cases=({}, {"baseline": "zero"}),
)
@dataclass(kw_only=True, eq=False)
class GradientXInput(TokenExplainer):
    """s_i = G_i . (f_i - f0_i), signed.

    Args:
        baseline: what f0 is: "mean", the mean image token; "zero"; or "grey", the features of grey photos.
    """

    baseline: Literal["mean", "zero", "grey"] = "mean"

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        difference = context.features - self._baseline(context)
        return TokenScores(context.gradients(of=lambda g: (g * difference).sum(1)))

    def _baseline(self, context: Context) -> Tensor:
        """f0 (n, D)."""
        if self.baseline == "grey":
            grey = [Image.new("RGB", photo.size, GREY) for photo in context.photos]
            return context.features_of(grey)
        f = context.features
        return context.fill.expand_as(f) if self.baseline == "mean" else torch.zeros_like(f)


@register_token_explainer(
    "integrated_gradients",
    title="Integrated gradients",
    passes="steps, each with 1 backward a word",
    source="arXiv 1703.01365",
    cases=({"steps": 3}, {"steps": 2, "baseline": "grey"}),
)
@dataclass(kw_only=True, eq=False)
class IntegratedGradients(GradientXInput):
    """s_i = (f_i - f0_i) . integral_0^1 G_i(f0 + a (f - f0)) da, signed; s sums to z(f) - z(f0).

    Args:
        steps: number of nodes of the Gauss-Legendre rule; each costs one pass.
        baseline: as in :class:`GradientXInput`.
    """

    steps: Count = 16

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        base = self._baseline(context)
        difference = context.features - base
        nodes, weights = np.polynomial.legendre.leggauss(self.steps)  # on [-1, 1]
        found: Any = 0
        for a, w in zip(nodes, weights, strict=True):
            at = base + (float(a) + 1) / 2 * difference
            part = context.gradients(at, of=lambda g: (g.double() * difference).sum(1))
            found = found + float(w) / 2 * part
        return TokenScores(found)


@register_token_explainer("gradcam", title="Grad-CAM", passes=COST, source="arXiv 1610.02391")
@dataclass(kw_only=True, eq=False)
class GradCAM(TokenExplainer):
    """s_i = max(f_i . mean_j G_j, 0), at the projector; the mean is over all image tokens."""

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        f = context.features
        return TokenScores(context.gradients(of=lambda g: f @ g.mean(0)).clamp_min(0))


@register_token_explainer("hirescam", title="HiResCAM", passes=COST, source="arXiv 2011.08891")
@dataclass(kw_only=True, eq=False)
class HiResCAM(TokenExplainer):
    """s_i = G_i . f_i at the projector, signed: gradient x input from a baseline of zeros."""

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        return GradientXInput(baseline="zero").explain(context)
