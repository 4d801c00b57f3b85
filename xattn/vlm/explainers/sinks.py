"""Attention sinks: tokens that many rows attend to for every word, but that hold little information on
the image.

Kang et al., ICLR 2025, "See what you are told: visual attention sink in large multimodal models":

    phi_j = max over d in D of |x_jd| / rms(x_j),   x (N, width) the input of a layer from the third on

j is a sink of the layer if phi_j > tau. D is the set of dimensions in which the first token of the sequence
has |x_0d| / rms(x_0) > tau in at least half of these layers (the paper lists D per model: 1415 and 2533 for
Llama-2-7B). Dropped sinks get 0, and each row is rescaled to its previous sum.

Image towers also have such tokens (Darcet et al., ICLR 2024, arXiv 2309.16588): tokens for which |v_i|,
before the projector, is over 4 times the median. Such tokens count as sinks in every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from xattn.kernels.softmax.reference import widen
from xattn.runtime.option_checks import Positive
from xattn.vlm.explainers.base import Context, TokenExplainer
from xattn.vlm.reading import QueryRows

FIRST_LAYER = 2
OUTLIER = 4.0  # multiple of the median length


@dataclass(kw_only=True, eq=False)
class SinkExplainer(TokenExplainer):
    """Base class for attention explainers that can leave out sinks.

    Args:
        sinks: "keep" them, or "drop" them, at the cost of one more pass and a run of the image tower.
        sink_ratio: tau, how far a dimension of a sink must exceed the root mean square.
    """

    sinks: Literal["keep", "drop"] = "keep"
    sink_ratio: Positive = 20.0

    def without_sinks(self, context: Context) -> Callable[[QueryRows], QueryRows]:
        """The function that changes rows according to the options."""
        if self.sinks == "keep":
            return lambda rows: rows
        table = sink_table(context, self.sink_ratio)

        def drop(rows: QueryRows) -> QueryRows:
            if rows.cross or rows.layer is None:
                return rows
            own = table[rows.layer, rows.offset :][: rows.weights.shape[-1]]
            kept = rows.weights.masked_fill(own.to(rows.weights.device), 0)
            scale = rows.weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1e-12)
            return replace(rows, weights=kept * scale)

        return drop

    def notes(self, context: Context) -> list[str]:
        if self.sinks == "keep":
            return []
        found = sink_table(context, self.sink_ratio).any(0)
        if not found.any():
            return ["no token is a sink"]
        text = "" if found.sum() == 1 else "s"
        count = int(found[context.image].sum())
        told = (
            f"{int(found.sum())} sink{text} left out, {count} of {len(context.image)} image tokens"
        )
        outliers = int(tower_outliers(context).sum())
        return [told + f", {outliers} of them outliers of the image tower" * bool(outliers)]


def sink_table(context: Context, ratio: float = 20.0) -> Tensor:
    """(L, P + T), True where the input of a layer makes a token a sink; see the module.

    Raises:
        ValueError: the image tokens are not in a decoder's prompt.
    """
    if context.vlm.kind != "decoder":
        raise ValueError(
            f"sinks: got 'drop', which needs image tokens in the decoder, but a "
            f"{type(context.vlm.model).__name__} has none there; give 'keep'"
        )
    states = context.hidden_states[:-1]
    found = torch.zeros(len(states), len(states[0]), dtype=torch.bool)
    later = states[FIRST_LAYER:]
    if later:
        first = torch.cat([_sizes(x[:1]) > ratio for x in later])  # (layers, width)
        dims = first.float().mean(0) >= 0.5
        found[FIRST_LAYER:] = torch.stack([(_sizes(x)[:, dims] > ratio).any(1) for x in later])
    found[:, context.image[tower_outliers(context)]] = True
    return found


def tower_outliers(context: Context) -> Tensor:
    """(n,), True for image tokens that are outliers of the tower; all False if the projector changes
    the number or the order of the tokens."""
    lengths = context.before_projector
    if lengths is None or len(lengths) != len(context.features):
        return torch.zeros(len(context.features), dtype=torch.bool)
    return (lengths > OUTLIER * lengths.median()).cpu()


def _sizes(x: Tensor) -> Tensor:
    """|x| / rms(x) of the rows of (N, width)."""
    x = widen(x)
    return x.abs() / x.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
