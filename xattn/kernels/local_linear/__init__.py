"""Softmax attention whose weights are multiplied by a linear factor that differs for each query.

    y_i = sum_j p_ij [1 + x_i . (f_j - m_i)] v_j,   p_ij = exp(scale q_i . k_j - lse_i)

With m_i = sum_j p_ij f_j, rows sum to 1 for any slopes x, and entries may be negative. If the slopes solve
a least-squares problem, this is local linear attention (arXiv 2510.01450), see
:mod:`xattn.kernels.covariance_solve`.
"""

from __future__ import annotations

from torch import Tensor

from xattn.kernels.backend import choose, width_limit
from xattn.kernels.checks import check_attention, score_scale
from xattn.kernels.covariance_solve import check_wide
from xattn.kernels.local_linear.reference import Problem
from xattn.kernels.op import register


def local_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor,
    lse: Tensor,
    mean: Tensor,
    slope: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Compute y in the equation above.

    Args:
        q: (B, H, N, D); ``k``: (B, H, S, D); ``v``: (B, H, S, Dv), of one dtype and device.
        features: f, (B, H, S, F); ``slope``: x, (B, H, N, F).
        lse: (B, H, N), and ``mean``, m (B, H, N, F), as
            :func:`xattn.kernels.softmax.softmax_attention` returns them for q, k and ``features``.
        scale: 1 / sqrt(D) by default.
        causal: whether query i sees only keys 0 to i, as in the attention; needs N = S.
        backend: see :func:`xattn.kernels.backend.choose`.

    Returns:
        (B, H, N, Dv) in the dtype of ``v``; sums are at least in float32. It is differentiable with
        respect to every tensor.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    check_attention(q, k, v, causal)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k: got {k.shape[1]} heads for {q.shape[1]}; give as many")
    rows, width = tuple(q.shape[:3]), features.shape[-1]
    shapes = {
        "features": (*k.shape[:3], width), "lse": rows, "mean": (*rows, width), "slope": (*rows, width)
    }  # fmt: skip
    check_wide({"features": features, "lse": lse, "mean": mean, "slope": slope}, shapes, q)
    backend = choose(backend, q.device, q.dtype, width_limit(q, v, features))
    return _op(Problem(q, k, v, features, lse, mean, slope, score_scale(scale, q), causal, backend))


_op = register(
    "local_linear",
    Problem,
    outputs=("y",),
    empty=lambda p: (p.v.new_empty(*p.q.shape[:3], p.v.shape[3]),),
    gradients=("q", "k", "v", "features", "lse", "mean", "slope"),
)
