"""Softmax pooling: a few queries attend to many, wide tokens; the scores may come as they are.

    o, lse = softmax_pooling(q, k, v, bias),   s = scale q k^T + bias,   o = exp(s - lse) v

Heads pool the tokens of an image so (Vaswani et al., arXiv 1706.03762, with learned queries). The scores
are written once and are small beside the tokens; a perturbation of them is a bias, whose gradient is the
one by the scores. Without q and k the bias is all there is of the scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xattn.kernels.backend import choose, own_precision
from xattn.kernels.op import define
from xattn.kernels.pooling import cpu, reference
from xattn.kernels.softmax.reference import widen


def softmax_pooling(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``softmax(scale q k^T + bias) v`` and the log-sum-exp of the scores.

    Args:
        q: (B or 1, Q, D); ``k``: (B, T, D), keys that all queries share. Both or neither.
        v: (B, G, T, V), each group of values for Q / G queries in a row; of one dtype and device with
            q and k.
        bias: (B, Q, T), added to the scores, or the scores themselves without q and k; -inf hides a
            token. Differentiable.
        scale: 1 / sqrt(D) by default.
        backend: see :func:`xattn.kernels.backend.choose`.

    Returns:
        o (B, Q, V) in the dtype of ``v``, and lse (B, Q) in float32 (float64 for float64). A row that
        sees no token has o = 0 and lse = -inf, and passes no gradient on. The weights are
        ``exp(scores - lse)``. Both have first and second derivatives, the latter in plain PyTorch.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    check(q, k, v, bias)
    if scale is None:
        scale = 1.0 if q is None else q.shape[-1] ** -0.5
    path = choose(backend, v.device)
    return torch.ops.xattn.pooling_forward(q, k, v, bias, float(scale), path)[:2]


def check(q: Tensor | None, k: Tensor | None, v: Tensor, bias: Tensor | None) -> None:
    """Raise a ``ValueError`` that names the tensor whose shape, dtype or device does not match."""
    if v.ndim != 4 or 0 in v.shape or not v.is_floating_point():
        raise ValueError(
            f"v: got {v.dtype} of shape {tuple(v.shape)}; give floating point (B, G, T, V)"
        )
    batch, groups, tokens, _ = v.shape
    if (q is None) != (k is None) or (q is None and bias is None):
        raise ValueError("q, k, bias: give queries and keys, or the scores as bias, or all three")
    for name, x in (("q", q), ("k", k)):
        if x is not None and (x.ndim != 3 or x.dtype != v.dtype or x.device != v.device):
            raise ValueError(
                f"{name}: got {x.dtype} of shape {tuple(x.shape)} on {x.device}; give three axes in "
                f"{v.dtype} on {v.device}, as v has"
            )
    if q is not None and k is not None:
        if k.shape[:2] != (batch, tokens):
            raise ValueError(f"k: got shape {tuple(k.shape)}; v needs ({batch}, {tokens}, D)")
        if q.shape[0] not in (1, batch) or q.shape[2] != k.shape[2] or not q.shape[1]:
            raise ValueError(
                f"q: got shape {tuple(q.shape)}; keys {tuple(k.shape)} need ({batch} or 1, Q, "
                f"{k.shape[2]})"
            )
    queries = bias.shape[1] if q is None and bias is not None and bias.ndim > 1 else 0
    queries = queries if q is None else q.shape[1]
    if bias is not None:
        if bias.shape != (batch, queries, tokens) or bias.device != v.device:
            raise ValueError(
                f"bias: got shape {tuple(bias.shape)} on {bias.device}; give ({batch}, "
                f"{queries or 'Q'}, {tokens}) on {v.device}"
            )
        if not bias.is_floating_point():
            raise ValueError(f"bias: got {bias.dtype}; give floating point, -inf hides a token")
    if queries % groups:
        raise ValueError(f"v: got {groups} groups for {queries} queries; give a divisor of them")


def _path(backend: str) -> Any:
    if backend == "triton":
        from xattn.kernels.pooling import triton

        return triton
    return reference if backend == "reference" else cpu


def _forward(q, k, v, bias, scale, backend):  # type: ignore[no-untyped-def]
    with own_precision(v):
        return tuple(x.contiguous() for x in _path(backend).forward(q, k, v, bias, scale))


def _empty(q, k, v, bias, scale, backend):  # type: ignore[no-untyped-def]
    wide = widen(v.new_empty(0)).dtype
    queries = (bias if q is None else q).shape[1]
    shape = v.shape[0], queries, v.shape[2]
    lse = v.new_empty(shape[:2], dtype=wide)
    kept = v.new_empty((0,) if q is None and backend == "triton" else shape, dtype=wide)
    return v.new_empty(*shape[:2], v.shape[3]), lse, kept


def _backward(grad, grad_lse, q, k, v, bias, o, lse, kept, scale, wanted, backend):  # type: ignore[no-untyped-def]
    with own_precision(v):
        grads = _path(backend).backward(grad, grad_lse, q, k, v, bias, o, lse, kept, scale, wanted)
    return tuple(v.new_empty(0) if x is None else x.contiguous() for x in grads)


def _empty_gradients(grad, grad_lse, q, k, v, bias, o, lse, kept, scale, wanted, backend):  # type: ignore[no-untyped-def]
    inputs = zip((q, k, v, bias), wanted, strict=True)
    return tuple(
        x.new_empty(x.shape) if want and x is not None else v.new_empty(0) for x, want in inputs
    )


define(
    "xattn::pooling_forward",
    "(Tensor? q, Tensor? k, Tensor v, Tensor? bias, float scale, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _empty,
)
define(
    "xattn::pooling_backward",
    "(Tensor grad, Tensor? grad_lse, Tensor? q, Tensor? k, Tensor v, Tensor? bias, Tensor o, "
    "Tensor lse, Tensor kept, float scale, bool[] wanted, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _empty_gradients,
)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, bias, scale, backend = inputs
    ctx.save_for_backward(q, k, v, bias, *output)
    ctx.mark_non_differentiable(output[2])
    ctx.scale, ctx.backend = scale, backend
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, _: Any) -> Any:
    q, k, v, bias, o, lse, kept = ctx.saved_tensors
    if grad is None and grad_lse is None:
        return (None,) * 6
    grad = torch.zeros_like(o) if grad is None else grad
    wanted = list(ctx.needs_input_grad[:4])
    grads = torch.ops.xattn.pooling_backward(
        grad, grad_lse, q, k, v, bias, o, lse, kept, ctx.scale, wanted, ctx.backend
    )
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), None, None


torch.library.register_autograd("xattn::pooling_forward", _differentiate, setup_context=_setup)


@torch.library.register_vmap("xattn::pooling_forward")
def _(info, in_dims, q, k, v, bias, scale, backend):  # type: ignore[no-untyped-def]
    """More examples of a batch; one image in many versions is not copied."""
    many = info.batch_size
    dims = in_dims[:4]
    whole = [
        None if x is None else x.expand(many, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip((q, k, v, bias), dims, strict=True)
    ]
    batch = whole[2].shape[1]
    folded = [
        None if x is None else x.expand(many, batch, *x.shape[2:]).flatten(0, 1) for x in whole
    ]
    out = torch.ops.xattn.pooling_forward(*folded, scale, backend)
    parts = [x if x.ndim == 1 else x.unflatten(0, (many, batch)) for x in out]
    return tuple(parts), tuple(None if x.ndim == 1 else 0 for x in out)


def _setup_second(ctx: Any, inputs: Any, output: Any) -> None:
    grad, grad_lse, q, k, v, bias, _, _, _, scale, wanted, _ = inputs
    ctx.save_for_backward(grad, grad_lse, q, k, v, bias)
    ctx.scale, ctx.wanted = scale, wanted
    ctx.set_materialize_grads(False)


def _differentiate_again(ctx: Any, *grads: Tensor | None) -> Any:
    """The derivatives of the gradients by all that they are made of, o and lse included."""
    needed = ctx.needs_input_grad[:6]
    with torch.enable_grad(), own_precision(ctx.saved_tensors[4]):
        leaves = [
            None if x is None else x.detach().requires_grad_(need)
            for x, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        found = reference.second(*leaves, ctx.scale, ctx.wanted)
        pairs = [
            (x, g) for x, g in zip(found, grads, strict=True) if x is not None and g is not None
        ]
        asked = [x for x in leaves if x is not None and x.requires_grad]
        slopes = torch.autograd.grad(
            [x for x, _ in pairs], asked, [g for _, g in pairs], allow_unused=True
        )
    by_leaf = iter(slopes)
    first = [next(by_leaf) if x is not None and x.requires_grad else None for x in leaves]
    return *first, *(None,) * 6


torch.library.register_autograd(
    "xattn::pooling_backward", _differentiate_again, setup_context=_setup_second
)
