"""Attention weighted by its gradient, E^l = mean_h max(A^l * dz/dA^l, 0), where z is a word's score.

    generic relevance    r = one-hot(q_t); for l = L..1: r <- r + r E^l    Chefer et al., arXiv 2103.15679
    gradient attention   sum_l of row q_t of E^l                           Zhang et al., arXiv 2502.17422

In an encoder-decoder, q stands for positions of the decoder, and i for positions of the encoder (or image).
All matrix products are in the order of the pass, as published for DETR:

    encoder        R_ii <- R_ii + E R_ii                     R_ii, R_qq: 1 at first, R_qi: 0
    decoder        R_qq <- R_qq + E R_qq,  R_qi <- R_qi + E R_qi
    cross          R_qi <- R_qi + bar(R_qq)^T E bar(R_ii),  bar(R) = (R - 1) / row sums + 1

dA = dY V^T, so a backward pass to the outputs Y = A V of fused attention suffices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xattn.runtime.option_checks import Whole
from xattn.vlm.explainers.base import Context, TokenExplainer, TokenScores, register_token_explainer
from xattn.vlm.explainers.layers import (
    RecordedPass,
    normalise_numbers,
    record_pass,
    start_rows,
    token_scores,
)


@register_token_explainer(
    "generic_relevance",
    title="Generic relevance",
    passes="1 + 1 backward a word",
    needs="calls",
    source="arXiv 2103.15679",
)
@dataclass(kw_only=True, eq=False)
class GenericRelevance(TokenExplainer):
    """Gradient-weighted attention, multiplied through the layers; the scores of image and text tokens come
    from one vector.

    r starts with a 1 at the row that produced the word; this 1 is part of the score of the text token at
    that position.

    Args:
        normalise: whether to multiply cross-attention by bar(R), as published, or by R.
    """

    normalise: bool = True

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        attended = record_pass(context, "generic_relevance", graph=True)
        crossing = any(layer.kind != "self" for layer in attended.layers)
        own, keys = [], []
        for start, grads in zip(start_rows(context, attended), attended.gradients(), strict=True):
            if crossing:
                r_qq, r_qi = self._matrices(attended, grads, start)
                own.append(start @ r_qq)
                keys.append(start @ r_qi)
                continue
            r = start[None, None]
            for layer, grad in zip(reversed(attended.layers), reversed(grads), strict=True):
                r = r + layer.call.operator.gradient_vecmat(layer.call.value, grad, r)
            own.append(r[0, 0])
        return token_scores(context, torch.stack(own), torch.stack(keys) if crossing else None)

    def _matrices(
        self, attended: RecordedPass, grads: Sequence[Tensor], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """R_qq (N, N) and R_qi (N, S), in the dtype of ``like``."""
        sizes = {layer.kind: layer.call.operator.shape for layer in attended.layers}
        queries, keys = sizes["cross"][2:]
        one = {n: torch.eye(n, dtype=like.dtype, device=like.device) for n in (queries, keys)}
        r_ii, r_qq, r_qi = one[keys], one[queries], like.new_zeros(queries, keys)
        bar = _bar if self.normalise else (lambda r: r)
        for (kind, _, call), grad in zip(attended.layers, grads, strict=True):
            e = call.operator.gradient_vecmat(call.value, grad, one[call.operator.shape[2]][None])[
                0
            ]
            if kind == "encoder":
                r_ii = r_ii + e @ r_ii
            elif kind == "self":
                r_qq, r_qi = r_qq + e @ r_qq, r_qi + e @ r_qi
            else:
                r_qi = r_qi + bar(r_qq).T @ e @ bar(r_ii)
        return r_qq, r_qi


def _bar(r: Tensor) -> Tensor:
    """(R - 1) divided by its row sums, plus 1; rows of zeros stay zero."""
    one = torch.eye(len(r), dtype=r.dtype, device=r.device)
    rest = r - one
    sums = rest.sum(1, keepdim=True)
    return torch.where(sums > 0, rest / torch.where(sums > 0, sums, 1), 0) + one


@register_token_explainer(
    "gradient_attention",
    title="Gradient x attention",
    passes="1 + 1 backward a word",
    needs="calls",
    source="arXiv 2502.17422",
    cases=({}, {"layers": (1,)}),
)
@dataclass(kw_only=True, eq=False)
class GradientAttention(TokenExplainer):
    """Rows of gradient-weighted attention, added over the selected layers.

    Because A is nonnegative, max(A dA, 0) = A max(dA, 0), the form in the published program, which uses one
    layer and the gradient of log p of the most probable token.

    Args:
        layers: numbers of the decoder's layers, from 0; by default all.
    """

    layers: Sequence[Whole] | None = None

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        attended = record_pass(context, "gradient_attention", graph=True)
        here = [layer.number for layer in attended.layers if layer.kind != "encoder"]
        normalise_numbers("layers", self.layers or (), max(here) + 1)
        sizes = {layer.kind: layer.call.operator.shape[3] for layer in attended.layers}
        found: dict[str, list[Tensor]] = {kind: [] for kind in sizes}
        for start, grads in zip(start_rows(context, attended), attended.gradients(), strict=True):
            sums = {kind: start.new_zeros(size) for kind, size in sizes.items()}
            for (kind, number, call), grad in zip(attended.layers, grads, strict=True):
                if kind != "encoder" and (self.layers is None or number in self.layers):
                    r = start[None, None]
                    sums[kind] += call.operator.gradient_vecmat(call.value, grad, r)[0, 0]
            for kind, row in sums.items():
                found[kind].append(row)
        rows = {kind: torch.stack(each) for kind, each in found.items()}
        return token_scores(context, rows["self"], rows.get("cross"))
