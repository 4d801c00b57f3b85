"""The flows between queries and keys of Flow-Attention, in time and memory linear in the tokens.

    I_i = (Q_i + e) . (sum_j K_j + e)          O_j = (K_j + e) . (sum_i Q_i + e)            e = 1e-6
    I'_i = (Q_i + e) . (sum_j K_j / O_j + e)   O'_j = (K_j + e) . (sum_i Q_i / I_i + e)

Without e, the sum of I' is the number of keys S, and the sum of O' the number of queries N. In the causal
form, all sums run over tokens 0 to i, and I' and O' are means: (i + 1) K_j / O_j and (i + 1) Q_i / I_i are
summed, and the result is divided by i + 1. Wu et al. 2022, arXiv 2202.06258.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn.kernels.backend import choose, without_autocast
from xattn.kernels.checks import check_attention
from xattn.kernels.flows import causal as prefix
from xattn.kernels.flows import cpu, reference
from xattn.kernels.flows.reference import Problem
from xattn.kernels.op import register
from xattn.kernels.softmax.reference import widen


class Flows(NamedTuple):
    """Flows in float32 at least."""

    incoming: Tensor
    """I, (B, H, N)"""
    refined: Tensor
    """I', (B, H, N)"""
    conserved: Tensor
    """O', (B, H, S)"""


def flows(
    q: Tensor, k: Tensor, *, added: float = 0.0, causal: bool = False, backend: str = "auto"
) -> Flows:
    """Compute the flows of positive features.

    Args:
        q: Q (B, H, N, D); ``k``: K (B, H, S, D), of one dtype and device, not negative.
        added: e, which is added to each flow, also inside the inverses.
        causal: sum over tokens 0 to i; needs N = S.
        backend: see :func:`xattn.kernels.backend.choose`. "triton" works only for causal calls, whose sums
            are then computed by :mod:`xattn.kernels.causal_product`; other calls are plain PyTorch.

    Returns:
        I, I' and O', with gradients of first and second order. Both passes take O(N D) memory.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or ``backend`` is not available for this call.
    """
    check_attention(q, k, causal=causal)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k: got {k.shape[1]} heads; give {q.shape[1]}, as many as q")
    if causal:
        of = CAUSAL[choose(backend, q.device, q.dtype)]
        with without_autocast(q):
            return Flows(*of(widen(q), widen(k), added))
    if backend == "triton":
        raise ValueError("backend: got 'triton'; bidirectional flows have no kernel, give 'auto'")
    backend = "cpu" if backend == "auto" else choose(backend, q.device)
    if backend == "cpu":
        return Flows(*_op(Problem(q, k, added, backend)))
    with without_autocast(q):
        return Flows(*reference.flows(widen(q), widen(k), added))


CAUSAL = {
    "reference": reference.causal_flows,
    "cpu": prefix.causal_flows,
    "triton": prefix.causal_flows_by_products,
}


def _empty(p: Problem) -> Sequence[Tensor]:
    q, k = (widen(x.new_empty(x.shape[:3])) for x in (p.q, p.k))
    totals = q.new_empty(*q.shape[:2], 2, p.q.shape[3])
    return q, torch.empty_like(q), k, torch.empty_like(k), totals, torch.empty_like(totals)


_op: Any = register(
    "flows",
    Problem,
    outputs=("incoming", "refined", "conserved"),
    kept=("outgoing", "totals", "shares"),
    empty=_empty,
    gradients=("q", "k"),
    second=cpu.second,
)
