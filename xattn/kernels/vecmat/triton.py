"""Triton kernel of row vectors times attention: one program per head and tile of keys, over all queries.

Every head writes its own R x S result, which is no larger than the keys, and plain PyTorch averages them. A
loop over heads inside the program would be just as deterministic, but would run fewer programs at once. The
backward pass is the tiled one of the cpu path, which runs on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xattn.kernels.aot import DTYPES, WIDTHS, Case, make_case
from xattn.kernels.softmax.reference import row_by_row
from xattn.kernels.softmax.triton import bias_and_strides, sizes, transposed_scores
from xattn.kernels.tiles import load_tile, place, precision, softmax_weights, tile_width
from xattn.kernels.vecmat.cpu import backward as backward
from xattn.kernels.vecmat.reference import Problem

# In half precision, and in single by (wider than 64, gradient): queries and keys per tile, warps, stages.
# No spills on sm_80 and sm_90 for one row or many, with bias, see compile_cases; not timed on a GPU.
HALF = 64, 64, 8, 2
SINGLE = {
    (False, False): (32, 32, 8, 2),
    (False, True): (16, 32, 8, 2),
    (True, False): (16, 64, 8, 2),
    (True, True): (16, 16, 8, 2),
}


@triton.jit
def vecmat_kernel(
    q_ptr, k_ptr, lse_ptr, r_ptr, v_ptr, g_ptr, bias_ptr, out_ptr,
    stride_rb, stride_rh, stride_rr, stride_bb, stride_bh, stride_bn, H, N, S, R, scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    head, tile = place(tl.cdiv(S, COLUMNS))
    key_head = head // GROUP  # batch * Hk + key head, because H is GROUP * Hk
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    lines = tl.arange(0, LINES)
    d, w = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    bias = bias_ptr + (head // H) * stride_bb + (head % H) * stride_bh
    r_base = r_ptr + (head // H) * stride_rb + (head % H) * stride_rh
    k = load_tile(k_ptr + key_head * S * D, columns, d, S, D)
    if GRADIENT:
        v = load_tile(v_ptr + key_head * S * DV, columns, w, S, DV)
    acc = tl.zeros([COLUMNS, LINES], tl.float32)
    first = tile * COLUMNS // ROWS * ROWS if CAUSAL else 0
    for start in range(first, N, ROWS):
        rows = start + tl.arange(0, ROWS)
        q = load_tile(q_ptr + head * N * D, rows, d, N, D)
        lse = tl.load(lse_ptr + head * N + rows, mask=rows < N, other=float("-inf"))
        # Keys outside the matrix need no mask: each has its own row of the result.
        s = transposed_scores(
            q, k, bias, stride_bn, rows, columns, N, S, scale, HAS_BIAS, PRECISION
        )
        if CAUSAL:
            s = tl.where(columns[:, None] <= rows[None, :], s, float("-inf"))
        p = softmax_weights(s, lse[None, :])
        if GRADIENT:
            g = load_tile(g_ptr + head * N * DV, rows, w, N, DV)
            p *= tl.maximum(tl.dot(v, tl.trans(g), input_precision=PRECISION), 0.0)
        if LINES == 1:
            r = tl.load(r_base + rows, mask=rows < N, other=0.0)
            acc += tl.sum(p * r[None, :], 1)[:, None]
        else:
            inside = (rows[:, None] < N) & (lines[None, :] < R)
            at = r_base + lines[None, :].to(tl.int64) * stride_rr + rows[:, None]
            r = tl.load(at, mask=inside, other=0.0)
            acc += tl.dot(p, r, input_precision=PRECISION)
    inside = (columns[:, None] < S) & (lines[None, :] < R)
    at = out_ptr + (head * R + lines[None, :]) * S + columns[:, None]
    tl.store(at, acc, mask=inside)


def forward(p: Problem) -> tuple[Tensor]:
    q, k = (x.contiguous() for x in (p.q, p.k))
    v, g = (None if x is None else x.contiguous() for x in (p.v, p.grad))
    lse, r = p.lse.contiguous(), row_by_row(p.r)
    out = r.new_empty(*q.shape[:2], r.shape[2], k.shape[2])
    bias, strides = bias_and_strides(p)
    width_v, half = 0 if v is None else v.shape[3], q.dtype != torch.float32
    chosen = options(q.shape[3], width_v, half, p.bias is not None, r.shape[2], p.causal)
    chosen["GROUP"] = q.shape[1] // k.shape[1]
    grid = (triton.cdiv(k.shape[2], chosen["COLUMNS"]) * q.shape[0] * q.shape[1],)
    vecmat_kernel[grid](
        q, k, lse, r, q if v is None else v, q if g is None else g, bias, out,
        *r.stride()[:3], *strides, *sizes(q, k), r.shape[2], p.scale, **chosen,
    )  # fmt: skip
    return (out,)


def options(
    d: int, dv: int, half: bool, bias: bool, r: int, causal: bool = False
) -> dict[str, Any]:
    """Shapes, tile and launch options for heads of width d and values of width dv (0: no gradient)."""
    width, width_v, gradient = tile_width(d), tile_width(dv), dv > 0
    rows, columns, warps, stages = HALF if half else SINGLE[max(width, width_v) > 64, gradient]
    return {
        "D": d, "DV": dv, "WIDTH": width, "WIDTH_V": width_v, "ROWS": rows, "COLUMNS": columns,
        # A single line is summed; more form a product of at least 16.
        "LINES": 1 if r == 1 else 16, "PRECISION": precision(),
        "GROUP": 1, "HAS_BIAS": bias, "CAUSAL": causal, "GRADIENT": gradient,
        "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip


def compile_cases() -> Iterator[Case]:
    """Yield the kernels for 1 and for 16 row vectors, plain and weighted by gradients, with 12 heads and N
    = S = 4096."""
    n, heads = 4096, 12
    kinds = (
        (False, 1, False, False),
        (False, 1, False, True),
        (False, 16, False, False),
        (True, 1, False, False),
        (True, 16, False, False),
        (True, 16, True, False),
        (True, 16, True, True),
    )
    for (gradient, r, bias, causal), dtype, d in product(kinds, DTYPES, WIDTHS):
        if dtype == "fp16" and not (bias and causal):
            continue
        size, share = 4 if dtype == "fp32" else 2, 0.5 if causal else 1.0
        yield make_case(
            vecmat_kernel,
            dtype,
            options(d, d if gradient else 0, dtype != "fp32", bias, r, causal),
            f"{'gradient_' if gradient else ''}vecmat {dtype} D={d} R={r}{' bias' if bias else ''}"
            f"{' causal' if causal else ''}",
            operations=2.0 * heads * n * n * d * (1 + gradient) * share,
            bytes=heads
            * n
            * (2 * d * size * (1 + gradient) + 4 * (1 + 2 * r) + n * size * bias * share),
            wide=("lse_ptr", "r_ptr", "out_ptr"),
        )
