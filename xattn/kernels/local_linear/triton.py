"""Triton kernels of local linear attention with known slopes: one for the forward pass, and two for the
gradient, by tiles of queries and by tiles of keys.

Weights are recomputed from q, k and the log-sum-exp. Every output element is written by one program, so two
runs agree to the bit. The factors 1 + x . (f - m) and their products are in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xattn.kernels.aot import DTYPES, WIDTHS, Case, make_case
from xattn.kernels.covariance_solve.triton import shifted_products, tile_weights, transposed_weights
from xattn.kernels.local_linear.reference import Problem
from xattn.kernels.tiles import load_tile, place, store_tile, tile_width

# Padded width: rows and columns of a tile, warps, stages. No spills on sm_80 and sm_90, see
# compile_cases; not timed on a GPU.
TILES = {
    "forward": {16: (32, 32, 8, 2), 32: (32, 32, 8, 2), 64: (32, 32, 8, 2), 128: (16, 16, 8, 2)},
    "rows": {16: (32, 32, 8, 2), 32: (16, 32, 4, 1), 64: (16, 64, 8, 2), 128: (16, 32, 8, 2)},
    "keys": {16: (32, 32, 8, 2), 32: (32, 32, 8, 2), 64: (64, 16, 8, 2), 128: (32, 16, 8, 2)},
}


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, f_ptr, lse_ptr, slope_ptr, shift_ptr, y_ptr, N, S, scale,
    D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, WIDTH_F: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    head, tile = place(tl.cdiv(N, ROWS), CAUSAL)
    rows = tile * ROWS + tl.arange(0, ROWS)
    d, dv, w = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V), tl.arange(0, WIDTH_F)
    q = load_tile(q_ptr + head * N * D, rows, d, N, D)
    x = load_tile(slope_ptr + head * N * F, rows, w, N, F)
    lse = tl.load(lse_ptr + head * N + rows, mask=rows < N, other=0.0)
    shift = tl.load(shift_ptr + head * N + rows, mask=rows < N, other=0.0)
    y = tl.zeros([ROWS, WIDTH_V], tl.float32)
    # A tile of causal queries reads the keys up to its last query.
    stop = tl.minimum(S, (tile + 1) * ROWS) if CAUSAL else S
    for start in range(0, stop, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k = load_tile(k_ptr + head * S * D, columns, d, S, D)
        v = load_tile(v_ptr + head * S * DV, columns, dv, S, DV)
        features = load_tile(f_ptr + head * S * F, columns, w, S, F)
        p = tile_weights(q, k, lse, rows, columns, S, scale, CAUSAL)
        a = p * (1.0 + shifted_products(x, features, shift))
        y += tl.dot(a, v.to(tl.float32), input_precision="tf32x3")
    store_tile(y_ptr + head * N * DV, rows, dv, N, DV, y)


@triton.jit
def rows_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, f_ptr, lse_ptr, slope_ptr, shift_ptr,
    dq_ptr, dslope_ptr, dlse_ptr, total_ptr, N, S, scale,
    D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, WIDTH_F: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Compute dq, dlse, and the sums over keys of p (g . v) f and of p (g . v)."""
    head, tile = place(tl.cdiv(N, ROWS), CAUSAL)
    rows = tile * ROWS + tl.arange(0, ROWS)
    d, dv, w = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V), tl.arange(0, WIDTH_F)
    q = load_tile(q_ptr + head * N * D, rows, d, N, D)
    g = load_tile(g_ptr + head * N * DV, rows, dv, N, DV)
    x = load_tile(slope_ptr + head * N * F, rows, w, N, F)
    lse = tl.load(lse_ptr + head * N + rows, mask=rows < N, other=0.0)
    shift = tl.load(shift_ptr + head * N + rows, mask=rows < N, other=0.0)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    dslope = tl.zeros([ROWS, WIDTH_F], tl.float32)
    dlse, total = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    stop = tl.minimum(S, (tile + 1) * ROWS) if CAUSAL else S
    for start in range(0, stop, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k = load_tile(k_ptr + head * S * D, columns, d, S, D)
        v = load_tile(v_ptr + head * S * DV, columns, dv, S, DV)
        features = load_tile(f_ptr + head * S * F, columns, w, S, F)
        p = tile_weights(q, k, lse, rows, columns, S, scale, CAUSAL)
        share = p * tl.dot(g, tl.trans(v), input_precision="tf32x3")
        ds = share * (1.0 + shifted_products(x, features, shift))
        total += tl.sum(share, 1)
        dlse -= tl.sum(ds, 1)
        dslope += tl.dot(share, features, input_precision="tf32x3")
        dq += tl.dot(ds, k.to(tl.float32), input_precision="tf32x3")
    store_tile(dq_ptr + head * N * D, rows, d, N, D, dq * scale)
    store_tile(dslope_ptr + head * N * F, rows, w, N, F, dslope)
    tl.store(dlse_ptr + head * N + rows, dlse, mask=rows < N)
    tl.store(total_ptr + head * N + rows, total, mask=rows < N)


@triton.jit
def keys_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, f_ptr, lse_ptr, slope_ptr, shift_ptr, dk_ptr, dv_ptr, df_ptr,
    N, S, scale,
    D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, WIDTH_F: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dk, dv and df of one tile of keys, over the queries that see it."""
    head, tile = place(tl.cdiv(S, COLUMNS))
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    d, dv, w = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V), tl.arange(0, WIDTH_F)
    k = load_tile(k_ptr + head * S * D, columns, d, S, D)
    v = load_tile(v_ptr + head * S * DV, columns, dv, S, DV)
    features = load_tile(f_ptr + head * S * F, columns, w, S, F)
    dk = tl.zeros([COLUMNS, WIDTH], tl.float32)
    dvalue = tl.zeros([COLUMNS, WIDTH_V], tl.float32)
    df = tl.zeros([COLUMNS, WIDTH_F], tl.float32)
    first = tile * COLUMNS // ROWS * ROWS if CAUSAL else 0
    for start in range(first, N, ROWS):
        rows = start + tl.arange(0, ROWS)
        q = load_tile(q_ptr + head * N * D, rows, d, N, D)
        g = load_tile(g_ptr + head * N * DV, rows, dv, N, DV)
        x = load_tile(slope_ptr + head * N * F, rows, w, N, F)
        lse = tl.load(lse_ptr + head * N + rows, mask=rows < N, other=0.0)
        shift = tl.load(shift_ptr + head * N + rows, mask=rows < N, other=0.0)
        p = transposed_weights(q, k, lse, rows, columns, N, scale, CAUSAL)
        factor = 1.0 + tl.dot(features, tl.trans(x), input_precision="tf32x3") - shift[None, :]
        share = p * tl.dot(v, tl.trans(g), input_precision="tf32x3")
        dvalue += tl.dot(p * factor, g.to(tl.float32), input_precision="tf32x3")
        df += tl.dot(share, x, input_precision="tf32x3")
        dk += tl.dot(share * factor, q.to(tl.float32), input_precision="tf32x3")
    store_tile(dk_ptr + head * S * D, columns, d, S, D, dk * scale)
    store_tile(dv_ptr + head * S * DV, columns, dv, S, DV, dvalue)
    store_tile(df_ptr + head * S * F, columns, w, S, F, df)


def forward(p: Problem) -> tuple[Tensor]:
    q, k, v, features, lse, slope, shift = _tensors(p)
    y = v.new_empty(*q.shape[:3], v.shape[3])
    chosen, (heads, n, s) = _options("forward", p), _sizes(p)
    forward_kernel[(triton.cdiv(n, chosen["ROWS"]) * heads,)](
        q, k, v, features, lse, slope, shift, y, n, s, p.scale, **chosen
    )
    return (y,)


def backward(
    p: Problem, outputs: tuple[Tensor], grads: tuple[Tensor], wanted: Collection[str]
) -> dict[str, Tensor]:
    q, k, v, features, lse, slope, shift = _tensors(p)
    shared = (grads[0].to(v.dtype).contiguous(), q, k, v, features, lse, slope, shift)
    heads, n, s = _sizes(p)
    dk, dv, df = (torch.empty_like(x) for x in (k, v, features))
    chosen = _options("keys", p)
    keys_kernel[(triton.cdiv(s, chosen["COLUMNS"]) * heads,)](
        *shared, dk, dv, df, n, s, p.scale, **chosen
    )
    found = {"k": dk, "v": dv, "features": df}
    if set(wanted) <= set(found):
        return found
    dq, dslope, dlse, total = (torch.empty_like(x) for x in (q, slope, lse, lse))
    chosen = _options("rows", p)
    rows_kernel[(triton.cdiv(n, chosen["ROWS"]) * heads,)](
        *shared, dq, dslope, dlse, total, n, s, p.scale, **chosen
    )
    total = total[..., None]
    return {
        **found, "q": dq, "lse": dlse, "mean": -total * slope, "slope": dslope - total * p.mean
    }  # fmt: skip


def _tensors(p: Problem) -> tuple[Tensor, ...]:
    q, k, v, features = (x.contiguous() for x in (p.q, p.k, p.v, p.features))
    shift = (p.slope * p.mean).sum(-1)
    return q, k, v, features, p.lse.contiguous(), p.slope.contiguous(), shift


def _sizes(p: Problem) -> tuple[int, int, int]:
    return p.q.shape[0] * p.q.shape[1], p.q.shape[2], p.k.shape[2]


def _options(kernel: str, p: Problem) -> dict[str, Any]:
    return options(kernel, p.q.shape[3], p.v.shape[3], p.features.shape[3], p.causal)


def options(kernel: str, d: int, dv: int, f: int, causal: bool = False) -> dict[str, Any]:
    """Shapes, tile and launch options of a kernel for heads, values and features of these widths."""
    widths = tile_width(d), tile_width(dv), tile_width(f)
    rows, columns, warps, stages = TILES[kernel][max(widths)]
    return {
        "D": d, "DV": dv, "F": f, **dict(zip(("WIDTH", "WIDTH_V", "WIDTH_F"), widths, strict=True)),
        "ROWS": rows, "COLUMNS": columns, "CAUSAL": causal,
        "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip


def compile_cases() -> Iterator[Case]:
    """Yield every kernel for N = S = 4096 and 12 heads, plain and causal."""
    n, heads = 4096, 12
    kernels = {"forward": forward_kernel, "rows": rows_kernel, "keys": keys_kernel}
    products = {"forward": 3, "rows": 5, "keys": 6}
    half = ("g_ptr", "q_ptr", "k_ptr", "v_ptr", "y_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    for name, dtype, d, causal in product(kernels, DTYPES, WIDTHS, (False, True)):
        if dtype == "fp16" and not causal:
            continue
        kernel, share = kernels[name], 0.5 if causal else 1.0
        tensors = sum(arg.endswith("_ptr") for arg in kernel.arg_names)
        yield make_case(
            kernel,
            dtype,
            options(name, d, d, d, causal),
            f"local_linear {name} {dtype} D={d}{' causal' if causal else ''}",
            operations=2.0 * products[name] * heads * n * n * d * share,
            bytes=heads * n * tensors * d * 4.0,
            wide=[arg for arg in kernel.arg_names if arg not in half],
        )
