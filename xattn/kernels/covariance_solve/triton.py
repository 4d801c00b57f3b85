"""Triton kernels of a solve with every query's covariance: one for conjugate gradients, by tiles of
queries, and two for the gradient, by tiles of queries and by tiles of keys.

A program keeps the vectors of its rows (solution, residual, direction) in registers for all steps and reads
the keys once per step; scores are recomputed. It stops reading once all of its rows have converged. All
products are in float32, as three TF32 products each, because the residuals of conjugate gradients need this
precision.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xattn.kernels.aot import WIDTHS, Case, make_case
from xattn.kernels.covariance_solve.reference import Problem, warn_of_residual
from xattn.kernels.softmax.reference import widen
from xattn.kernels.tiles import load_tile, place, softmax_weights, store_tile, tile_width

# Padded width: rows and columns of a tile, warps, stages. No spills on sm_80 and sm_90, see compile_cases;
# not timed on a GPU. Compiled once for all sizes: as a size of 1 or a multiple of 16, "solve" would spill.
TILES = {
    "solve": {16: (32, 16, 4, 2), 32: (16, 32, 4, 1), 64: (16, 32, 4, 1), 128: (16, 16, 8, 1)},
    "rows": {16: (32, 32, 8, 2), 32: (16, 32, 4, 1), 64: (16, 64, 8, 2), 128: (16, 16, 8, 2)},
    "keys": {16: (32, 32, 4, 2), 32: (16, 64, 8, 2), 64: (32, 32, 8, 2), 128: (16, 16, 8, 1)},
}


@triton.jit
def tile_weights(q, k, lse, rows, columns, S, scale, CAUSAL: tl.constexpr):
    """p (rows, columns), 0 for keys that are hidden or outside."""
    s = tl.dot(q, tl.trans(k), input_precision="tf32x3") * (scale * 1.4426950408889634)
    seen = columns[None, :] < S
    if CAUSAL:
        seen = seen & (columns[None, :] <= rows[:, None])
    return softmax_weights(tl.where(seen, s, float("-inf")), lse[:, None])


@triton.jit
def transposed_weights(q, k, lse, rows, columns, N, scale, CAUSAL: tl.constexpr):
    """Return p transposed, (columns, rows), for products that have one row per key; 0 for queries
    outside."""
    s = tl.dot(k, tl.trans(q), input_precision="tf32x3") * (scale * 1.4426950408889634)
    seen = rows[None, :] < N
    if CAUSAL:
        seen = seen & (columns[:, None] <= rows[None, :])
    return softmax_weights(tl.where(seen, s, float("-inf")), lse[None, :])


@triton.jit
def shifted_products(x, features, shift):
    """x_i . f_j - shift_i, (rows, columns)."""
    return tl.dot(x, tl.trans(features), input_precision="tf32x3") - shift[:, None]


@triton.jit
def _times(
    x, q, lse, ridge, k_ptr, f_ptr, mean_ptr, rows, d, w, stop, N, S, scale,
    D: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, WIDTH_F: tl.constexpr,
    COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """(C + ridge I) x for the rows of a tile."""
    acc = tl.zeros([ROWS, WIDTH_F], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    shift = tl.sum(x * load_tile(mean_ptr, rows, w, N, F), 1)
    for start in range(0, stop, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        features = load_tile(f_ptr, columns, w, S, F)
        t = shifted_products(x, features, shift)
        k = load_tile(k_ptr, columns, d, S, D)
        t *= tile_weights(q, k, lse, rows, columns, S, scale, CAUSAL)
        acc += tl.dot(t, features, input_precision="tf32x3")
        total += tl.sum(t, 1)
    mean = load_tile(mean_ptr, rows, w, N, F)  # anew: it would take registers all the while
    return acc - total[:, None] * mean + ridge[:, None] * x


@triton.jit(do_not_specialize=["N", "S", "iterations"])
def solve_kernel(
    q_ptr, k_ptr, f_ptr, lse_ptr, mean_ptr, right_ptr, ridge_ptr, line_ptr, x_ptr, residual_ptr,
    N, S, iterations, scale,
    D: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, WIDTH_F: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    head, tile = place(tl.cdiv(N, ROWS), CAUSAL)
    rows = tile * ROWS + tl.arange(0, ROWS)
    d, w = tl.arange(0, WIDTH), tl.arange(0, WIDTH_F)
    k_head, f_head = k_ptr + head * S * D, f_ptr + head * S * F
    q = load_tile(q_ptr + head * N * D, rows, d, N, D)
    mean_head = mean_ptr + head * N * F
    r = load_tile(right_ptr + head * N * F, rows, w, N, F)
    lse = tl.load(lse_ptr + head * N + rows, mask=rows < N, other=0.0)
    ridge = tl.load(ridge_ptr + head * N + rows, mask=rows < N, other=1.0)
    line = tl.load(line_ptr + head * N + rows, mask=rows < N, other=0.0)
    # A tile of causal queries reads the keys up to its last query.
    stop = tl.minimum(S, (tile + 1) * ROWS) if CAUSAL else S
    x = tl.zeros([ROWS, WIDTH_F], tl.float32)
    towards = r
    rest = tl.sum(r * r, 1)
    for _ in range(0, iterations):
        live = rest > line
        some = tl.where(tl.max(live.to(tl.int32), 0) > 0, stop, 0)
        t = _times(
            towards, q, lse, ridge, k_head, f_head, mean_head, rows, d, w, some, N, S, scale,
            D, F, ROWS, WIDTH_F, COLUMNS, CAUSAL,
        )  # fmt: skip
        curvature = tl.sum(towards * t, 1)
        bent = curvature > 0
        step = tl.where(live & bent, rest / tl.where(bent, curvature, 1.0), 0.0)
        x += step[:, None] * towards
        r -= step[:, None] * t
        # Without curvature there is nothing to fit: x stays.
        after = tl.where(live, tl.where(bent, tl.sum(r * r, 1), 0.0), rest)
        ratio = tl.where(live, after / tl.where(live, rest, 1.0), 0.0)
        towards = r + ratio[:, None] * towards
        rest = after
    t = _times(
        x, q, lse, ridge, k_head, f_head, mean_head, rows, d, w, stop, N, S, scale,
        D, F, ROWS, WIDTH_F, COLUMNS, CAUSAL,
    )  # fmt: skip
    right = load_tile(right_ptr + head * N * F, rows, w, N, F)
    size = tl.sum(right * right, 1)
    left = tl.sum((right - t) * (right - t), 1)
    solvable = tl.max(tl.abs(x), 1) > 0
    residual = tl.where(solvable, tl.sqrt(left / tl.where(size > 0, size, 1.0)), 0.0)
    store_tile(x_ptr + head * N * F, rows, w, N, F, x)
    tl.store(residual_ptr + head * N + rows, residual, mask=rows < N)


@triton.jit(do_not_specialize=["N", "S"])
def rows_kernel(
    q_ptr, k_ptr, f_ptr, lse_ptr, x_ptr, u_ptr, shift_x_ptr, shift_u_ptr,
    dq_ptr, dlse_ptr, total_x_ptr, total_u_ptr, N, S, scale,
    D: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, WIDTH_F: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dq and dlse, and the sums over keys of p (x . t) and p (u . t)."""
    head, tile = place(tl.cdiv(N, ROWS), CAUSAL)
    rows = tile * ROWS + tl.arange(0, ROWS)
    d, w = tl.arange(0, WIDTH), tl.arange(0, WIDTH_F)
    q = load_tile(q_ptr + head * N * D, rows, d, N, D)
    x = load_tile(x_ptr + head * N * F, rows, w, N, F)
    u = load_tile(u_ptr + head * N * F, rows, w, N, F)
    inside = rows < N
    lse = tl.load(lse_ptr + head * N + rows, mask=inside, other=0.0)
    shift_x = tl.load(shift_x_ptr + head * N + rows, mask=inside, other=0.0)
    shift_u = tl.load(shift_u_ptr + head * N + rows, mask=inside, other=0.0)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    dlse = tl.zeros([ROWS], tl.float32)
    total_x, total_u = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    stop = tl.minimum(S, (tile + 1) * ROWS) if CAUSAL else S
    for start in range(0, stop, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k = load_tile(k_ptr + head * S * D, columns, d, S, D)
        features = load_tile(f_ptr + head * S * F, columns, w, S, F)
        share = tile_weights(q, k, lse, rows, columns, S, scale, CAUSAL)
        by_u = shifted_products(u, features, shift_u)
        total_u += tl.sum(share * by_u, 1)
        share *= shifted_products(x, features, shift_x)
        total_x += tl.sum(share, 1)
        share *= by_u
        dlse += tl.sum(share, 1)
        dq -= tl.dot(share, k.to(tl.float32), input_precision="tf32x3")
    store_tile(dq_ptr + head * N * D, rows, d, N, D, dq * scale)
    tl.store(dlse_ptr + head * N + rows, dlse, mask=inside)
    tl.store(total_x_ptr + head * N + rows, total_x, mask=inside)
    tl.store(total_u_ptr + head * N + rows, total_u, mask=inside)


@triton.jit(do_not_specialize=["N", "S"])
def keys_kernel(
    q_ptr, k_ptr, f_ptr, lse_ptr, x_ptr, u_ptr, shift_x_ptr, shift_u_ptr, dk_ptr, df_ptr,
    N, S, scale,
    D: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, WIDTH_F: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dk and df of one tile of keys, over the queries that see it."""
    head, tile = place(tl.cdiv(S, COLUMNS))
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    d, w = tl.arange(0, WIDTH), tl.arange(0, WIDTH_F)
    k = load_tile(k_ptr + head * S * D, columns, d, S, D)
    features = load_tile(f_ptr + head * S * F, columns, w, S, F)
    dk = tl.zeros([COLUMNS, WIDTH], tl.float32)
    df = tl.zeros([COLUMNS, WIDTH_F], tl.float32)
    first = tile * COLUMNS // ROWS * ROWS if CAUSAL else 0
    for start in range(first, N, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < N
        q = load_tile(q_ptr + head * N * D, rows, d, N, D)
        x = load_tile(x_ptr + head * N * F, rows, w, N, F)
        u = load_tile(u_ptr + head * N * F, rows, w, N, F)
        lse = tl.load(lse_ptr + head * N + rows, mask=inside, other=0.0)
        shift_x = tl.load(shift_x_ptr + head * N + rows, mask=inside, other=0.0)
        shift_u = tl.load(shift_u_ptr + head * N + rows, mask=inside, other=0.0)
        p = transposed_weights(q, k, lse, rows, columns, N, scale, CAUSAL)
        by_x = tl.dot(features, tl.trans(x), input_precision="tf32x3") - shift_x[None, :]
        by_u = tl.dot(features, tl.trans(u), input_precision="tf32x3") - shift_u[None, :]
        dk += tl.dot(-p * by_x * by_u, q.to(tl.float32), input_precision="tf32x3")
        df -= tl.dot(p * by_x, u, input_precision="tf32x3")
        df -= tl.dot(p * by_u, x, input_precision="tf32x3")
    store_tile(dk_ptr + head * S * D, columns, d, S, D, dk * scale)
    store_tile(df_ptr + head * S * F, columns, w, S, F, df)


def forward(p: Problem) -> tuple[Tensor]:
    return (_solve(p, p.right),)


def _solve(p: Problem, right: Tensor) -> Tensor:
    q, k = (widen(x).contiguous() for x in (p.q, p.k))  # half precision would spill
    features, lse, mean, right, ridge = (
        x.contiguous() for x in (p.features, p.lse, p.mean, right, p.ridge)
    )
    line = p.tolerance**2 * right.square().sum(-1)
    x, residual = torch.empty_like(right), torch.empty_like(lse)
    chosen, (heads, n, s) = _options("solve", p), _sizes(p)
    solve_kernel[(triton.cdiv(n, chosen["ROWS"]) * heads,)](
        q, k, features, lse, mean, right, ridge, line, x, residual, n, s, p.iterations, p.scale,
        **chosen,
    )  # fmt: skip
    warn_of_residual(residual, p.tolerance)
    return x


def backward(
    p: Problem, outputs: tuple[Tensor], grads: tuple[Tensor], wanted: Collection[str]
) -> dict[str, Tensor]:
    x, u = outputs[0].contiguous(), _solve(p, grads[0])
    q, k, features, lse, mean = (widen(y).contiguous() for y in p[:5])
    shifts = [(y * mean).sum(-1) for y in (x, u)]
    dq, dk, df = torch.empty_like(q), torch.empty_like(k), torch.empty_like(features)
    dlse, total_x, total_u = (torch.empty_like(lse) for _ in range(3))
    heads, n, s = _sizes(p)
    shared = (q, k, features, lse, x, u, *shifts)
    chosen = _options("rows", p)
    rows_kernel[(triton.cdiv(n, chosen["ROWS"]) * heads,)](
        *shared, dq, dlse, total_x, total_u, n, s, p.scale, **chosen
    )
    chosen = _options("keys", p)
    keys_kernel[(triton.cdiv(s, chosen["COLUMNS"]) * heads,)](
        *shared, dk, df, n, s, p.scale, **chosen
    )
    return {
        "q": dq, "k": dk, "features": df, "lse": dlse, "right": u, "ridge": -(u * x).sum(-1),
        "mean": total_x[..., None] * u + total_u[..., None] * x,
    }  # fmt: skip


def _sizes(p: Problem) -> tuple[int, int, int]:
    return p.q.shape[0] * p.q.shape[1], p.q.shape[2], p.k.shape[2]


def _options(kernel: str, p: Problem) -> dict[str, Any]:
    return options(kernel, p.q.shape[3], p.features.shape[3], p.causal)


def options(kernel: str, d: int, f: int, causal: bool = False) -> dict[str, Any]:
    """Shapes, tile and launch options of a kernel for heads of width d and features of width f."""
    width, width_f = tile_width(d), tile_width(f)
    rows, columns, warps, stages = TILES[kernel][max(width, width_f)]
    return {
        "D": d, "F": f, "WIDTH": width, "WIDTH_F": width_f, "ROWS": rows, "COLUMNS": columns,
        "CAUSAL": causal, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip


def compile_cases() -> Iterator[Case]:
    """Yield every kernel for N = S = 4096 and 12 heads, plain and causal, where a solve takes 16 steps. All
    are in float32, because half precision is converted before the launch."""
    n, heads, steps = 4096, 12, 16
    kernels = {"solve": solve_kernel, "rows": rows_kernel, "keys": keys_kernel}
    products = {"solve": 3 * (steps + 1), "rows": 4, "keys": 6}
    for name, d, causal in product(kernels, WIDTHS, (False, True)):
        kernel, share = kernels[name], 0.5 if causal else 1.0
        tensors = sum(arg.endswith("_ptr") for arg in kernel.arg_names)
        yield make_case(
            kernel,
            "fp32",
            options(name, d, d, causal),
            f"covariance_solve {name} fp32 D={d}{' causal' if causal else ''}",
            operations=2.0 * products[name] * heads * n * n * d * share,
            bytes=heads * n * tensors * d * 4.0,
            sizes=("any",),
        )
