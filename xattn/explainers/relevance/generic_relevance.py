"""Generic attention explainability: r <- r + r E_l from the last layer to the first, for one class.

E = mean_h max(A * dA, 0), dA the gradient of the class logit with respect to A (Chefer, Gur, Wolf,
ICCV 2021, arXiv 2103.15679; one row of their R). dA_ij = dY_i . v_j, so one backward pass to the
layers' outputs Y = A V, which fused attention computes anyway, is enough.

To first order, A_ij dA_ij is the amount that the edge from j to i adds to the logit. This holds for any
sign of A_ij and any row sums, so every operator is used as it is, without normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xattn.explainers.base import register_explainer
from xattn.explainers.gradients import class_gradients
from xattn.explainers.relevance.attention import AttentionExplainer, AttentionPass


@register_explainer("generic_relevance", title="Generic relevance", networks=("vit",))
class GenericRelevance(AttentionExplainer):
    """Gradient-weighted attention of all layers: one forward pass, and a backward pass per class.

    Args:
        start: see :class:`~xattn.explainers.relevance.attention.AttentionExplainer`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> method = xattn.create_explainer("generic_relevance", net)
        >>> method.attribute(torch.rand(1, 3, 32, 32), target=3).shape
        torch.Size([1, 1, 2, 2])
    """

    gradients = True
    clips = True

    def _rows(self, reading: AttentionPass, classes: Tensor) -> Tensor:
        calls = [*reading.layers, *([reading.pool] if self.start is None and reading.pool else [])]
        outputs = [call.output for call in calls]
        rows: list[Tensor] = []
        for grads in class_gradients(reading.logits, outputs, classes):
            with torch.no_grad():
                rows.append(self._row(reading, grads))
        return torch.cat(rows, 1)

    def _row(self, reading: AttentionPass, grads: Sequence[Tensor]) -> Tensor:
        r = self._start_row(reading)
        if r is None:
            pool = reading.pool
            assert pool is not None
            query = torch.ones_like(pool.operator.row_sums()[:, :1])
            r = pool.operator.gradient_vecmat(pool.value, grads[-1], query)
        for call, grad in reversed(list(zip(reading.layers, grads, strict=False))):
            r = r + call.operator.gradient_vecmat(call.value, grad, r)
        return r
