"""Softmax attention in which each block of queries reads a list of key blocks.

    s_ij = scale q_i . k_j + b_j,   lse_i = log sum_{j in J(i)} exp s_ij,
    o_i = sum_{j in J(i)} exp(s_ij - lse_i) v_j

J(i) holds the keys of the blocks that the query's block lists, without those outside the query's box
(:mod:`xattn.kernels.block_sparse.box`: causal, window, n-dimensional neighbourhood). Both outputs are
differentiable, so that segments of keys merge exactly, see :mod:`xattn.kernels.softmax`. Source: block
lists as in Native Sparse Attention (arXiv 2502.11089).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xattn.kernels.backend import choose, own_precision
from xattn.kernels.block_sparse import cpu, reference
from xattn.kernels.block_sparse.block_lists import check_index, transpose_index
from xattn.kernels.block_sparse.box import Box, causal, neighbourhood, permuted, window

__all__ = [
    "Box",
    "block_sparse_attention",
    "causal",
    "check_index",
    "neighbourhood",
    "permuted",
    "transpose_index",
    "window",
]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    q_block: int,
    k_block: int,
    bias: Tensor | None = None,
    box: Box | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of each query block to the key blocks that it lists, with log-sum-exp.

    Args:
        q: (B, H, N, D); ``k``: (B, Hk, S, D); ``v``: (B, Hk, S, Dv), of one dtype and device. Query
            head h reads key head h // (H // Hk).
        index: (B or 1, 1 or Hk or H, ceil(N / q_block), s) int32: numbers of key blocks, each at
            most once per row; -1 is an empty entry.
        q_block, k_block: tokens per block; the last block may be shorter.
        bias: (B or 1, 1 or Hk or H, S), added to the scores of a key; -inf hides it. Differentiable.
        box: which keys of these blocks a query sees; all by default.
        scale: 1 / sqrt(D) by default.
        backend: see :func:`xattn.kernels.backend.choose`.

    Returns:
        o (B, H, N, Dv) in the dtype of ``q``, and lse (B, H, N) in float32 (float64 for float64). A
        row that sees no key has o = 0 and lse = -inf, and passes no gradient on.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; an index out of range or twice in a
            row (on a GPU only with ``XATTN_CHECK=1``, because looking stalls the stream).
    """
    check(q, k, v, index, q_block, k_block, bias, box)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    low, high, position, dilation = (None, None, None, ()) if box is None else box
    return torch.ops.xattn.block_sparse_forward(
        q, k, v, index, bias, low, high, position, list(dilation), q_block, k_block, scale,
        choose(backend, q.device),
    )  # fmt: skip


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    q_block: int,
    k_block: int,
    bias: Tensor | None,
    box: Box | None,
) -> None:
    """Raise a ``ValueError`` that names the argument whose shape, dtype or device does not match."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; give (B, H, tokens, width)")
        if x.dtype != q.dtype or x.device != q.device or not x.is_floating_point():
            raise ValueError(
                f"{name}: got {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; give floating "
                f"point of one kind"
            )
    batch, heads, n, width = q.shape
    key_heads, s = k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != width or heads % key_heads:
        raise ValueError(
            f"k: got shape {tuple(k.shape)}; q {tuple(q.shape)} needs the same B and D, and heads "
            f"that divide its {heads}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v: got shape {tuple(v.shape)}; k {tuple(k.shape)} needs the same B, heads and S"
        )
    if q_block < 1 or k_block < 1:
        raise ValueError(f"q_block, k_block: got {q_block}, {k_block}; give at least 1")
    rows = -(-n // q_block)
    some_heads = (1, key_heads, heads)
    fits = index.ndim == 4 and index.shape[0] in (1, batch) and index.shape[1] in some_heads
    if not fits or index.shape[2] != rows or index.shape[3] < 1:
        raise ValueError(
            f"index: got shape {tuple(index.shape)}; give (1 or {batch}, one of {some_heads}, "
            f"{rows}, s) for {n} queries in blocks of {q_block}"
        )
    if index.dtype != torch.int32 or index.device != q.device:
        raise ValueError(f"index: got {index.dtype} on {index.device}; give int32 on {q.device}")
    if bias is not None:
        fits = bias.ndim == 3 and bias.shape[0] in (1, batch) and bias.shape[1] in some_heads
        if not fits or bias.shape[2] != s:
            raise ValueError(
                f"bias: got shape {tuple(bias.shape)}; give (1 or {batch}, one of {some_heads}, {s})"
            )
        if not bias.is_floating_point() or bias.device != q.device:
            raise ValueError(
                f"bias: got {bias.dtype} on {bias.device}; give floating point on {q.device}"
            )
    if box is not None:
        _check_box(box, n, s, q.device)


def _check_box(box: Box, n: int, s: int, device: torch.device) -> None:
    dimensions = len(box.dilation)
    if not 1 <= dimensions <= 3 or min(box.dilation) < 1:
        raise ValueError(f"box.dilation: got {box.dilation}; give 1 to 3 numbers of at least 1")
    for name, x, rows in (
        ("low", box.low, n),
        ("high", box.high, n),
        ("position", box.position, s),
    ):
        if x.shape != (rows, dimensions):
            raise ValueError(f"box.{name}: got shape {tuple(x.shape)}; give ({rows}, {dimensions})")
        if x.dtype != torch.int32 or x.device != device:
            raise ValueError(f"box.{name}: got {x.dtype} on {x.device}; give int32 on {device}")


def _path(backend: str) -> Any:
    if backend == "triton":
        from xattn.kernels.block_sparse import triton

        return triton
    return reference if backend == "reference" else cpu


_LISTS = "Tensor index, Tensor? bias, Tensor? low, Tensor? high, Tensor? position"
_NUMBERS = "int[] dilation, int q_block, int k_block, float scale"


@torch.library.custom_op(
    "xattn::block_sparse_forward",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_LISTS}, {_NUMBERS}, str backend) -> (Tensor, Tensor)",
)
def _forward(q, k, v, index, bias, low, high, position, dilation, q_block, k_block, scale, backend):  # type: ignore[no-untyped-def]
    check_index(index, -(-k.shape[2] // k_block))
    with own_precision(q):
        o, lse = _path(backend).forward(
            q, k, v, index, bias, low, high, position, dilation, q_block, k_block, scale
        )
    return o.contiguous(), lse.contiguous()


@_forward.register_fake
def _(q, k, v, index, bias, low, high, position, dilation, q_block, k_block, scale, backend):  # type: ignore[no-untyped-def]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)


@torch.library.custom_op(
    "xattn::block_sparse_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, {_LISTS}, Tensor o, "
        f"Tensor lse, {_NUMBERS}, bool bias_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _backward(grad, grad_lse, q, k, v, index, bias, low, high, position, o, lse, *numbers):  # type: ignore[no-untyped-def]
    *numbers, backend = numbers
    with own_precision(q):
        *grads, db = _path(backend).backward(
            grad, grad_lse, q, k, v, index, bias, low, high, position, o, lse, *numbers
        )
    return *(g.contiguous() for g in grads), q.new_empty(0) if db is None else db.contiguous()


@_backward.register_fake
def _(grad, grad_lse, q, k, v, index, bias, low, high, position, o, lse, *numbers):  # type: ignore[no-untyped-def]
    bias_grad = numbers[-2]
    fresh = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return (*fresh, q.new_empty(bias.shape, dtype=bias.dtype) if bias_grad else q.new_empty(0))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, dilation, q_block, k_block, scale, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.numbers, ctx.backend = (dilation, q_block, k_block, scale), backend
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
    rest = (None,) * 8  # the box, the numbers and the backend
    if grad is None and grad_lse is None:
        return None, None, None, None, None, *rest
    *tensors, o, lse = ctx.saved_tensors
    grad = torch.zeros_like(o) if grad is None else grad
    wants_bias = tensors[4] is not None and ctx.needs_input_grad[4]
    dq, dk, dv, db = torch.ops.xattn.block_sparse_backward(
        grad, grad_lse, *tensors, o, lse, *ctx.numbers, wants_bias, ctx.backend
    )
    return dq, dk, dv, None, db if wants_bias else None, *rest


torch.library.register_autograd("xattn::block_sparse_forward", _differentiate, setup_context=_setup)
