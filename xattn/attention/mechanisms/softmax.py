"""Softmax attention: A = softmax(q k^T / sqrt(D)) (Vaswani et al., arXiv 1706.03762)."""

from __future__ import annotations

from xattn.attention.base import Mechanism, register_attention
from xattn.attention.inputs import Inputs
from xattn.attention.operators.base import SoftmaxOperator


@register_attention(
    "softmax",
    paper="arXiv 1706.03762",
    complexity="N^2 D",
    causal=True,
    cross=True,
    grouped=True,
    training_free=True,
    cases=({},),
    bench=({},),
)
class Softmax(Mechanism):
    """Every token sees all tokens or, in a causal call, only itself and earlier ones."""

    def operator(self, inputs: Inputs) -> SoftmaxOperator:
        return SoftmaxOperator(
            inputs.q, inputs.k, inputs.scale, backend=self.backend, causal=inputs.causal
        )
