"""Triton kernels of softmax attention: one for the output and the log-sum-exp and one for dq, both by tiles
of queries, and one for dk and dv, by tiles of keys.

Scores are recomputed tile by tile from q, k and lse; every output element is written by one program,
so there are no atomics and two runs agree to the bit. Exponentials are in base 2. With LISTED, a tile
gathers its queries from the list of its head (:class:`Lists`); other rows are neither read nor written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xattn.kernels.aot import DTYPES, WIDTHS, Case, make_case
from xattn.kernels.softmax.reference import Problem, reduce_to, row_by_row
from xattn.kernels.tiles import (
    DELTA,
    MERGE,
    batch_strides,
    delta,
    delta_kernel,
    load_tile,
    merge_kernel,
    place,
    precision,
    softmax_end,
    softmax_step,
    softmax_weights,
    store_tile,
    tile_width,
)

# (kernel, half precision, wider than 64, bias): rows and columns of a tile, warps, stages. As large as
# possible without spills on sm_80 and sm_90, see compile_cases; not timed on a GPU.
TILES = {
    ("forward", True, False, False): (128, 64, 4, 3),
    ("forward", True, False, True): (64, 64, 8, 2),
    ("forward", True, True, False): (128, 64, 8, 3),
    ("forward", True, True, True): (64, 32, 8, 2),
    ("dq", True, False, False): (64, 64, 4, 2),
    ("dq", True, False, True): (64, 32, 8, 2),
    ("dq", True, True, False): (64, 64, 8, 2),
    ("dq", True, True, True): (64, 32, 8, 2),
    ("dkv", True, False, False): (64, 32, 4, 2),
    ("dkv", True, False, True): (32, 64, 8, 2),
    ("dkv", True, True, False): (64, 32, 4, 2),
    ("dkv", True, True, True): (64, 32, 8, 2),
    ("forward", False, False, False): (32, 32, 8, 2),
    ("forward", False, False, True): (32, 32, 8, 2),
    ("forward", False, True, False): (32, 32, 8, 2),
    ("forward", False, True, True): (16, 64, 8, 2),
    ("dq", False, False, False): (32, 16, 8, 2),
    ("dq", False, False, True): (16, 32, 8, 2),
    ("dq", False, True, False): (16, 64, 8, 2),
    ("dq", False, True, True): (16, 32, 8, 2),
    ("dkv", False, False, False): (16, 32, 8, 2),
    ("dkv", False, False, True): (32, 16, 8, 2),
    ("dkv", False, True, False): (16, 16, 8, 2),
    ("dkv", False, True, True): (32, 16, 8, 2),
}
# The same for a padded width of 64, which may be larger than narrower ones.
TILES_64 = {
    ("dq", False, False): (32, 32, 8, 2),
    ("dkv", False, False): (32, 32, 8, 2),
    ("dkv", False, True): (32, 32, 8, 2),
    ("dkv", True, True): (64, 32, 8, 2),
}


@triton.jit
def _scores(
    q, k, bias, stride, rows, columns, N, S, scale, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr
):
    """Scores (rows, columns) of queries and keys in base 2, not masked."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634)
    if HAS_BIAS:
        inside = (rows[:, None] < N) & (columns[None, :] < S)
        at = bias + rows[:, None].to(tl.int64) * stride + columns[None, :]
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
    return s


@triton.jit
def transposed_scores(
    q, k, bias, stride, rows, columns, N, S, scale, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr
):
    """Return scores (columns, rows), for products that need this order. Transposing the weights instead
    would cost more."""
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * 1.4426950408889634)
    if HAS_BIAS:
        inside = (rows[None, :] < N) & (columns[:, None] < S)
        at = bias + rows[None, :].to(tl.int64) * stride + columns[:, None]
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
    return s


@triton.jit
def _queries(queries_ptr, ends_ptr, head, start, N, ROWS: tl.constexpr, LISTED: tl.constexpr):
    """A tile's queries, from place ``start`` of all or of its head's list; N beyond the last one."""
    rows = start + tl.arange(0, ROWS)
    if LISTED:
        count = tl.load(ends_ptr + head * N + N - 1)
        rows = tl.load(queries_ptr + head * (N + 1) + rows, mask=rows < count, other=N)
    return rows


