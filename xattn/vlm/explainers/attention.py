"""Attention of the row that produced a token: a_i(t) = sum_lh w_lh A^lh[q_t, i], with equal weights w.

Rows are read while the answer is generated, so maps need no additional pass. The default is the mean over
all layers and heads: on models with known evidence, the last layer alone, which tools often show, missed
the evidence. A row may attend to tokens that it does not need, so compare a map with the nats that its word
loses without the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from xattn.vlm.explainers.base import Context, TokenScores, register_token_explainer
from xattn.vlm.explainers.layers import normalise_numbers, token_scores
from xattn.vlm.explainers.sinks import SinkExplainer
from xattn.vlm.model import VLM
from xattn.vlm.reading import QueryRows, read_rows


@dataclass
class Means:
    """Sums of attention rows over layers, each row averaged over heads. There is one sum for each position
    of a query and each kind of keys: those of cross-attention, or those of the query's own sequence.
    ``counts`` holds the number of layers for each position, with both kinds counted together."""

    sums: dict[tuple[int, bool], Tensor] = field(default_factory=dict)
    counts: dict[int, Tensor | int] = field(default_factory=dict)

    def add(self, place: int, row: Tensor, cross: bool, counted: Tensor | None) -> None:
        """Add a row (S,), multiplied by ``counted``: 0 or 1, a tensor that stays on its device, or None for
        1."""
        row = row if counted is None else counted * row
        self.sums[place, cross] = self.sums.get((place, cross), 0) + row
        self.counts[place] = self.counts.get(place, 0) + (1 if counted is None else counted)

    def of(self, places: Sequence[int], cross: bool, length: int) -> Tensor:
        """(T, length): for each of ``places``, its row for one kind of keys, averaged over layers; 0 beyond
        the last key."""
        made = torch.zeros(len(places), length)
        for row, place in zip(made, places, strict=True):
            if (place, cross) in self.sums:
                own = self.sums[place, cross][:length]
                row[: len(own)] = (own / torch.as_tensor(self.counts[place]).clamp_min(1)).cpu()
        return made


@register_token_explainer(
    "attention",
    title="Attention",
    passes="none",
    cases=({}, {"layers": (0, -1), "heads": (1,), "first": "zero"}),
)
@dataclass(kw_only=True, eq=False)
class Attention(SinkExplainer):
    """The attention of the rows that produced a word's tokens, averaged over these tokens.

    Rows of all layers and heads count equally, including those of cross-attention; layers with a window
    that sees no image token are left out.

    Args:
        layers: numbers of the layers to use; negative numbers count from the end; by default all.
        heads: numbers of the heads to use, in the same way.
        first: with "zero", the first token of the sequence, to which many heads attend by default, is set
            to 0, and the mean row of each layer is rescaled to sum to 1 without it.
        sinks: "drop" leaves out attention sinks (:mod:`xattn.vlm.explainers.sinks`), at the cost of two
            more passes and a run of the image tower.
        sink_ratio: how far a dimension of a sink must exceed the root mean square.
    """

    watches = True

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    first: Literal["keep", "zero"] = "keep"

    @contextmanager
    def watch(
        self, vlm: VLM, prompt_ids: Tensor, rows: Sequence[int] | None = None
    ) -> Iterator[Means | None]:
        """Read the last row of each step or, if given, ``rows``. If sinks must be found first, nothing is
        read."""
        if self.sinks == "drop":
            yield None
            return
        kept = Means()
        image = vlm.image_places(prompt_ids).to(vlm.device)
        with read_rows(vlm.decoder, lambda own: self._keep(vlm, own, image, kept), rows):
            yield kept

    def _keep(self, vlm: VLM, rows: QueryRows, image: Tensor, kept: Means) -> None:
        text = vlm.model.config.get_text_config()
        count = getattr(text, "decoder_layers", text.num_hidden_layers)
        if self.layers is not None and rows.layer not in normalise_numbers(
            "layers", self.layers, count
        ):
            return
        if len(rows.weights) > 1:  # beams: it is not yet known which becomes the answer
            return
        weights = rows.over(rows.offset + rows.weights.shape[-1])[0]  # (H, R, S)
        if self.heads is not None:
            weights = weights[normalise_numbers("heads", self.heads, len(weights))]
        windows = ("sliding_window", "attention_chunk_size")
        windowed = vlm.kind == "decoder" and any(getattr(text, name, None) for name in windows)
        for i, place in enumerate(rows.queries):
            row = weights[:, i].mean(0)
            sees = row[image].any().float() if windowed and len(image) else None
            if self.first == "zero" and not rows.cross:
                row = torch.cat([torch.zeros_like(row[:1]), row[1:]])
                row = row / row.sum().clamp_min(1e-12)
            kept.add(place, row, rows.cross, sees)

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        places = context.rows.tolist()
        if seen is None or not set(places) <= seen.counts.keys():
            seen = self._from_one_pass(context, places)
        kind = context.vlm.kind
        inner = len(context.ids if kind == "encoder" else context.sequence)
        length = len(context.prompt_ids if kind == "encoder" else context.features)
        own = context.word_mean(seen.of(places, False, inner))
        keys = context.word_mean(seen.of(places, True, length)) if kind != "decoder" else None
        return token_scores(context, own, keys)

    def _from_one_pass(self, context: Context, places: list[int]) -> Means:
        kept, vlm, image = Means(), context.vlm, context.image.to(context.vlm.device)
        change = self.without_sinks(context)

        def keep(rows: QueryRows) -> None:
            self._keep(vlm, change(rows), image, kept)

        with torch.no_grad(), read_rows(vlm.decoder, keep, places):
            context.logits()
        return kept
