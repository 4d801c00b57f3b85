"""Attention of a single layer: the row that the classifier reads, or the attention that each token
receives.

``raw_attention``: s A, with s the classifier's starting row (e_cls if it reads the class token).
``column_mass``: (1/N) sum_i A_ij, the mean attention that token j receives. The map is the same for every
class.

Both show A unchanged: an entry is the weight of a token's value in the layer's output, even if rows do
not sum to 1. The weights of a row may be negative. If they cancel in the mean over queries, that mean
is not an amount of attention received, so ``column_mass`` raises an error for such layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from xattn.attention.record import Call
from xattn.explainers.base import register_explainer
from xattn.explainers.relevance.attention import (
    AttentionExplainer,
    AttentionPass,
    Fusion,
    Start,
    choose_layer,
    first_row,
    fuse,
    layers_text,
)


@register_explainer("raw_attention", title="Raw attention", networks=("vit",))
@dataclass(kw_only=True, eq=False, repr=False)
class RawAttention(AttentionExplainer):
    """Attention of the starting row in one layer, signed; it takes O(N d) time if that row reads only a few
    tokens.

    Args:
        layer: negative numbers count from the end. If the model uses attention pooling, that counts as the
            last layer, and maps of earlier layers start from its attention row.
        fusion: how heads are combined, after rows are averaged: "mean", "max", "min", or a head's number.
        start: see :class:`~xattn.explainers.relevance.attention.AttentionExplainer`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> method = xattn.create_explainer("raw_attention", net, layer=-1, fusion="mean")
        >>> method.attribute(torch.rand(1, 3, 32, 32), target=3).shape
        torch.Size([1, 1, 2, 2])
    """

    clips = True

    layer: int = -1
    fusion: Fusion | int = "mean"

    def _check(self, reading: AttentionPass) -> None:
        layers = len(reading.layers) + (self.start is None)
        self.layer = choose_layer(self.layer, layers)
        heads = self._call(reading).operator.shape[1]
        if isinstance(self.fusion, int) and not 0 <= self.fusion < heads:
            raise ValueError(f"fusion: got head {self.fusion}; the layer has 0..{heads - 1}")

    def _call(self, reading: AttentionPass) -> Call:
        calls = [*reading.layers, *([reading.pool] if reading.pool else [])]
        return calls[self.layer]

    @torch.no_grad()
    def _rows(self, reading: AttentionPass, classes: Tensor) -> Tensor:
        call = self._call(reading)
        operator = call.operator
        if call is reading.pool:
            return self._fused(first_row(call))
        if isinstance(self.start, tuple):
            index = torch.tensor(self.start, device=reading.logits.device)
            return self._fused(operator.rows(index).mean(2, keepdim=True))
        start = self._start_row(reading)
        if start is None:
            assert reading.pool is not None
            start = first_row(reading.pool).mean(1)
        return self._fused(operator.vecmat(start))

    def _fused(self, rows: Tensor) -> Tensor:
        return fuse(rows, self.fusion) if isinstance(self.fusion, str) else rows[:, self.fusion]


@register_explainer("column_mass", title="Attention received", networks=("vit",))
@dataclass(kw_only=True, eq=False, repr=False)
class ColumnMass(AttentionExplainer):
    """Attention that each patch receives, averaged over queries and heads; queries whose rows have
    larger sums have more weight.

    Args:
        layer: negative numbers count from the end; None averages over all layers.

    Raises:
        ValueError: the attention of a layer may be negative.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> method = xattn.create_explainer("column_mass", net)
        >>> method.attribute(torch.rand(1, 3, 32, 32), target=3).shape
        torch.Size([1, 1, 2, 2])
    """

    clips = True

    layer: int | None = -1
    start: Start | None = field(default="patches", init=False)

    def _check(self, reading: AttentionPass) -> None:
        if self.layer is not None:
            self.layer = choose_layer(self.layer, len(reading.layers))
        signed = [i for i in self._layers(reading) if reading.layers[i].operator.signed]
        if signed:
            raise ValueError(
                f"layer: attention of {layers_text(signed)} may be negative, so it is not a mass that "
                f"patches receive; use 'rollout', which takes |A|, or 'generic_relevance'"
            )

    def _layers(self, reading: AttentionPass) -> list[int]:
        return list(range(len(reading.layers))) if self.layer is None else [self.layer]

    @torch.no_grad()
    def _rows(self, reading: AttentionPass, classes: Tensor) -> Tensor:
        layers = [reading.layers[i] for i in self._layers(reading)]
        start = torch.ones_like(first_row(layers[0])[:, 0]) / reading.tokens
        return torch.stack([call.operator.vecmat(start, "mean") for call in layers]).mean(0)