@triton.jit
def _stops(rows, start, N, S, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
           LISTED: tl.constexpr):  # fmt: skip
    """How many keys a tile of queries reads: first those in complete tiles that all of its queries see,
    then in total. Causal queries read the keys up to the last query; a tile without a query reads none."""
    stop, seen = S, S
    if CAUSAL:
        stop, seen = tl.minimum(S, start + ROWS), start + 1
    if LISTED:
        last = tl.max(tl.where(rows < N, rows + 1, 0), 0)
        stop = tl.minimum(S, last) if CAUSAL else tl.where(last > 0, S, 0)
        seen = tl.min(rows, 0) + 1 if CAUSAL else S
    return tl.minimum(seen, stop) // COLUMNS * COLUMNS, stop


@triton.jit
def _hide(s, rows, columns, S, CAUSAL: tl.constexpr):
    """Scores of an incomplete tile, with -inf for keys that are hidden or outside."""
    seen = columns[None, :] < S
    if CAUSAL:
        seen = seen & (columns[None, :] <= rows[:, None])
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _of_head(pointer, head, H, stride_b, stride_h, UNIT: tl.constexpr):
    """Where a head's matrix begins; strides count units, so that the compiler knows what they are multiples
    of."""
    return pointer + ((head // H) * stride_b + (head % H) * stride_h) * UNIT


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, queries_ptr, ends_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_bb, stride_bh, stride_bn, H, N, S, scale, GROUP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    LISTED: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    head, tile = place(tl.cdiv(N, ROWS), CAUSAL)
    key_head = head // GROUP  # batch * Hk + key head, because H is GROUP * Hk
    rows = _queries(queries_ptr, ends_ptr, head, tile * ROWS, N, ROWS, LISTED)
    d, dv = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    bias = bias_ptr + (head // H) * stride_bb + (head % H) * stride_bh
    q_head = _of_head(q_ptr, head, H, stride_qb, stride_qh, UNIT)
    k_head = _of_head(k_ptr, key_head, H // GROUP, stride_kb, stride_kh, UNIT)
    v_head = _of_head(v_ptr, key_head, H // GROUP, stride_vb, stride_vh, UNIT)
    q = load_tile(q_head, rows, d, N, D, stride_qn * UNIT)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH_V], tl.float32)
    whole, stop = _stops(rows, tile * ROWS, N, S, ROWS, COLUMNS, CAUSAL, LISTED)
    for REST in tl.static_range(2):  # whole tiles need no masks
        for start in range(whole if REST else 0, stop if REST else whole, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            k = load_tile(k_head, columns, d, S, D, stride_kn * UNIT, REST == 0)
            v = load_tile(v_head, columns, dv, S, DV, stride_vn * UNIT, REST == 0)
            s = _scores(q, k, bias, stride_bn, rows, columns, N, S, scale, HAS_BIAS, PRECISION)
            if REST:
                s = _hide(s, rows, columns, S, CAUSAL)
            top, total, acc = softmax_step(s, v, top, total, acc, PRECISION)
    acc, lse = softmax_end(top, total, acc)
    store_tile(o_ptr + head * N * DV, rows, dv, N, DV, acc)
    tl.store(lse_ptr + head * N + rows, lse, mask=rows < N)


@triton.jit
def dq_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, queries_ptr, ends_ptr, lse_ptr, delta_ptr,
    dq_ptr, ds_ptr, stride_gb, stride_gh, stride_gn,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_bb, stride_bh, stride_bn, H, N, S, scale, GROUP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    WRITE: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    head, tile = place(tl.cdiv(N, ROWS), CAUSAL)
    key_head = head // GROUP
    rows = _queries(queries_ptr, ends_ptr, head, tile * ROWS, N, ROWS, LISTED)
    d, dv = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    bias = bias_ptr + (head // H) * stride_bb + (head % H) * stride_bh
    q_head = _of_head(q_ptr, head, H, stride_qb, stride_qh, UNIT)
    g_head = _of_head(g_ptr, head, H, stride_gb, stride_gh, UNIT)
    k_head = _of_head(k_ptr, key_head, H // GROUP, stride_kb, stride_kh, UNIT)
    v_head = _of_head(v_ptr, key_head, H // GROUP, stride_vb, stride_vh, UNIT)
    q = load_tile(q_head, rows, d, N, D, stride_qn * UNIT)
    g = load_tile(g_head, rows, dv, N, DV, stride_gn * UNIT)
    lse = tl.load(lse_ptr + head * N + rows, mask=rows < N, other=float("-inf"))
    delta = tl.load(delta_ptr + head * N + rows, mask=rows < N, other=0.0)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    whole, stop = _stops(rows, tile * ROWS, N, S, ROWS, COLUMNS, CAUSAL, LISTED)
    for REST in tl.static_range(2):
        for start in range(whole if REST else 0, stop if REST else whole, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            k = load_tile(k_head, columns, d, S, D, stride_kn * UNIT, REST == 0)
            v = load_tile(v_head, columns, dv, S, DV, stride_vn * UNIT, REST == 0)
            s = _scores(q, k, bias, stride_bn, rows, columns, N, S, scale, HAS_BIAS, PRECISION)
            if REST:
                s = _hide(s, rows, columns, S, CAUSAL)
            p = softmax_weights(s, lse[:, None])
            ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
            if WRITE:  # the gradient of a bias with a value for every score
                store_tile(ds_ptr + head * N * S, rows, columns, N, S, ds)
    store_tile(dq_ptr + head * N * D, rows, d, N, D, dq * scale)


@triton.jit
def _places(
    ends_ptr, head, key, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """Bounds of the queries, or of their places in the list, that may see ``key`` or later keys: the first
    of them, the first and the end of the complete tiles that see all COLUMNS keys from ``key`` on, and the
    end."""
    first, seen, stop = (key if CAUSAL else key * 0), key * 0, N
    if LISTED:
        stop = tl.load(ends_ptr + head * N + N - 1)
    if CAUSAL:
        seen = tl.minimum(key + COLUMNS - 1, N)
        if LISTED:  # as many queries of the list come before the first key, and before the last
            first = tl.load(ends_ptr + head * N + key - 1, mask=key > 0, other=0)
            seen = tl.load(ends_ptr + head * N + seen - 1)
    first, low = first // ROWS * ROWS, tl.cdiv(seen, ROWS) * ROWS
    return first, low, tl.maximum(low, stop // ROWS * ROWS), stop


@triton.jit
def dkv_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, queries_ptr, ends_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr, db_ptr, stride_gb, stride_gh, stride_gn,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_bb, stride_bh, stride_bn, H, N, S, scale, GROUP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    WRITE: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key head, over the queries of all heads that read it."""
    key_head, tile = place(tl.cdiv(S, COLUMNS))
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    d, w = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    k_head = _of_head(k_ptr, key_head, H // GROUP, stride_kb, stride_kh, UNIT)
    v_head = _of_head(v_ptr, key_head, H // GROUP, stride_vb, stride_vh, UNIT)
    k = load_tile(k_head, columns, d, S, D, stride_kn * UNIT)
    v = load_tile(v_head, columns, w, S, DV, stride_vn * UNIT)
    dk = tl.zeros([COLUMNS, WIDTH], tl.float32)
    dv = tl.zeros([COLUMNS, WIDTH_V], tl.float32)
    for member in range(0, GROUP):
        head = key_head * GROUP + member
        bias = bias_ptr + (head // H) * stride_bb + (head % H) * stride_bh
        q_head = _of_head(q_ptr, head, H, stride_qb, stride_qh, UNIT)
        g_head = _of_head(g_ptr, head, H, stride_gb, stride_gh, UNIT)
        db = tl.zeros([COLUMNS], tl.float32)
        first, low, high, stop = _places(
            ends_ptr, head, tile * COLUMNS, N, ROWS, COLUMNS, CAUSAL, LISTED
        )
        before = (low - first) // ROWS
        for REST in tl.static_range(2):
            count = before + tl.cdiv(stop - high, ROWS) if REST else (high - low) // ROWS
            for i in range(0, count):
                start = low + i * ROWS
                if REST:  # the tiles before the whole ones, and those after them
                    start = tl.where(i < before, first + i * ROWS, high + (i - before) * ROWS)
                rows = _queries(queries_ptr, ends_ptr, head, start, N, ROWS, LISTED)
                q = load_tile(q_head, rows, d, N, D, stride_qn * UNIT, REST == 0)
                g = load_tile(g_head, rows, w, N, DV, stride_gn * UNIT, REST == 0)
                lse = tl.load(lse_ptr + head * N + rows, mask=rows < N, other=float("-inf"))
                delta = tl.load(delta_ptr + head * N + rows, mask=rows < N, other=0.0)
                # Keys outside the matrix need no mask here: each has its own row of dk and dv.
                s = transposed_scores(
                    q, k, bias, stride_bn, rows, columns, N, S, scale, HAS_BIAS, PRECISION
                )
                if CAUSAL and REST:
                    s = tl.where(columns[:, None] <= rows[None, :], s, float("-inf"))
                p = softmax_weights(s, lse[None, :])
                ds = p * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :])
                dv += tl.dot(p.to(g.dtype), g, input_precision=PRECISION)
                dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
                if WRITE:
                    db += tl.sum(ds, 1)
        if WRITE:  # the gradient of a bias per key
            tl.store(db_ptr + head * S + columns, db, mask=columns < S)
    store_tile(dk_ptr + key_head * S * D, columns, d, S, D, dk * scale)
    store_tile(dv_ptr + key_head * S * DV, columns, w, S, DV, dv)


class Lists(NamedTuple):
    """The queries that each head keeps, as int32."""

    queries: Tensor
    """(B, H, N + 1): numbers of the queries in ascending order; what follows them is not read."""
    ends: Tensor
    """(B, H, N): how many of the queries 0 to i are kept."""


def forward(p: Problem, lists: Lists | None = None) -> tuple[Tensor, Tensor]:
    """o and lse; with ``lists``, o = 0 and lse = -inf in all other rows."""
    q, k, v = (row_by_row(x) for x in (p.q, p.k, p.v))
    o = _output(q.new_empty(*q.shape[:3], v.shape[3]), lists, 0.0)
    lse = _output(q.new_empty(q.shape[:3], dtype=torch.float32), lists, -torch.inf)
    bias, strides = bias_and_strides(p)
    unit, own = _units(q, k, v)
    options = {**_options("forward", p, lists), "UNIT": unit}
    grid = (triton.cdiv(q.shape[2], options["ROWS"]) * q.shape[0] * q.shape[1],)
    queries, ends = lists or (q, q)
    forward_kernel[grid](
        q, k, v, bias, queries, ends, o, lse, *own, *strides, *sizes(q, k),
        p.scale, **options,
    )  # fmt: skip
    return o, lse


def _output(x: Tensor, lists: Lists | None, fill: float) -> Tensor:
    """``x``, filled with ``fill`` if some rows are not written."""
    return x if lists is None else x.fill_(fill)


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    wanted: Collection[str],
    lists: Lists | None = None,
) -> dict[str, Tensor]:
    (o, lse), (grad, grad_lse) = outputs, grads
    d, lse = delta(grad, grad_lse, o), lse.contiguous()
    g, q, k, v = (row_by_row(x) for x in (grad.to(p.q.dtype), p.q, p.k, p.v))
    dq = _output(q.new_empty(q.shape), lists, 0.0)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    (batch, heads, n), s = q.shape[:3], k.shape[2]
    bias_grad = p.bias is not None and "bias" in wanted
    per_key = bias_grad and p.bias is not None and p.bias.shape[2] == 1
    full = bias_grad and not per_key
    make = q.new_zeros if p.causal else q.new_empty  # no program visits hidden tiles
    ds = make((batch, heads, n, s) if full else (1,), dtype=torch.float32)
    db = q.new_empty((batch, heads, 1, s) if per_key else (1,), dtype=torch.float32)
    bias, strides = bias_and_strides(p)
    shared = (g, q, k, v, bias, *(lists or (q, q)), lse, d)
    unit, own = _units(g, q, k, v)
    numbers = (*own, *strides, *sizes(q, k), p.scale)
    options = {**_options("dq", p, lists), "UNIT": unit}
    grid = (triton.cdiv(n, options["ROWS"]) * batch * heads,)
    dq_kernel[grid](*shared, dq, ds, *numbers, WRITE=full, **options)
    options = {**_options("dkv", p, lists), "UNIT": unit}
    grid = (triton.cdiv(s, options["COLUMNS"]) * batch * k.shape[1],)
    dkv_kernel[grid](*shared, dk, dv, db, *numbers, WRITE=per_key, **options)
    found = {"q": dq, "k": dk, "v": dv}
    if bias_grad and p.bias is not None:
        found["bias"] = reduce_to(ds if full else db, p.bias)
    return found


def _units(*tensors: Tensor) -> tuple[int, list[int]]:
    """Strides over batch, heads and rows, in units of 8 elements if that divides them all, which tells the
    compiler that it may read 16 bytes at once."""
    strides = [step for x in tensors for step in batch_strides(x, 3)]
    unit = 1 if any(step % 8 for step in strides) else 8
    return unit, [step // unit for step in strides]


def _options(kernel: str, p: Problem, lists: Lists | None) -> dict[str, Any]:
    half, group = p.q.dtype != torch.float32, p.q.shape[1] // p.k.shape[1]
    d, dv = p.q.shape[3], p.v.shape[3]
    found = options(kernel, d, dv, half, p.bias is not None, p.causal, lists is not None)
    return {**found, "GROUP": group}


def options(
    kernel: str,
    d: int,
    dv: int,
    half: bool,
    bias: bool,
    causal: bool = False,
    listed: bool = False,
) -> dict[str, Any]:
    """Shapes, tile and launch options of a kernel for heads of width d and dv."""
    width, width_v = tile_width(d), tile_width(dv)
    widest = max(width, width_v)
    tile = TILES[kernel, half, widest > 64, bias]
    if widest == 64:
        tile = TILES_64.get((kernel, half, bias), tile)
    rows, columns, warps, stages = tile
    return {
        "D": d, "DV": dv, "WIDTH": width, "WIDTH_V": width_v, "ROWS": rows, "COLUMNS": columns,
        "GROUP": 1, "HAS_BIAS": bias, "CAUSAL": causal,
        "LISTED": listed, "PRECISION": precision(), "UNIT": 8,
        "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip


def sizes(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    return q.shape[1], q.shape[2], k.shape[2]


def bias_and_strides(p: Any) -> tuple[Tensor, tuple[int, ...]]:
    """The bias with contiguous keys, and its strides over batch, heads and queries; a missing bias, which
    kernels do not read, is replaced by part of ``q``."""
    bias = p.q[:1, :1, :1] if p.bias is None else row_by_row(p.bias)
    return bias, batch_strides(bias, 3)


def compile_cases(listed: bool = False) -> Iterator[Case]:
    """Yield every kernel for N = S = 4096 and 12 heads, plain and causal, each with and without a bias for
    every score. If ``listed``, yield the kernels for lists of half of the queries, plain and causal."""
    n, heads = 4096, 12
    kernels = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}
    products, tensors = {"forward": 2, "dq": 3, "dkv": 4}, {"forward": 4, "dq": 5, "dkv": 6}
    queries = {"forward": 2, "dq": 3, "dkv": 2}
    kinds = product((False,) if listed else (False, True), (False, True))
    for name, dtype, d, (bias, causal) in product(kernels, DTYPES, WIDTHS, kinds):
        if dtype == "fp16" and not (causal and (bias or listed)):
            continue
        size = 4 if dtype == "fp32" else 2
        share = (0.5 if causal else 1.0) * (0.5 if listed else 1.0)
        rows = tensors[name] - listed * queries[name] / 2
        scores = bias * (size + 4 * (name == "dq"))  # dq also writes the gradient of the bias
        flags = {} if name == "forward" else {"WRITE": bias}
        yield make_case(
            kernels[name],
            dtype,
            {**options(name, d, d, dtype != "fp32", bias, causal, listed), **flags},
            f"{'ragged_queries' if listed else 'softmax'} {name} {dtype} D={d}"
            f"{' bias' if bias else ''}{' causal' if causal else ''}",
            operations=2.0 * products[name] * heads * n * n * d * share,
            bytes=heads * n * (rows * d * size + n * scores * share),
            wide=("lse_ptr", "delta_ptr", "ds_ptr", "db_ptr"),
            integers=("queries_ptr", "ends_ptr"),
        )
    for (dtype, size), d in product((("bf16", 2), ("fp32", 4)), () if listed else WIDTHS):
        yield make_case(
            delta_kernel, dtype, {**DELTA, "HAS_MINUS": True}, f"softmax delta {dtype} D={d}",
            2.0 * heads * n * d, heads * n * (2.0 * d * size + 8), wide=("minus_ptr", "delta_ptr"),
        )  # fmt: skip
        yield make_case(
            merge_kernel, dtype, MERGE, f"softmax merge {dtype} D={d}",
            3.0 * heads * n * d, heads * n * (3.0 * d * size + 12), wide=("lse_ptr", "own_lse_ptr"),
        )  # fmt: skip
