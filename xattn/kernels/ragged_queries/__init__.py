"""Softmax attention for some of the queries, which may differ between heads, without padding.

    o_hi = softmax(scale q_hi K_h^T) V_h   for the queries i that head h keeps,   0 for all others

Each of these queries reads all keys, or all keys up to its own position. A tile of the kernels gathers
queries of one head, so the work is proportional to their number even if heads are used very unevenly.
This serves mixture-of-head attention (arXiv 2410.11842), whose published code computes all heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.kernels.backend import choose, width_limit
from xattn.kernels.checks import check_attention, score_scale
from xattn.kernels.op import register
from xattn.kernels.ragged_queries.reference import Problem
from xattn.kernels.softmax.reference import empty_outputs

_op = register(
    "ragged_queries",
    Problem,
    outputs=("o", "lse"),
    empty=empty_outputs,
    gradients=("q", "k", "v"),
)


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute ``softmax(scale q k^T) v`` in the rows that are kept, and the log-sum-exp of their scores.

    Args:
        q: (B, H, N, D); ``k``: (B, Hk, S, D); ``v``: (B, Hk, S, Dv), of one dtype and device. Query
            head h reads key head h // (H // Hk).
        keep: (B, H, N), True for the queries to compute. If ``keep`` is on a GPU, the CPU never reads it.
        scale: 1 / sqrt(D) by default.
        causal: whether query i sees only keys 0 to i; needs N = S.
        backend: see :func:`xattn.kernels.backend.choose`.

    Returns:
        o (B, H, N, Dv) in the dtype of ``q``, and lse (B, H, N) in float32 (float64 for float64). Rows that
        are not kept have o = 0 and lse = -inf, and pass no gradient on.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    check_attention(q, k, v, causal)
    if keep.shape != q.shape[:3] or keep.dtype != torch.bool or keep.device != q.device:
        raise ValueError(
            f"keep: got {keep.dtype} of shape {tuple(keep.shape)} on {keep.device}; give torch.bool "
            f"of shape {tuple(q.shape[:3])} on {q.device}, one for each query"
        )
    path = choose(backend, q.device, q.dtype, width_limit(q, v))
    return _op(Problem(q, k, v, keep, score_scale(scale, q), causal, path))  # type: ignore[no-any-return]
