"""Row vectors times attention, r P, and a gradient-weighted form r E, without ever storing N x S.

    P_ij = exp(scale q_i . k_j + bias_ij - lse_i),   E_ij = mean over heads of max(P_ij (grad_i . v_j), 0)

A rollout (Abnar, Zuidema 2020, arXiv 2005.00928) is a chain of r P, generic relevance (Chefer, Gur,
Wolf 2021, arXiv 2103.15679) one of r + r E: O(N) memory instead of a stored map per layer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from xattn.kernels.backend import choose, own_precision
from xattn.kernels.softmax import check
from xattn.kernels.vecmat import cpu, reference

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
    """``r P`` of softmax attention, with P recomputed from q, k and the log-sum-exp.

    Args:
        q: (B, H, N, D); ``k``: (B, Hk, S, D), of one dtype and device. Query head h reads key head
            h // (H // Hk).
        lse: (B, H, N), from :func:`xattn.kernels.softmax.softmax_attention` with the same q, k, bias,
            scale and ``causal``; a row with -inf has no weights.
        r: (B, R, N) for all heads alike, or (B, H, R, N); R is 1 to 16.
        bias: (B or 1, H or 1, N or 1, S), as attention had it.
        scale: 1 / sqrt(D) by default.
        causal: whether query i sees keys 0 to i only, as attention had it; needs N = S.
        reduce: "mean" over the heads, or "none".
        backend: see :func:`xattn.kernels.backend.choose`.

    Returns:
        (B, R, S), or (B, H, R, S) with reduce="none", in float32 (float64 for float64). It has
        gradients for every tensor given.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, or an unknown ``reduce``.
    """
    check(q, k, k, bias, causal)
    if reduce not in ("mean", "none"):
        raise ValueError(f"reduce: got {reduce!r}; choose 'mean' or 'none'")
    out = _product(q, k, lse, r, None, None, bias, scale, causal, backend)
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
    """``r E``, where E is the positive part of attention times its gradient, averaged over heads.

    Args:
        v: (B, Hk, S, Dv), the values; ``grad``: (B, H, N, Dv), the gradient of what is explained with
            respect to the attention's output; grad_i . v_j is then the gradient with respect to P_ij.

    The other arguments, the result (B, R, S) and errors are those of :func:`vecmat`.
    """
    check(q, k, v, bias, causal)
    shape = (*q.shape[:3], v.shape[3])
    if grad.shape != shape or grad.dtype != q.dtype or grad.device != q.device:
        raise ValueError(
            f"grad: got {tuple(grad.shape)} of {grad.dtype} on {grad.device}; give {shape} of "
            f"{q.dtype} on {q.device}"
        )
    return _product(q, k, lse, r, v, grad, bias, scale, causal, backend).mean(1)


def _product(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    r: Tensor,
    v: Tensor | None,
    grad: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    causal: bool,
    backend: str,
) -> Tensor:
    batch, heads, n, d = q.shape
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
    if not r.is_floating_point() or r.device != q.device:
        raise ValueError(f"r: got {r.dtype} on {r.device}; give floating point on {q.device}")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    r = (r if r.ndim == 4 else r[:, None]).to(wide).expand(-1, heads, -1, -1)
    scale = d**-0.5 if scale is None else float(scale)
    return torch.ops.xattn.vecmat_forward(
        q, k, lse.to(wide), r, v, grad, bias, scale, causal, choose(backend, q.device)
    )


def _path(backend: str) -> Any:
    if backend == "triton":
        from xattn.kernels.vecmat import triton

        return triton
    return reference if backend == "reference" else cpu


@torch.library.custom_op(
    "xattn::vecmat_forward",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor lse, Tensor r, Tensor? v, Tensor? g, Tensor? bias, float scale, "
        "bool causal, str backend) -> Tensor"
    ),
)
def _forward(q, k, lse, r, v, g, bias, scale, causal, backend):  # type: ignore[no-untyped-def]
    with own_precision(q):
        return _path(backend).forward(q, k, lse, r, v, g, bias, scale, causal).contiguous()


@_forward.register_fake
def _(q, k, lse, r, v, g, bias, scale, causal, backend):  # type: ignore[no-untyped-def]
    return r.new_empty(*r.shape[:3], k.shape[2])


@torch.library.custom_op(
    "xattn::vecmat_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor q, Tensor k, Tensor lse, Tensor r, Tensor? v, Tensor? g, Tensor? bias, "
        "float scale, bool causal, bool bias_grad, str backend) -> Tensor[]"
    ),
)
def _backward(grad, q, k, lse, r, v, g, bias, scale, causal, bias_grad, backend):  # type: ignore[no-untyped-def]
    with own_precision(q):
        grads = _path(backend).backward(grad, q, k, lse, r, v, g, bias, scale, causal, bias_grad)
    return [q.new_empty(0) if x is None else x.contiguous() for x in grads]


@_backward.register_fake
def _(grad, q, k, lse, r, v, g, bias, scale, causal, bias_grad, backend):  # type: ignore[no-untyped-def]
    inputs = (q, k, lse, r, v, g, bias if bias_grad else None)
    return [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, scale, causal, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = scale, causal


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    tensors = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    grads = torch.ops.xattn.vecmat_backward(grad, *tensors, *ctx.options, wanted[6], ctx.backend)
    return *(g if w else None for g, w in zip(grads, wanted, strict=False)), None, None, None


torch.library.register_autograd("xattn::vecmat_forward", _differentiate, setup_context=_setup)
