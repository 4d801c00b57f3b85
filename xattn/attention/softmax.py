"""Softmax attention: A = softmax(q k^T / sqrt(D)) (Vaswani et al., arXiv 1706.03762)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from xattn.attention.base import Mechanism, register
from xattn.attention.operator import SoftmaxOperator
from xattn.attention.record import attend_and_keep, recording


@register("softmax", paper="arXiv 1706.03762", complexity="N^2 D", training_free=True)
class Softmax(Mechanism):
    """Every token sees every token."""

    def operator(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...] | None, prefix: int
    ) -> SoftmaxOperator:
        return SoftmaxOperator(q, k, backend=self.backend)

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...] | None, prefix: int
    ) -> Tensor:
        if self.backend != "auto":
            return super()._run(q, k, v, grid, prefix)
        if recording():  # one pass gives the output and the log-sum-exp
            return attend_and_keep(q, k, v)
        return F.scaled_dot_product_attention(q, k, v)
