"""Softmax attention whose log-sum-exp is an output with a gradient of its own.

    o, lse = softmax_attention(q, k, v)

With that gradient, attention over a union of key segments is plain PyTorch: attend each, then merge by
L = logsumexp(lse), o = sum exp(lse - L) o. Sources: FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xattn.kernels.backend import choose, own_precision
from xattn.kernels.softmax import cpu, reference


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``softmax(scale q k^T + bias) v`` and the log-sum-exp of the scores.

    Args:
        q: (B, H, N, D); ``k``: (B, Hk, S, D); ``v``: (B, Hk, S, Dv), of one dtype and device. Query
            head h reads key head h // (H // Hk).
        bias: (B or 1, H or 1, N or 1, S), added to the scores; -inf hides a key. Differentiable.
        scale: 1 / sqrt(D) by default.
        causal: query i sees keys 0 to i only; needs N = S and takes about half the time.
        backend: see :func:`xattn.kernels.backend.choose`.

    Returns:
        o (B, H, N, Dv) in the dtype of ``q``, and lse (B, H, N) in float32 (float64 for float64). A
        row that sees no key has o = 0 and lse = -inf, and passes no gradient on.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    check(q, k, v, bias, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return torch.ops.xattn.softmax_forward(q, k, v, bias, scale, causal, choose(backend, q.device))


def check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> None:
    """Raise a ``ValueError`` that names the tensor whose shape, dtype or device does not match."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; give (B, H, tokens, width)")
        if x.dtype != q.dtype or x.device != q.device or not x.is_floating_point():
            raise ValueError(
                f"{name}: got {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; give floating "
                f"point of one kind"
            )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: got shape {tuple(k.shape)}; q {tuple(q.shape)} needs the same B and D, and heads "
            f"that divide its {q.shape[1]}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v: got shape {tuple(v.shape)}; k {tuple(k.shape)} needs the same B, heads and S"
        )
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"causal: got {q.shape[2]} queries and {k.shape[2]} keys; give as many, or a bias that "
            f"hides keys"
        )
    if bias is not None:
        full = (*q.shape[:3], k.shape[2])
        fits = bias.ndim == 4 and bias.shape[3] == full[3]
        if not fits or any(b not in (1, f) for b, f in zip(bias.shape, full, strict=True)):
            raise ValueError(
                f"bias: got shape {tuple(bias.shape)}; give (B or 1, H or 1, N or 1, S) for {full}"
            )
        if not bias.is_floating_point() or bias.device != q.device:
            raise ValueError(
                f"bias: got {bias.dtype} on {bias.device}; give floating point on {q.device}"
            )


def _path(backend: str) -> Any:
    if backend == "triton":
        from xattn.kernels.softmax import triton

        return triton
    return reference if backend == "reference" else cpu


@torch.library.custom_op(
    "xattn::softmax_forward",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, "
        "bool causal, str backend) -> (Tensor, Tensor)"
    ),
)
def _forward(q, k, v, bias, scale, causal, backend):  # type: ignore[no-untyped-def]
    with own_precision(q):
        o, lse = _path(backend).forward(q, k, v, bias, scale, causal)
    return o.contiguous(), lse.contiguous()


@_forward.register_fake
def _(q, k, v, bias, scale, causal, backend):  # type: ignore[no-untyped-def]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)


@torch.library.custom_op(
    "xattn::softmax_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor o, "
        "Tensor lse, float scale, bool causal, bool bias_grad, str backend) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _backward(grad, grad_lse, q, k, v, bias, o, lse, scale, causal, bias_grad, backend):  # type: ignore[no-untyped-def]
    with own_precision(q):
        *grads, db = _path(backend).backward(
            grad, grad_lse, q, k, v, bias, o, lse, scale, causal, bias_grad
        )
    return *(g.contiguous() for g in grads), q.new_empty(0) if db is None else db.contiguous()


@_backward.register_fake
def _(grad, grad_lse, q, k, v, bias, o, lse, scale, causal, bias_grad, backend):  # type: ignore[no-untyped-def]
    db = torch.empty_like(bias) if bias_grad else q.new_empty(0)
    fresh = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return (*fresh, db)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, bias, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, bias, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
    q, k, v, bias, o, lse = ctx.saved_tensors
    if grad is None and grad_lse is None:
        return (None,) * 7
    grad = torch.zeros_like(o) if grad is None else grad
    wants_bias = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, db = torch.ops.xattn.softmax_backward(
        grad, grad_lse, q, k, v, bias, o, lse, *ctx.options, wants_bias, ctx.backend
    )
    return dq, dk, dv, db if wants_bias else None, None, None, None


torch.library.register_autograd("xattn::softmax_forward", _differentiate, setup_context=_setup)
