"""Softplus attention with l1 norms and re-weighting, in which only keys above the row's mean count.

    a_ij = softplus(scale ln(N_i) q_i . k_j),   W_ij ~ max(a_ij - o m_i, 0)^p,   y = W V

m_i is the mean of row i over the N_i keys that it sees. Scores are computed twice, because the mean has to
be known before the power is taken. Each row is first divided by its maximum, so the power neither
underflows nor needs a floor. Source: arXiv 2501.13428.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.kernels.backend import choose, width_limit
from xattn.kernels.checks import check_attention, check_positive
from xattn.kernels.op import calls_op, register
from xattn.kernels.softplus.reference import Problem, empty_outputs

_op = register(
    "softplus",
    Problem,
    outputs=("o",),
    kept=("statistics",),
    empty=empty_outputs,
    gradients=("q", "k", "v"),
)


@calls_op(_op, Tensor)
def softplus_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    power: int = 1,
    offset: float = 0.0,
    eps: float = 0.0,
    causal: bool = False,
    backend: str = "auto",
) -> Problem:
    """Compute ``W v`` as defined in :mod:`xattn.kernels.softplus.reference`.

    Args:
        q: (B, H, N, D); ``k``: (B, H, S, D), both float32 or float64; ``v``: (B, H, S, Dv), of their
            dtype or of half precision.
        scale: the factor by which q . k is multiplied, in addition to the logarithm of the number of keys.
        power: p. ``offset``: o, the share of the mean that is subtracted, except in the first three causal
            rows and in constant rows.
        eps: the floor of both norms, as published; 0 for none.
        causal: whether query i sees only keys 0 to i; needs N = S.
        backend: see :func:`xattn.kernels.backend.choose`.

    Returns:
        (B, H, N, Dv) in the dtype of ``v``. Without ``eps`` all rows of W sum to 1. Memory O(N (D + Dv)).

    Raises:
        ValueError: shapes, dtypes or devices do not match, or a number is out of range.
    """
    check_attention(q, k, v.to(q.dtype) if v.is_floating_point() else v, causal)
    if q.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"q: got {q.dtype}; give float32 or float64, v may be of half precision")
    if v.dtype not in (q.dtype, torch.float16, torch.bfloat16):
        raise ValueError(f"v: got {v.dtype}; give {q.dtype}, as q has, or half precision")
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k: got {k.shape[1]} heads for {q.shape[1]}; give one for each of q")
    check_positive(power=power)
    if not (0 <= offset <= 1 and 0 <= eps < 1):
        raise ValueError(f"offset, eps: got {offset}, {eps}; give an offset in [0, 1], a small eps")
    path = choose(backend, q.device, q.dtype, width_limit(q, v))
    return Problem(q, k, v, float(scale), power, float(offset), float(eps), causal, path)
