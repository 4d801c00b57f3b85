"""Triton kernels of softplus attention: one for the forward pass, with two sweeps over the keys, one for
dq, and one for dk and dv.

Scores are recomputed tile by tile from q and k; every output element is written by one program, so
there are no atomics and two runs agree to the bit. The gradient of each score needs c_i, a mean over its
whole row, which is known only after a sweep. The kernel of dq therefore computes both sums of dq_i = tau
(sum_j h_ij sigma_ij k_j - c_i sum_j sigma_ij k_j) in one sweep, and stores c_i for the kernel of dk and dv.
Products in float32 are computed as three TF32 products, even if the values are in half precision, because a
weight is a score to the power of 15.
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
from xattn.kernels.softplus.reference import FLAT, OPEN, Problem, is_plain
from xattn.kernels.tiles import delta, load_tile, place, store_tile, tile_width

# (kernel, half precision, wider than 64): rows and columns of a tile, warps, stages.
TILES = {
    ("forward", True, False): (64, 32, 8, 2),
    ("forward", True, True): (32, 32, 8, 2),
    ("forward", False, False): (32, 16, 8, 2),
    ("forward", False, True): (32, 16, 8, 2),
    ("dq", True, False): (32, 32, 8, 2),
    ("dq", True, True): (32, 32, 8, 2),
    ("dq", False, False): (32, 16, 8, 2),
    ("dq", False, True): (16, 16, 8, 2),
    ("dkv", True, False): (32, 32, 4, 2),
    ("dkv", True, True): (16, 32, 8, 2),
    ("dkv", False, False): (16, 32, 8, 2),
    ("dkv", False, True): (16, 16, 8, 2),
}

# (kernel, half precision, padded width, causal): the same, where the tiles above spill.
OTHER_TILES = {
    ("forward", True, 16, True): (64, 32, 4, 2),
    ("dkv", False, 16, True): (16, 32, 4, 2),
}


@triton.jit
def _softplus(s):
    """log(1 + exp(s)), exact also where 1 + exp(s) rounds, and exp(-|s|)."""
    z = tl.exp(-tl.abs(s))
    w = 1.0 + z
    rounded = w == 1.0
    rest = tl.log(w) * z / tl.where(rounded, 1.0, w - 1.0)
    return tl.maximum(s, 0.0) + tl.where(rounded, z, rest), z


@triton.jit
def _sigmoid(s, z):
    """1 / (1 + exp(-s)) with z = exp(-|s|)."""
    return tl.where(s >= 0, 1.0, z) / (1.0 + z)


@triton.jit
def _power(r, POWER: tl.constexpr, BITS: tl.constexpr):
    """r^POWER for r >= 0, 0 for r = 0; BITS is the length of POWER."""
    out = tl.where(r > 0, 1.0, 0.0)
    base = r
    for i in tl.static_range(0, BITS):
        if (POWER >> i) % 2 == 1:
            out = out * base
        base = base * base
    return out


@triton.jit
def _rows(rows, S, scale, OFFSET: tl.constexpr, CAUSAL: tl.constexpr, OPEN: tl.constexpr):
    """Factor of the scores, number of keys and offset of each row."""
    count = (rows + 1 if CAUSAL else rows * 0 + S).to(tl.float32)
    offset = tl.where(rows >= OPEN, OFFSET, 0.0) if CAUSAL else count * 0.0 + OFFSET
    return scale * tl.log(count), count, offset


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, stat_ptr, N, S, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, PLAIN: tl.constexpr,
    POWER: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, EPS: tl.constexpr,
    OPEN: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    head, tile = place(tl.cdiv(N, ROWS), CAUSAL)
    rows = tile * ROWS + tl.arange(0, ROWS)
    d, dv = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    q = load_tile(q_ptr + head * N * D, rows, d, N, D)
    tau, count, offset = _rows(rows, S, scale, OFFSET, CAUSAL, OPEN)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.zeros([ROWS], tl.float32)
    power = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH_V], tl.float32)
    # A tile of causal queries reads the keys up to its last query.
    stop = tl.minimum(S, (tile + 1) * ROWS) if CAUSAL else S
    for start in range(0, stop, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k = load_tile(k_ptr + head * S * D, columns, d, S, D)
        s = tl.dot(q, tl.trans(k), input_precision="tf32x3") * tau[:, None]
        a, _ = _softplus(s)
        seen = columns[None, :] < S
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None])
        a = tl.where(seen, a, 0.0)
        total += tl.sum(a, 1)
        top = tl.maximum(top, tl.max(a, 1))
        if PLAIN:
            v = load_tile(v_ptr + head * S * DV, columns, dv, S, DV)
            acc += tl.dot(a.to(v.dtype), v, input_precision="tf32x3")
    mean = offset * (total + EPS) / count
    height = top - mean
    if EPS == 0:
        flat = height <= FLAT * top
        mean = tl.where(flat, 0.0, mean)
        height = tl.where(flat, top, height)
    inverse = tl.where(height > 0, 1.0 / tl.where(height > 0, height, 1.0), 0.0)
    if PLAIN:
        acc = acc * inverse[:, None]
        power = (total + EPS) * inverse
        norm = tl.where(power > 0, 1.0 / tl.where(power > 0, power, 1.0), 0.0)
        damped = power * 0.0
    else:
        for start in range(0, stop, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            k = load_tile(k_ptr + head * S * D, columns, d, S, D)
            v = load_tile(v_ptr + head * S * DV, columns, dv, S, DV)
            s = tl.dot(q, tl.trans(k), input_precision="tf32x3") * tau[:, None]
            a, _ = _softplus(s)
            seen = columns[None, :] < S
            if CAUSAL:
                seen = seen & (columns[None, :] <= rows[:, None])
            r = tl.where(seen, tl.maximum((a - mean[:, None]) * inverse[:, None], 0.0), 0.0)
            t = _power(r, POWER, BITS)
            power += tl.sum(t, 1)
            acc += tl.dot(t.to(v.dtype), v, input_precision="tf32x3")
        floor = EPS * _power(inverse * (total + EPS) / count, POWER, BITS)
        some = (inverse > 0) & (power > 0)
        norm = tl.where(some, 1.0 / tl.where(some, power + floor, 1.0), 0.0)
        damped = POWER * (1.0 - power * norm) / (total + EPS) if EPS > 0 else power * 0.0
    store_tile(o_ptr + head * N * DV, rows, dv, N, DV, acc * norm[:, None])
    base = stat_ptr + head * 4 * N + rows
    tl.store(base, mean, mask=rows < N)
    tl.store(base + N, inverse, mask=rows < N)
    tl.store(base + 2 * N, norm, mask=rows < N)
    tl.store(base + 3 * N, damped, mask=rows < N)


@triton.jit
def dq_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, stat_ptr, inner_ptr, dq_ptr, mean_ptr, N, S, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, PLAIN: tl.constexpr,
    POWER: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, EPS: tl.constexpr,
    OPEN: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    head, tile = place(tl.cdiv(N, ROWS), CAUSAL)
    rows = tile * ROWS + tl.arange(0, ROWS)
    d, dv = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    q = load_tile(q_ptr + head * N * D, rows, d, N, D)
    g = load_tile(g_ptr + head * N * DV, rows, dv, N, DV)
    tau, count, offset = _rows(rows, S, scale, OFFSET, CAUSAL, OPEN)
    base = stat_ptr + head * 4 * N + rows
    mean = tl.load(base, mask=rows < N, other=0.0)
    inverse = tl.load(base + N, mask=rows < N, other=0.0)
    norm = tl.load(base + 2 * N, mask=rows < N, other=0.0)
    damped = tl.load(base + 3 * N, mask=rows < N, other=0.0)
    inner = tl.load(inner_ptr + head * N + rows, mask=rows < N, other=0.0)
    factor = POWER * norm * inverse
    first = tl.zeros([ROWS, WIDTH], tl.float32)
    second = tl.zeros([ROWS, WIDTH], tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    stop = tl.minimum(S, (tile + 1) * ROWS) if CAUSAL else S
    for start in range(0, stop, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k = load_tile(k_ptr + head * S * D, columns, d, S, D)
        v = load_tile(v_ptr + head * S * DV, columns, dv, S, DV)
        s = tl.dot(q, tl.trans(k), input_precision="tf32x3") * tau[:, None]
        a, z = _softplus(s)
        seen = columns[None, :] < S
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None])
        r = tl.maximum((a - mean[:, None]) * inverse[:, None], 0.0)
        less = tl.where(seen, _power(r, POWER - 1, BITS), 0.0)
        e = tl.dot(g, tl.trans(v), input_precision="tf32x3") - inner[:, None]
        h = less * e * factor[:, None]
        slope = tl.where(seen, _sigmoid(s, z), 0.0)
        first += tl.dot(h * slope, k, input_precision="tf32x3")
        if (OFFSET > 0) or (EPS > 0):
            second += tl.dot(slope, k, input_precision="tf32x3")
            sums += tl.sum(h, 1)
    c = tl.where(mean > 0, offset / count, 0.0) * sums + damped * inner
    dq = (first - c[:, None] * second) * tau[:, None]
    store_tile(dq_ptr + head * N * D, rows, d, N, D, dq)
    tl.store(mean_ptr + head * N + rows, c, mask=rows < N)


@triton.jit
def dkv_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, stat_ptr, inner_ptr, mean_ptr, dk_ptr, dv_ptr, N, S, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, PLAIN: tl.constexpr,
    POWER: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, EPS: tl.constexpr,
    OPEN: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    head, tile = place(tl.cdiv(S, COLUMNS))
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    d, w = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    k = load_tile(k_ptr + head * S * D, columns, d, S, D)
    v = load_tile(v_ptr + head * S * DV, columns, w, S, DV)
    dk = tl.zeros([COLUMNS, WIDTH], tl.float32)
    dv = tl.zeros([COLUMNS, WIDTH_V], tl.float32)
    begin = tile * COLUMNS // ROWS * ROWS if CAUSAL else 0
    for start in range(begin, N, ROWS):
        rows = start + tl.arange(0, ROWS)
        q = load_tile(q_ptr + head * N * D, rows, d, N, D)
        g = load_tile(g_ptr + head * N * DV, rows, w, N, DV)
        tau, _, _ = _rows(rows, S, scale, OFFSET, CAUSAL, OPEN)
        base = stat_ptr + head * 4 * N + rows
        # Rows outside have zeros, so they add nothing; keys outside have rows of dk and dv of their own.
        mean = tl.load(base, mask=rows < N, other=0.0)
        inverse = tl.load(base + N, mask=rows < N, other=0.0)
        norm = tl.load(base + 2 * N, mask=rows < N, other=0.0)
        inner = tl.load(inner_ptr + head * N + rows, mask=rows < N, other=0.0)
        c = tl.load(mean_ptr + head * N + rows, mask=rows < N, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="tf32x3") * tau[None, :]
        a, z = _softplus(s)
        r = tl.maximum((a - mean[None, :]) * inverse[None, :], 0.0)
        slope = _sigmoid(s, z)
        if CAUSAL:
            seen = columns[:, None] <= rows[None, :]
            r, slope = tl.where(seen, r, 0.0), tl.where(seen, slope, 0.0)
        less = _power(r, POWER - 1, BITS)
        dv += tl.dot((norm[None, :] * r * less).to(g.dtype), g, input_precision="tf32x3")
        e = tl.dot(v, tl.trans(g), input_precision="tf32x3") - inner[None, :]
        h = less * e * (POWER * norm * inverse)[None, :]
        ds = (h - c[None, :]) * slope * tau[None, :]
        dk += tl.dot(ds, q, input_precision="tf32x3")
    store_tile(dk_ptr + head * S * D, columns, d, S, D, dk)
    store_tile(dv_ptr + head * S * DV, columns, w, S, DV, dv)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    q, k, v = (x.contiguous() for x in (p.q, p.k, p.v))
    o = v.new_empty(*q.shape[:3], v.shape[3])
    statistics = q.new_empty(*q.shape[:2], 4, q.shape[2])
    options = _options("forward", p)
    grid = triton.cdiv(q.shape[2], options["ROWS"]) * q.shape[0] * q.shape[1]
    forward_kernel[(grid,)](q, k, v, o, statistics, q.shape[2], k.shape[2], p.scale, **options)
    return o, statistics


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    o, statistics = outputs
    inner = delta(grads[0], None, o)
    q, k, v, g = (x.contiguous() for x in (p.q, p.k, p.v, grads[0].to(p.v.dtype)))
    dq, dk, dv, c = (torch.empty_like(x) for x in (q, k, v, inner))
    n, s, heads = q.shape[2], k.shape[2], q.shape[0] * q.shape[1]
    shared = (g, q, k, v, statistics, inner)
    options = _options("dq", p)
    grid = (triton.cdiv(n, options["ROWS"]) * heads,)
    dq_kernel[grid](*shared, dq, c, n, s, p.scale, **options)
    options = _options("dkv", p)
    grid = (triton.cdiv(s, options["COLUMNS"]) * heads,)
    dkv_kernel[grid](*shared, c, dk, dv, n, s, p.scale, **options)
    return {"q": dq, "k": dk, "v": dv}


def _options(kernel: str, p: Problem) -> dict[str, Any]:
    half = p.v.dtype != torch.float32
    numbers = (p.power, p.offset, p.eps, is_plain(p))
    return options(kernel, p.q.shape[3], p.v.shape[3], half, p.causal, *numbers)


def options(
    kernel: str,
    d: int,
    dv: int,
    half: bool,
    causal: bool,
    power: int = 15,
    offset: float = 1.0,
    eps: float = 0.0,
    plain: bool = False,
) -> dict[str, Any]:
    """Shapes, tile and launch options of a kernel for heads of width d and dv."""
    width, width_v = tile_width(d), tile_width(dv)
    widest = max(width, width_v)
    tile = TILES[kernel, half, widest > 64]
    rows, columns, warps, stages = OTHER_TILES.get((kernel, half, widest, causal), tile)
    bits = power if kernel == "forward" else power - 1
    return {
        "D": d, "DV": dv, "WIDTH": width, "WIDTH_V": width_v, "ROWS": rows, "COLUMNS": columns,
        "CAUSAL": causal, "PLAIN": plain, "POWER": power, "BITS": bits.bit_length(),
        "OFFSET": offset, "EPS": eps, "OPEN": OPEN, "FLAT": FLAT[torch.float32],
        "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip


def compile_cases() -> Iterator[Case]:
    """Yield every kernel for N = S = 4096, 12 heads and p = 15, plain and causal."""
    n, heads = 4096, 12
    kernels = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}
    products, tensors = {"forward": 3, "dq": 4, "dkv": 4}, {"forward": 4, "dq": 5, "dkv": 6}
    for name, dtype, d, causal in product(kernels, DTYPES, WIDTHS, (False, True)):
        if dtype == "fp16" and causal:
            continue
        half = dtype != "fp32"
        yield make_case(
            kernels[name],
            dtype,
            options(name, d, d, half, causal),
            f"softplus {name} {dtype} D={d}{' causal' if causal else ''}",
            operations=2.0 * products[name] * heads * n * n * d * (0.5 if causal else 1.0),
            bytes=heads * n * tensors[name] * d * 4,
            wide=("q_ptr", "k_ptr", "stat_ptr", "inner_ptr", "mean_ptr", "dq_ptr", "dk_ptr"),
        )
