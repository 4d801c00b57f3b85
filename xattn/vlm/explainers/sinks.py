"""Attention sinks: tokens that many rows look at, whatever the word, and that carry little of the image.

Kang et al., ICLR 2025, "See what you are told: visual attention sink in large multimodal models":

    phi_j = max over d in D of |x_jd| / rms(x_j),   x (N, width) the input of a layer from the third on

j is a sink of the layer if phi_j > tau. D are the dimensions where the first token of the sequence has
|x_0d| / rms(x_0) > tau in at least half of these layers (the paper lists D by model: 1415 and 2533 of
Llama-2-7B). Dropped sinks get 0, and each row is scaled to the sum that it had.
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
from xattn.vlm.reading import Rows

FIRST_LAYER = 2


@dataclass(kw_only=True, eq=False)
class SinkExplainer(TokenExplainer):
    """Base of explainers of attention, which may leave out sinks.

    Args:
        sinks: "keep" them, or "drop" them, for a pass more.
        sink_ratio: tau, how far a dimension of a sink is above the root mean square.
    """

    sinks: Literal["keep", "drop"] = "keep"
    sink_ratio: Positive = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._last: tuple[Context, Tensor] | None = None

    def sink_table(self, context: Context) -> Tensor:
        """(L, P + T), True for sinks of a layer.

        Raises:
            ValueError: image tokens are in no prompt of a decoder.
        """
        last = self._last
        if last is None or last[0] is not context:
            last = self._last = context, sink_table(context, self.sink_ratio)
        return last[1]

    def without_sinks(self, context: Context) -> Callable[[Rows], Rows]:
        """What changes rows as the options say."""
        if self.sinks == "keep":
            return lambda rows: rows
        table = self.sink_table(context)

        def drop(rows: Rows) -> Rows:
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
        found = self.sink_table(context).any(0)
        if not found.any():
            return ["no token is a sink"]
        text = "" if found.sum() == 1 else "s"
        count = int(found[context.image].sum())
        return [
            f"{int(found.sum())} sink{text} left out, {count} of {len(context.image)} image tokens"
        ]


def sink_table(context: Context, ratio: float = 20.0) -> Tensor:
    """(L, P + T), True where the input of a layer makes a token a sink; see the module."""
    if context.vlm.kind != "decoder":
        raise ValueError(
            f"sinks: got 'drop', which reads image tokens inside the decoder, and a "
            f"{type(context.vlm.model).__name__} has none there; give 'keep'"
        )
    with torch.no_grad():
        output = context.output(output_hidden_states=True)
    states = getattr(output, "hidden_states", None) or output.language_model_outputs.hidden_states
    sizes = torch.stack([widen(x[0]).abs() / _rms(x[0]) for x in states[:-1]])  # (L, N, width)
    sizes[:FIRST_LAYER] = 0
    seen = (sizes[FIRST_LAYER:, 0] > ratio).float()
    dims = seen.mean(0) >= 0.5 if len(seen) else seen.new_zeros(seen.shape[1], dtype=torch.bool)
    return ((sizes > ratio) & dims).any(2).cpu()


def _rms(x: Tensor) -> Tensor:
    return widen(x).square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
