"""Row vectors times attention, r P, and a gradient-weighted form, r E, without storing an N x S matrix.

    P_ij = exp(scale q_i . k_j + bias_ij - lse_i),   E_ij = mean over heads of max(P_ij (grad_i . v_j), 0)

A rollout (Abnar, Zuidema 2020, arXiv 2005.00928) is a chain of products r P, and generic relevance (Chefer,
Gur, Wolf 2021, arXiv 2103.15679) is a chain of steps r + r E. Both take O(N) memory, because no layer's map
is stored.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from xattn.kernels.backend import choose, width_limit
from xattn.kernels.checks import check_attention, check_bias, check_floating, score_scale
from xattn.kernels.op import register
from xattn.kernels.softmax.reference import wide
from xattn.kernels.vecmat.reference import Problem

ROWS = 16


def vecmat(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    r: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    reduce: Literal["mean", "none"] = "mean",
    backend: str = "auto",
) -> Tensor:
    """Compute ``r P`` of softmax attention, with P recomputed from q, k and the log-sum-exp.

    Args:
        q: (B, H, N, D); ``k``: (B, Hk, S, D), of one dtype and device. Query head h reads key head
            h // (H // Hk).
        lse: (B, H, N), from :func:`xattn.kernels.softmax.softmax_attention` with the same q, k, bias,
            scale and ``causal``; a row with -inf has no weights.
        r: (B, R, N), the same for all heads, or (B, H, R, N); R is 1 to 16.
        bias: (B or 1, H or 1, N or 1, S), as in the attention.
        scale: 1 / sqrt(D) by default.
        causal: whether query i sees only keys 0 to i, as in the attention; needs N = S.
        reduce: "mean" over the heads, or "none".
        backend: see :func:`xattn.kernels.backend.choose`.

    Returns:
        (B, R, S), or (B, H, R, S) with reduce="none", in float32 (float64 for float64). It is
        differentiable with respect to every tensor.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or ``reduce`` is unknown.
    """
    check_attention(q, k, causal=causal)
    check_bias(bias, q, k)
    if reduce not in ("mean", "none"):
        raise ValueError(f"reduce: got {reduce!r}; choose 'mean' or 'none'")
    scale = score_scale(scale, q)
    out = _product(Problem(q, k, lse, r, None, None, bias, scale, causal, backend))
    return out.mean(1) if reduce == "mean" else out


def gradient_vecmat(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad: Tensor,
    r: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Compute ``r E``, where E is the positive part of attention times its gradient, averaged over heads.

    Args:
        v: (B, Hk, S, Dv), the values; ``grad``: (B, H, N, Dv), the gradient of what is explained with
            respect to the attention's output; grad_i . v_j is then the gradient with respect to P_ij.

    The other arguments, the result (B, R, S) and the errors are the same as for :func:`vecmat`.
    """
    check_attention(q, k, v, causal)
    check_bias(bias, q, k)
    shape = (*q.shape[:3], v.shape[3])
    if grad.shape != shape or grad.dtype != q.dtype or grad.device != q.device:
        raise ValueError(
            f"grad: got {tuple(grad.shape)} of {grad.dtype} on {grad.device}; give {shape} of "
            f"{q.dtype} on {q.device}"
        )
    scale = score_scale(scale, q)
    return _product(Problem(q, k, lse, r, v, grad, bias, scale, causal, backend)).mean(1)


def _product(p: Problem) -> Tensor:
    """r W (B, H, R, S), after checking lse and r and converting them to one shape and dtype."""
    q, lse, r, (batch, heads, n) = p.q, p.lse, p.r, p.q.shape[:3]
    if lse.shape != (batch, heads, n) or not lse.is_floating_point() or lse.device != q.device:
        raise ValueError(
            f"lse: got {tuple(lse.shape)} of {lse.dtype} on {lse.device}; give {(batch, heads, n)} "
            f"in floating point on {q.device}, as softmax_attention returns it"
        )
    fits = r.ndim in (3, 4) and r.shape[0] == batch and r.shape[-1] == n
    if not fits or (r.ndim == 4 and r.shape[1] != heads) or not 1 <= r.shape[-2] <= ROWS:
        raise ValueError(
            f"r: got shape {tuple(r.shape)}; give ({batch}, R, {n}) or ({batch}, {heads}, R, {n}) "
            f"with R of 1 to {ROWS}, and more rows in several calls"
        )
    check_floating("r", r, q)
    kind = wide(q.dtype)
    r = (r if r.ndim == 4 else r[:, None]).to(kind).expand(-1, heads, -1, -1)
    path = choose(p.backend, q.device, q.dtype, width_limit(q, q if p.v is None else p.v))
    return _op(p._replace(lse=lse.to(kind), r=r, backend=path))


_op = register(
    "vecmat",
    Problem,
    outputs=("out",),
    empty=lambda p: (p.r.new_empty(*p.r.shape[:3], p.k.shape[2]),),
    gradients=("q", "k", "lse", "r", "v", "grad", "bias"),
)
