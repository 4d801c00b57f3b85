"""Grad-ECLIP: values of the last layer, weighted by the score's gradient and by cosines of query and keys.

Zhao et al., ICML 2024 and arXiv 2502.18816, for CLIP's image tower and any other ViT. With w, the
gradient of the score with respect to the class token's attention output, concatenated over heads like
q_cls, k_j and v_j,

    map_j = max(lambda_j sum_c w_c v_j[c], 0),    lambda_j = minmax_j cos(q_cls, k_j)

minmax scales lambda over the patches of a photo to [0, 1]. It replaces softmax, which is sparse in CLIP.
The score is any of the backbone's logits: a class, or the similarity to a text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from xattn.attention.inputs import spread_heads
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.record import Call
from xattn.explainers.base import register_explainer
from xattn.explainers.gradients import class_gradients
from xattn.explainers.relevance.attention import (
    CLASS_AND_PATCHES,
    AttentionExplainer,
    AttentionPass,
    layers_text,
)
from xattn.explainers.relevance.legrad import check_layers
from xattn.kernels.softmax.reference import widen


@register_explainer("grad_eclip", title="Grad-ECLIP", networks=("vit",), cases=({}, {"layers": 2}))
@dataclass(kw_only=True, eq=False, repr=False)
class GradEclip(AttentionExplainer):
    """Grad-ECLIP for the token that the classifier reads: one forward pass, one backward pass per class.

    Args:
        layers: the number of final layers whose maps are added; for images, the paper uses one.
        start: see :class:`~xattn.explainers.relevance.attention.AttentionExplainer`. If the classifier
            reads several tokens, their terms are added; with attention pooling, its query takes the
            place of the class token.

    Here the network keeps its heads, whereas the authors' code runs the last layer with a single head. The
    cosine needs a softmax over queries and keys in which all tokens see each other. For other layers lambda
    is the minmax of A's row, and the map's provenance records this.

    Raises:
        ValueError: as in the base class; or ``layers`` exceeds the number of layers, or is above 1 for a
            model with attention pooling.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> method = xattn.create_explainer("grad_eclip", net)
        >>> method.attribute(torch.rand(1, 3, 32, 32), target=3).shape
        torch.Size([1, 1, 2, 2])
    """

    gradients = True
    clips = True

    layers: int = 1

    def _check(self, reading: AttentionPass) -> None:
        if self.start is None and self.layers != 1:
            raise ValueError(
                f"layers: got {self.layers}; {self.backbone.name} pools its tokens by attention with "
                f"a single layer; give 1"
            )
        check_layers(self.layers, len(reading.layers))
        read = self._queries(reading)
        if len(read) > 1:
            self._note(
                f"the classifier reads {len(read)} tokens; the map is the sum of their terms"
            )
        count = len(reading.layers)
        rows = [
            count - self.layers + i
            for i, call in enumerate(self._calls(reading))
            if not _has_cosines(call.operator)
        ]
        if rows:
            self._note(
                f"{layers_text(rows)}: no cosines of queries and keys; scaled rows of A are used"
            )

    def _calls(self, reading: AttentionPass) -> list[Call]:
        if self.start is None:
            assert reading.pool is not None
            return [reading.pool]
        return reading.layers[-self.layers :]

    def _queries(self, reading: AttentionPass) -> list[int]:
        """Numbers of the queries whose outputs the classifier reads."""
        if self.start is None:
            return [0]
        patches = range(reading.prefix, reading.tokens)
        if self.start in ("patches", CLASS_AND_PATCHES):
            return [*([] if self.start == "patches" else [0]), *patches]
        return [int(token) for token in self.start]

    def _rows(self, reading: AttentionPass, classes: Tensor) -> Tensor:
        calls = self._calls(reading)
        outputs = [call.output for call in calls]
        rows = widen(reading.logits.detach().new_zeros(*classes.shape, reading.tokens))
        for m, grads in enumerate(class_gradients(reading.logits, outputs, classes)):
            for call, grad in zip(calls, grads, strict=True):
                rows[:, m, reading.prefix :] += self._terms(call, grad, reading)
        return rows.clamp_min(0)

    @torch.no_grad()
    def _terms(self, call: Call, grad: Tensor, reading: AttentionPass) -> Tensor:
        """sum_i lambda_ij w_i . v_j over the queries i, (B, patches j)."""
        heads, keys = call.operator.shape[1], call.operator.shape[3]
        values = _concatenated(spread_heads(call.value, heads))[:, reading.prefix :]
        queries = torch.tensor(self._queries(reading), device=grad.device)
        terms = values.new_zeros(len(values), keys - reading.prefix)
        for i in queries.split(call.operator.row_chunks()[0].stop):
            weights = _concatenated(grad[:, :, i])
            loosened = _loosened(call.operator, i)[..., reading.prefix :]
            low, high = loosened.aminmax(dim=-1, keepdim=True)
            loosened = (loosened - low) / (high - low).clamp_min(torch.finfo(low.dtype).tiny)
            terms += (loosened * (weights @ values.transpose(1, 2))).sum(1)
        return terms


def _has_cosines(operator: Operator) -> bool:
    return isinstance(operator, SoftmaxOperator) and not (operator.hides or operator.causal)


def _loosened(operator: Operator, index: Tensor) -> Tensor:
    """Similarity of the keys to the queries ``index``, (B, R, S), before scaling."""
    if not isinstance(operator, SoftmaxOperator) or not _has_cosines(operator):
        return operator.rows(index).mean(1)
    q = normalize(_concatenated(operator.q[:, :, index]), dim=-1)
    k = normalize(_concatenated(spread_heads(operator.k, operator.shape[1])), dim=-1)
    return q @ k.transpose(1, 2)


def _concatenated(x: Tensor) -> Tensor:
    """Heads side by side, as in a layer's output: (B, H, N, D) -> (B, N, H D), float32 at least."""
    return widen(x).transpose(1, 2).flatten(2)
