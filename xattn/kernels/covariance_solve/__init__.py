"""Solves one linear system per query: the covariance of the keys under its attention, plus a ridge.

    (C_i + ridge_i I) x_i = b_i,   C_i = sum_j p_ij (f_j - m_i) (f_j - m_i)^T,
    p_ij = exp(scale q_i . k_j - lse_i)

The solutions are the slopes of local linear attention (arXiv 2510.01450). C_i is never formed, because
conjugate gradients (Hestenes, Stiefel 1952) only need C_i x, which is two products with the keys, for all
queries at once. The gradient is a second solve with the same matrices.
"""

from __future__ import annotations

from torch import Tensor

from xattn.kernels.backend import choose, width_limit
from xattn.kernels.checks import check_attention, score_scale
from xattn.kernels.covariance_solve.reference import Problem
from xattn.kernels.op import register
from xattn.kernels.softmax.reference import wide


def covariance_solve(
    q: Tensor,
    k: Tensor,
    features: Tensor,
    lse: Tensor,
    mean: Tensor,
    right: Tensor,
    ridge: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    iterations: int = 16,
    tolerance: float = 1e-4,
    backend: str = "auto",
) -> Tensor:
    """Solve the systems above for x.

    Args:
        q: (B, H, N, D); ``k``: (B, H, S, D), of one dtype and device.
        features: f, (B, H, S, F), often the keys minus a constant.
        lse: (B, H, N), and ``mean``, m (B, H, N, F), as
            :func:`xattn.kernels.softmax.softmax_attention` returns them for q, k and ``features``.
        right: b, (B, H, N, F).
        ridge: (B, H, N), not negative.
        scale: 1 / sqrt(D) by default.
        causal: whether query i sees only keys 0 to i, as in the attention; needs N = S.
        iterations: the maximum number of steps of conjugate gradients. A row stops when its residual is at
            most ``tolerance`` times b. With backend="reference", the systems are solved exactly.
        backend: see :func:`xattn.kernels.backend.choose`.

    Returns:
        (B, H, N, F) in float32 (float64 for float64). If a row's matrix is 0, its result is 0. It is
        differentiable with respect to every tensor; gradients are exact up to the residual.

    Warns:
        RuntimeWarning: in this solve or the solve for the gradient, a row's residual, recomputed at the
            end, is above ten times ``tolerance`` (on a GPU checked only with ``XATTN_CHECK=1``, because
            reading stalls the stream). In float32, rounding errors alone may leave a residual of 1e-4.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or a number is out of range.
    """
    check_attention(q, k, causal=causal)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k: got {k.shape[1]} heads for {q.shape[1]}; give as many")
    rows, width = tuple(q.shape[:3]), features.shape[-1]
    shapes = {
        "features": (*k.shape[:3], width), "lse": rows, "mean": (*rows, width),
        "right": (*rows, width), "ridge": rows,
    }  # fmt: skip
    given = {"features": features, "lse": lse, "mean": mean, "right": right, "ridge": ridge}
    check_wide(given, shapes, q)
    if iterations < 1 or not tolerance > 0:
        raise ValueError(
            f"iterations, tolerance: got {iterations}, {tolerance}; give at least 1 and a positive number"
        )
    return _op(
        Problem(
            q, k, features, lse, mean, right, ridge, score_scale(scale, q), causal, iterations,
            float(tolerance), choose(backend, q.device, q.dtype, width_limit(q, features)),
        )
    )  # fmt: skip


def check_wide(given: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], q: Tensor) -> None:
    """Raise a ``ValueError`` unless the tensors ``given`` have these ``shapes`` and are float32, or float64
    if ``q`` is float64."""
    kind = wide(q.dtype)
    for name, x in given.items():
        if tuple(x.shape) != shapes[name] or x.dtype != kind or x.device != q.device:
            raise ValueError(
                f"{name}: got {tuple(x.shape)} of {x.dtype} on {x.device}; give {shapes[name]} of "
                f"{kind} on {q.device}"
            )


_op = register(
    "covariance_solve",
    Problem,
    outputs=("x",),
    empty=lambda p: (p.right.new_empty(p.right.shape),),
    gradients=("q", "k", "features", "lse", "mean", "right", "ridge"),
)
