"""Triton kernels of softmax attention: forward with log-sum-exp, dq by query tiles, dk and dv by key tiles.

Scores are recomputed tile by tile from q, k and lse; every output element is written by one program,
so there are no atomics and two runs agree to the bit. Exponentials run in base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xattn.kernels.backend import interpreted
from xattn.kernels.softmax.reference import delta, reduce_to

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


@triton.jit
def _scores(q, k, bias, stride_bn, stride_bs, rows, columns, N, S, scale, HAS_BIAS: tl.constexpr):
    """Scores (rows, columns) in base 2; -inf outside of the matrix."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
    inside = (rows[:, None] < N) & (columns[None, :] < S)
    if HAS_BIAS:
        at = bias + rows[:, None].to(tl.int64) * stride_bn + columns[None, :] * stride_bs
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
    return tl.where(inside, s, float("-inf"))


@triton.jit
def _load(base, rows, columns, count, width, stride: tl.constexpr):
    """A tile (rows, columns) of a contiguous (count, width) matrix, 0 outside."""
    inside = (rows[:, None] < count) & (columns[None, :] < width)
    at = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store(base, rows, columns, count, width, value, stride: tl.constexpr):
    inside = (rows[:, None] < count) & (columns[None, :] < width)
    at = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, o_ptr, lse_ptr,
    stride_bb, stride_bh, stride_bn, stride_bs, H, N, S, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d, dv = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    bias = bias_ptr + (head // H) * stride_bb + (head % H) * stride_bh
    q = _load(q_ptr + head * N * D, rows, d, N, D, D)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH_V], tl.float32)
    for start in range(0, S, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k = _load(k_ptr + head * S * D, columns, d, S, D, D)
        v = _load(v_ptr + head * S * DV, columns, dv, S, DV, DV)
        s = _scores(q, k, bias, stride_bn, stride_bs, rows, columns, N, S, scale, HAS_BIAS)
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - safe[:, None])
        keep = tl.exp2(top - safe)
        total = total * keep + tl.sum(p, 1)
        acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    _store(o_ptr + head * N * DV, rows, dv, N, DV, acc, DV)
    lse = tl.where(
        some, (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, float("-inf")
    )
    tl.store(lse_ptr + head * N + rows, lse, mask=rows < N)


@triton.jit
def _gradient(
    q, k, v, g, lse, delta, bias, stride_bn, stride_bs, rows, columns, N, S, scale,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Weights P and score gradients dS of one tile."""
    s = _scores(q, k, bias, stride_bn, stride_bs, rows, columns, N, S, scale, HAS_BIAS)
    seen = lse != float("-inf")
    p = tl.exp2(s - tl.where(seen, lse, 0.0)[:, None] * 1.4426950408889634)
    p = tl.where(seen[:, None], p, 0.0)
    ds = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])
    return p, ds


@triton.jit
def dq_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, delta_ptr, dq_ptr, ds_ptr,
    stride_bb, stride_bh, stride_bn, stride_bs, H, N, S, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d, dv = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    bias = bias_ptr + (head // H) * stride_bb + (head % H) * stride_bh
    q = _load(q_ptr + head * N * D, rows, d, N, D, D)
    g = _load(g_ptr + head * N * DV, rows, dv, N, DV, DV)
    lse = tl.load(lse_ptr + head * N + rows, mask=rows < N, other=float("-inf"))
    delta = tl.load(delta_ptr + head * N + rows, mask=rows < N, other=0.0)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, S, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k = _load(k_ptr + head * S * D, columns, d, S, D, D)
        v = _load(v_ptr + head * S * DV, columns, dv, S, DV, DV)
        _, ds = _gradient(
            q, k, v, g, lse, delta, bias, stride_bn, stride_bs, rows, columns, N, S, scale, HAS_BIAS
        )
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
        if WRITE:  # of a bias with a value for every score
            inside = (rows[:, None] < N) & (columns[None, :] < S)
            at = ds_ptr + head * N * S + rows[:, None].to(tl.int64) * S + columns[None, :]
            tl.store(at, ds, mask=inside)
    _store(dq_ptr + head * N * D, rows, d, N, D, dq * scale, D)


@triton.jit
def dkv_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, db_ptr,
    stride_bb, stride_bh, stride_bn, stride_bs, H, N, S, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    d, w = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    bias = bias_ptr + (head // H) * stride_bb + (head % H) * stride_bh
    k = _load(k_ptr + head * S * D, columns, d, S, D, D)
    v = _load(v_ptr + head * S * DV, columns, w, S, DV, DV)
    dk = tl.zeros([COLUMNS, WIDTH], tl.float32)
    dv = tl.zeros([COLUMNS, WIDTH_V], tl.float32)
    db = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, N, ROWS):
        rows = start + tl.arange(0, ROWS)
        q = _load(q_ptr + head * N * D, rows, d, N, D, D)
        g = _load(g_ptr + head * N * DV, rows, w, N, DV, DV)
        lse = tl.load(lse_ptr + head * N + rows, mask=rows < N, other=float("-inf"))
        delta = tl.load(delta_ptr + head * N + rows, mask=rows < N, other=0.0)
        p, ds = _gradient(
            q, k, v, g, lse, delta, bias, stride_bn, stride_bs, rows, columns, N, S, scale, HAS_BIAS
        )
        dv += tl.dot(tl.trans(p).to(g.dtype), g, input_precision="ieee")
        dk += tl.dot(tl.trans(ds).to(q.dtype), q, input_precision="ieee")
        db += tl.sum(ds, 0)
    _store(dk_ptr + head * S * D, columns, d, S, D, dk * scale, D)
    _store(dv_ptr + head * S * DV, columns, w, S, DV, dv, DV)
    if WRITE:  # of a bias a key
        tl.store(db_ptr + head * S + columns, db, mask=columns < S)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if _no_bfloat16(q):
        o, lse = forward(q.float(), k.float(), v.float(), bias, scale)
        return o.to(q.dtype), lse
    q, k, v = (_supported(x).contiguous() for x in (q, k, v))
    o = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    tile = _tile(q, v)
    grid = (triton.cdiv(q.shape[2], tile["ROWS"]), q.shape[0] * q.shape[1])
    options = dict(_shapes(q, k, v), HAS_BIAS=bias is not None, **tile)
    forward_kernel[grid](
        q, k, v, q if bias is None else bias, o, lse, *_strides(bias, q, k), *_sizes(q, k), scale,
        **options,
    )  # fmt: skip
    return o, lse


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if _no_bfloat16(q):
        dq, dk, dv, db = backward(
            grad.float(), grad_lse, q.float(), k.float(), v.float(), bias, o, lse, scale, bias_grad
        )
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), db
    d = delta(grad, grad_lse, o).contiguous()
    g, q, k, v, lse = (x.contiguous() for x in (grad.to(q.dtype), q, k, v, lse))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    batch, heads, n, s = *q.shape[:3], k.shape[2]
    per_key = bias_grad and bias is not None and bias.shape[2] == 1
    full = bias_grad and bias is not None and not per_key
    ds = q.new_empty((batch, heads, n, s) if full else (1,), dtype=torch.float32)
    db = q.new_empty((batch, heads, 1, s) if per_key else (1,), dtype=torch.float32)
    tile = _tile(q, v, backward=True)
    shared = (g, q, k, v, q if bias is None else bias, lse, d)
    numbers = (*_strides(bias, q, k), *_sizes(q, k), scale)
    options = dict(_shapes(q, k, v), HAS_BIAS=bias is not None, **tile)
    dq_kernel[triton.cdiv(n, tile["ROWS"]), batch * heads](
        *shared, dq, ds, *numbers, WRITE=full, **options
    )
    dkv_kernel[triton.cdiv(s, tile["COLUMNS"]), batch * heads](
        *shared, dk, dv, db, *numbers, WRITE=per_key, **options
    )
    summed = reduce_to(ds if full else db, bias) if bias_grad and bias is not None else None
    return dq, dk, dv, summed


def _no_bfloat16(x: Tensor) -> bool:
    """Whether this is Triton's interpreter, which multiplies the bits of bfloat16 as integers."""
    return interpreted() and x.dtype == torch.bfloat16


def _supported(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or x.shape[-1] > 256:
        raise ValueError(
            f"backend='triton': got {x.dtype} of width {x.shape[-1]}; give float32, float16 or "
            f"bfloat16 of at most 256, or use backend='cpu'"
        )
    return x


def _tile(q: Tensor, v: Tensor, backward: bool = False) -> dict[str, int]:
    """Rows and columns of a tile; smaller where registers or shared memory are short."""
    wide = max(q.shape[-1], v.shape[-1]) > 64 or q.dtype == torch.float32
    rows = 64 if wide or backward else 128
    columns = 32 if wide and q.dtype == torch.float32 else 64
    return {"ROWS": rows, "COLUMNS": columns}


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    d, dv = q.shape[3], v.shape[3]
    width, width_v = (max(16, triton.next_power_of_2(x)) for x in (d, dv))
    return {"D": d, "DV": dv, "WIDTH": width, "WIDTH_V": width_v}


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    return q.shape[1], q.shape[2], k.shape[2]


def _strides(bias: Tensor | None, q: Tensor, k: Tensor) -> tuple[int, ...]:
    """Strides of the bias as if it were (B, H, N, S)."""
    if bias is None:
        return 0, 0, 0, 0
    return bias.expand(*q.shape[:3], k.shape[2]).stride()
