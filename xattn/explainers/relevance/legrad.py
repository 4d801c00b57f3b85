"""LeGrad: the class score is computed from each layer's tokens, and its sensitivity to that layer's
attention is the map.

Bousselham et al., ICCV 2025, arXiv 2404.03214. With the output tokens z_l of layer l, and the network's own
classifier f applied to them,

    E_l[j] = 1/(H N) sum_h sum_i max(ds_l / dA_l[h, i, j], 0),    s_l = f(z_l)[class],    map = sum_l E_l

The gradient is dA_ij = dY_i . v_j. It is computed one row of N numbers at a time, for the tokens i that
the score depends on. A itself is not needed, only the keys that each query may see. If a network pools
its tokens by attention, A_l are the weights with which it pools z_l, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from xattn.attention.inputs import spread_heads
from xattn.attention.record import Call, record
from xattn.explainers.base import probe_of, register_explainer
from xattn.explainers.gradients import probe_image
from xattn.explainers.relevance.attention import (
    AttentionExplainer,
    AttentionPass,
    Start,
    read_attention,
)
from xattn.explainers.relevance.token_blocks import block_outputs, output_changed, token_blocks
from xattn.kernels.softmax.reference import widen


@dataclass(frozen=True)
class LayerReading(AttentionPass):
    """An :class:`~xattn.explainers.relevance.attention.AttentionPass` with each block's output tokens."""

    block_tokens: list[Tensor]
    """(B, N, C) for each block."""
    images: Tensor


@register_explainer(
    "legrad", title="LeGrad", networks=("vit",), cases=({}, {"pool": "model", "layers": 1})
)
@dataclass(kw_only=True, eq=False, repr=False)
class LeGrad(AttentionExplainer):
    """LeGrad of all layers or the last few: one forward pass, a short backward pass per layer and class.

    Args:
        pool: how a layer's tokens are pooled for the classifier: "average" takes their mean, as in the
            paper; "model" pools them as the model pools the last layer's tokens, for example by taking
            the class token, for which one row of dA per layer is enough. If the model pools by
            attention, both are the same.
        layers: the number of final layers to use; None uses all.

    If the classifier cannot be applied to a layer's tokens, as is the case for a probe, the score of the
    last layer is used for all layers, which is recorded in the map's provenance.

    Raises:
        ValueError: the model does not have self-attention over all tokens in every layer, or an option
            is unknown.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> method = xattn.create_explainer("legrad", net)
        >>> method.attribute(torch.rand(1, 3, 32, 32), target=3).shape
        torch.Size([1, 1, 2, 2])
    """

    gradients = True
    clips = True

    pool: Literal["average", "model"] = "average"
    layers: int | None = None
    start: Start | None = field(default="patches", init=False)
    _classified: str = field(default="last", init=False)
    _blocks: list[nn.Module] = field(default_factory=list, init=False)

    def _check(self, reading: AttentionPass) -> None:
        check_layers(self.layers, len(reading.layers))
        try:
            self._blocks = token_blocks(self.backbone, len(reading.layers))
        except ValueError:
            self._blocks = []
        self._classified = self._way()
        if self._classified == "last":
            self._note("the score of the last layer is used for all layers")

    @torch.no_grad()
    def _way(self) -> str:
        """How a layer's tokens reach the classifier: "directly", by another "pass", or not at all
        ("last")."""
        if not self._blocks or probe_of(self.backbone) is not None:
            return "last"
        images = self._move(probe_image(self.backbone))
        with block_outputs(self._blocks) as tokens:
            logits = self.backbone.logits(images)
        if len(tokens) != len(self._blocks):
            return "last"
        for way in ("directly", "pass"):
            if way == "directly" and (
                self.backbone.adapter or not hasattr(self.backbone.model, "norm")
            ):
                continue
            same = self._classify(tokens[-1], images, way)
            other = self._classify(-tokens[-1], images, way)
            if _close(same, logits) and not _close(other, logits):
                return way
        return "last"

    def _classify(self, tokens: Tensor, images: Tensor, way: str) -> Tensor:
        """The network's logits, (B, K), for the last block's ``tokens`` of ``images``."""
        if way == "directly":
            model = self.backbone.model
            return model.forward_head(model.norm(tokens))  # type: ignore[operator]
        with output_changed(self._blocks[-1], lambda _: tokens):
            return self.backbone.logits(images)

    def _read(self, images: Tensor) -> AttentionPass:
        self.backbone.requires_grad_(False)  # the guard restores it
        with block_outputs(self._blocks) as tokens:
            reading = read_attention(self.backbone, images)
        return LayerReading(**vars(reading), block_tokens=tokens, images=images.detach())

    @torch.enable_grad()
    def _rows(self, reading: AttentionPass, classes: Tensor) -> Tensor:
        assert isinstance(reading, LayerReading)
        count = len(reading.layers)
        rows = widen(reading.logits.new_zeros(*classes.shape, reading.tokens))
        for layer in range(count - (self.layers or count), count):
            call, logits = self._scored(reading, layer)
            for m, column in enumerate(classes.unbind(1)):
                score = logits.gather(1, column[:, None]).sum()
                grad = torch.autograd.grad(score, call.output, retain_graph=True)[0]
                rows[:, m] += sensitivity(call, grad)
        return rows

    def _scored(self, reading: LayerReading, layer: int) -> tuple[Call, Tensor]:
        """The attention that is differentiated, and the logits (B, K) of a layer's tokens."""
        if self._classified == "last":
            return reading.pool or reading.layers[layer], reading.logits
        tokens = reading.block_tokens[layer]
        if self.pool == "average" and reading.pool is None:
            tokens = tokens.mean(1, keepdim=True).expand_as(tokens)
        with record(self.backbone.model) as calls:
            logits = self._classify(tokens, reading.images, self._classified)
        pooled = bool(calls) and calls[-1].operator.shape[2] == 1
        return calls[-1] if pooled else reading.layers[layer], logits


@torch.no_grad()
def sensitivity(call: Call, grad: Tensor) -> Tensor:
    """Mean over heads and queries of max(dA, 0), (B, S), for a gradient (B, H, N, Dv) of A V."""
    operator = call.operator
    batch, heads, queries, keys = operator.shape
    values = widen(spread_heads(call.value, heads)).transpose(-2, -1)
    live = (grad != 0).any(-1).flatten(0, 1).any(0).nonzero()[:, 0]
    out = values.new_zeros(batch, keys)
    for rows in live.split(operator.row_chunks()[0].stop):
        positive = (widen(grad[:, :, rows]) @ values).clamp_min(0)
        if operator.hides or operator.causal:
            positive = positive * (operator.rows(rows) != 0)
        out += positive.mean(1).sum(1)
    return out / queries


def check_layers(layers: int | None, count: int) -> None:
    """Raise a ``ValueError`` unless ``layers`` is None or a number from 1 to ``count``, the model's number
    of layers."""
    if layers is not None and not 1 <= layers <= count:
        raise ValueError(f"layers: got {layers}; the model has {count}, give 1..{count}")


def _close(got: Tensor, logits: Tensor) -> bool:
    tolerance = 1e-4 if got.dtype in (torch.float32, torch.float64) else 1e-1
    return got.shape == logits.shape and bool(
        (got - logits).abs().max() <= tolerance * logits.abs().max().clamp_min(1)
    )
