"""Triton kernels of softmax attention: forward with log-sum-exp, dq by query tiles, dk and dv by key tiles.

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
from xattn.kernels.softmax.reference import Problem, delta, reduce_to
from xattn.kernels.tiles import (
    load_tile,
    padded,
    softmax_end,
    softmax_step,
    softmax_weights,
    store_tile,
)

# (kernel, half precision, wider than 64, bias): rows and columns of a tile, warps, stages. As large as
# possible without spills on sm_80 and sm_90, see compile_cases; not timed on a GPU.
TILES = {
    ("forward", True, False, False): (128, 64, 4, 3),
    ("forward", True, False, True): (64, 32, 4, 2),
    ("forward", True, True, False): (128, 64, 8, 3),
    ("forward", True, True, True): (64, 32, 4, 2),
    ("dq", True, False, False): (64, 64, 4, 2),
    ("dq", True, False, True): (64, 32, 4, 2),
    ("dq", True, True, False): (64, 64, 8, 2),
    ("dq", True, True, True): (64, 64, 8, 2),
    ("dkv", True, False, False): (64, 64, 4, 2),
    ("dkv", True, False, True): (32, 64, 8, 2),
    ("dkv", True, True, False): (64, 64, 8, 2),
    ("dkv", True, True, True): (32, 64, 8, 2),
    ("forward", False, False, False): (64, 32, 8, 2),
    ("forward", False, False, True): (64, 32, 8, 2),
    ("forward", False, True, False): (32, 32, 8, 2),
    ("forward", False, True, True): (32, 32, 8, 2),
    ("dq", False, False, False): (32, 32, 8, 2),
    ("dq", False, False, True): (32, 32, 8, 2),
    ("dq", False, True, False): (32, 32, 8, 2),
    ("dq", False, True, True): (32, 32, 8, 2),
    ("dkv", False, False, False): (32, 32, 8, 2),
    ("dkv", False, False, True): (32, 32, 8, 2),
    ("dkv", False, True, False): (32, 16, 8, 2),
    ("dkv", False, True, True): (32, 16, 8, 2),
}
# (kernel, half precision, padded width, bias, causal): the same, where that one spills.
OTHER_TILES = {
    ("forward", True, 16, False, False): (64, 64, 4, 2),
    ("forward", True, 128, True, True): (64, 64, 8, 2),
    ("dq", True, 128, True, True): (64, 32, 8, 2),
    ("dkv", True, 64, False, False): (64, 64, 8, 2),
    ("forward", False, 16, True, True): (32, 32, 8, 2),
    ("forward", False, 64, True, False): (32, 32, 8, 2),
    ("forward", False, 64, True, True): (32, 32, 8, 2),
    ("forward", False, 128, False, False): (32, 16, 8, 2),
    ("forward", False, 128, False, True): (32, 16, 8, 2),
    ("forward", False, 128, True, True): (32, 16, 8, 2),
    ("dq", False, 32, True, True): (32, 32, 4, 2),
    ("dq", False, 64, True, False): (32, 32, 4, 2),
    ("dq", False, 128, False, False): (32, 16, 8, 2),
    ("dq", False, 128, False, True): (32, 16, 8, 2),
    ("dkv", False, 128, True, False): (16, 32, 8, 2),
    ("dkv", False, 128, True, True): (16, 32, 8, 2),
}
# (kernel, half precision, padded width): the same for lists of queries, causal or not.
LISTED_TILES = {
    ("forward", True, 64): (128, 64, 8, 3),
    ("dkv", True, 64): (64, 64, 8, 2),
    ("dq", False, 128): (16, 16, 8, 2),
    ("forward", False, 16): (32, 32, 8, 2),
    ("forward", False, 32): (32, 32, 8, 2),
    ("forward", False, 64): (32, 32, 8, 2),
    ("forward", False, 128): (16, 32, 8, 2),
}


@triton.jit
def _scores(q, k, bias, stride, rows, columns, N, S, scale, HAS_BIAS: tl.constexpr):
    """Scores (rows, columns) of queries and keys in base 2, not masked."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
    if HAS_BIAS:
        inside = (rows[:, None] < N) & (columns[None, :] < S)
        at = bias + rows[:, None].to(tl.int64) * stride + columns[None, :]
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
    return s


@triton.jit
def transposed_scores(q, k, bias, stride, rows, columns, N, S, scale, HAS_BIAS: tl.constexpr):
    """Scores (columns, rows), for products that need them so: transposing the weights costs more."""
    s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * 1.4426950408889634)
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
def _stop(rows, start, N, S, ROWS: tl.constexpr, CAUSAL: tl.constexpr, LISTED: tl.constexpr):
    """How many keys a tile of queries reads: causal ones up to its last query, none without a query."""
    stop = tl.minimum(S, start + ROWS) if CAUSAL else S
    if LISTED:
        last = tl.max(tl.where(rows < N, rows + 1, 0), 0)
        stop = tl.minimum(S, last) if CAUSAL else tl.where(last > 0, S, 0)
    return stop


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, queries_ptr, ends_ptr, o_ptr, lse_ptr,
    stride_bb, stride_bh, stride_bn, H, N, S, scale, GROUP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    key_head = head // GROUP  # batch * Hk + key head, because H is GROUP * Hk
    start_row = tl.program_id(0) * ROWS
    rows = _queries(queries_ptr, ends_ptr, head, start_row, N, ROWS, LISTED)
    d, dv = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    bias = bias_ptr + (head // H) * stride_bb + (head % H) * stride_bh
    q = load_tile(q_ptr + head * N * D, rows, d, N, D)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH_V], tl.float32)
    for start in range(0, _stop(rows, start_row, N, S, ROWS, CAUSAL, LISTED), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k = load_tile(k_ptr + key_head * S * D, columns, d, S, D)
        v = load_tile(v_ptr + key_head * S * DV, columns, dv, S, DV)
        s = _scores(q, k, bias, stride_bn, rows, columns, N, S, scale, HAS_BIAS)
        seen = columns[None, :] < S
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None])
        s = tl.where(seen, s, float("-inf"))
        top, total, acc = softmax_step(s, v, top, total, acc)
    acc, lse = softmax_end(top, total, acc)
    store_tile(o_ptr + head * N * DV, rows, dv, N, DV, acc)
    tl.store(lse_ptr + head * N + rows, lse, mask=rows < N)


@triton.jit
def dq_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, queries_ptr, ends_ptr, lse_ptr, delta_ptr,
    dq_ptr, ds_ptr,
    stride_bb, stride_bh, stride_bn, H, N, S, scale, GROUP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    WRITE: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    key_head = head // GROUP
    start_row = tl.program_id(0) * ROWS
    rows = _queries(queries_ptr, ends_ptr, head, start_row, N, ROWS, LISTED)
    d, dv = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    bias = bias_ptr + (head // H) * stride_bb + (head % H) * stride_bh
    q = load_tile(q_ptr + head * N * D, rows, d, N, D)
    g = load_tile(g_ptr + head * N * DV, rows, dv, N, DV)
    lse = tl.load(lse_ptr + head * N + rows, mask=rows < N, other=float("-inf"))
    delta = tl.load(delta_ptr + head * N + rows, mask=rows < N, other=0.0)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, _stop(rows, start_row, N, S, ROWS, CAUSAL, LISTED), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k = load_tile(k_ptr + key_head * S * D, columns, d, S, D)
        v = load_tile(v_ptr + key_head * S * DV, columns, dv, S, DV)
        s = _scores(q, k, bias, stride_bn, rows, columns, N, S, scale, HAS_BIAS)
        seen = columns[None, :] < S
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None])
        p = softmax_weights(tl.where(seen, s, float("-inf")), lse[:, None])
        ds = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
        if WRITE:  # the gradient of a bias with a value for every score
            store_tile(ds_ptr + head * N * S, rows, columns, N, S, ds)
    store_tile(dq_ptr + head * N * D, rows, d, N, D, dq * scale)


@triton.jit
def _places(ends_ptr, head, key, N, ROWS: tl.constexpr, CAUSAL: tl.constexpr, LISTED: tl.constexpr):
    """First and end of the queries, or of their places in the list, that may see ``key`` or later ones."""
    first, stop = key if CAUSAL else key * 0, N
    if LISTED:
        stop = tl.load(ends_ptr + head * N + N - 1)
        if CAUSAL:  # as many queries of the list come before the key
            first = tl.load(ends_ptr + head * N + key - 1, mask=key > 0, other=0)
    return first // ROWS * ROWS, stop


@triton.jit
def dkv_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, queries_ptr, ends_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr, db_ptr,
    stride_bb, stride_bh, stride_bn, H, N, S, scale, GROUP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    WRITE: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key head, over the queries of all heads that read it."""
    key_head = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    d, w = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    k = load_tile(k_ptr + key_head * S * D, columns, d, S, D)
    v = load_tile(v_ptr + key_head * S * DV, columns, w, S, DV)
    dk = tl.zeros([COLUMNS, WIDTH], tl.float32)
    dv = tl.zeros([COLUMNS, WIDTH_V], tl.float32)
    begin = tl.program_id(0) * COLUMNS
    for member in range(0, GROUP):
        head = key_head * GROUP + member
        bias = bias_ptr + (head // H) * stride_bb + (head % H) * stride_bh
        db = tl.zeros([COLUMNS], tl.float32)
        first, stop = _places(ends_ptr, head, begin, N, ROWS, CAUSAL, LISTED)
        for start in range(first, stop, ROWS):
            rows = _queries(queries_ptr, ends_ptr, head, start, N, ROWS, LISTED)
            q = load_tile(q_ptr + head * N * D, rows, d, N, D)
            g = load_tile(g_ptr + head * N * DV, rows, w, N, DV)
            lse = tl.load(lse_ptr + head * N + rows, mask=rows < N, other=float("-inf"))
            delta = tl.load(delta_ptr + head * N + rows, mask=rows < N, other=0.0)
            # Keys outside the matrix need no mask here: each has its own row of dk and dv.
            s = transposed_scores(q, k, bias, stride_bn, rows, columns, N, S, scale, HAS_BIAS)
            if CAUSAL:
                s = tl.where(columns[:, None] <= rows[None, :], s, float("-inf"))
            p = softmax_weights(s, lse[None, :])
            ds = p * (tl.dot(v, tl.trans(g), input_precision="ieee") - delta[None, :])
            dv += tl.dot(p.to(g.dtype), g, input_precision="ieee")
            dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
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
    q, k, v = (x.contiguous() for x in (p.q, p.k, p.v))
    o = _output(q.new_empty(*q.shape[:3], v.shape[3]), lists, 0.0)
    lse = _output(q.new_empty(q.shape[:3], dtype=torch.float32), lists, -torch.inf)
    bias, strides = with_strides(p.bias, q, k)
    options = _options("forward", p, lists)
    grid = (triton.cdiv(q.shape[2], options["ROWS"]), q.shape[0] * q.shape[1])
    queries, ends = lists or (q, q)
    forward_kernel[grid](
        q, k, v, q if bias is None else bias, queries, ends, o, lse, *strides, *sizes(q, k), p.scale,
        **options,
    )  # fmt: skip
    return o, lse


def _output(x: Tensor, lists: Lists | None, fill: float) -> Tensor:
    """``x``, with ``fill`` in it where some rows are not written."""
    return x if lists is None else x.fill_(fill)


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    wanted: Collection[str],
    lists: Lists | None = None,
) -> dict[str, Tensor]:
    (o, lse), (grad, grad_lse) = outputs, grads
    d = delta(grad, grad_lse, o).contiguous()
    g, q, k, v, lse = (x.contiguous() for x in (grad.to(p.q.dtype), p.q, p.k, p.v, lse))
    dq = _output(torch.empty_like(q), lists, 0.0)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    (batch, heads, n), s = q.shape[:3], k.shape[2]
    bias_grad = p.bias is not None and "bias" in wanted
    per_key = bias_grad and p.bias is not None and p.bias.shape[2] == 1
    full = bias_grad and not per_key
    make = q.new_zeros if p.causal else q.new_empty  # no program visits tiles that are hidden
    ds = make((batch, heads, n, s) if full else (1,), dtype=torch.float32)
    db = q.new_empty((batch, heads, 1, s) if per_key else (1,), dtype=torch.float32)
    b, strides = with_strides(p.bias, q, k)
    shared = (g, q, k, v, q if b is None else b, *(lists or (q, q)), lse, d)
    numbers = (*strides, *sizes(q, k), p.scale)
    options = _options("dq", p, lists)
    dq_kernel[triton.cdiv(n, options["ROWS"]), batch * heads](
        *shared, dq, ds, *numbers, WRITE=full, **options
    )
    options = _options("dkv", p, lists)
    dkv_kernel[triton.cdiv(s, options["COLUMNS"]), batch * k.shape[1]](
        *shared, dk, dv, db, *numbers, WRITE=per_key, **options
    )
    found = {"q": dq, "k": dk, "v": dv}
    if bias_grad and p.bias is not None:
        found["bias"] = reduce_to(ds if full else db, p.bias)
    return found


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
    width, width_v = padded(d), padded(dv)
    widest = max(width, width_v)
    tile = TILES[kernel, half, widest > 64, bias]
    tile = OTHER_TILES.get((kernel, half, min(widest, 128), bias, causal), tile)
    if listed:
        tile = LISTED_TILES.get((kernel, half, min(widest, 128)), tile)
    rows, columns, warps, stages = tile
    if widest > 128:  # the tile would need more shared memory than there is
        rows, columns, stages = max(16, rows // 2), max(16, columns // 2), 2
    return {
        "D": d, "DV": dv, "WIDTH": width, "WIDTH_V": width_v, "ROWS": rows, "COLUMNS": columns,
        "GROUP": 1, "HAS_BIAS": bias, "CAUSAL": causal,
        "LISTED": listed,
        "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip


def sizes(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    return q.shape[1], q.shape[2], k.shape[2]


def with_strides(
    bias: Tensor | None, q: Tensor, k: Tensor
) -> tuple[Tensor | None, tuple[int, ...]]:
    """The bias with keys side by side, and its strides over batch, heads and queries."""
    if bias is None:
        return None, (0, 0, 0)
    bias = bias if bias.stride(-1) == 1 else bias.contiguous()
    return bias, bias.expand(*q.shape[:3], k.shape[2]).stride()[:3]


def compile_cases() -> Iterator[Case]:
    """Every kernel at N = S = 4096 with 12 heads: plain, with a bias for every score, and causal."""
    n, heads = 4096, 12
    kernels = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}
    products, tensors = {"forward": 2, "dq": 3, "dkv": 4}, {"forward": 4, "dq": 5, "dkv": 6}
    kinds = ((False, False), (True, False), (False, True), (True, True))
    for name, dtype, d, (bias, causal) in product(kernels, DTYPES, WIDTHS, kinds):
        if dtype == "fp16" and not (bias and causal):
            continue
        size = 4 if dtype == "fp32" else 2
        share = 0.5 if causal else 1.0
        scores = bias * (size + 4 * (name == "dq"))  # dq also writes the gradient of the bias
        flags = {} if name == "forward" else {"WRITE": bias}
        yield make_case(
            kernels[name],
            dtype,
            {**options(name, d, d, dtype != "fp32", bias, causal), **flags},
            f"softmax {name} {dtype} D={d}{' bias' if bias else ''}{' causal' if causal else ''}",
            operations=2.0 * products[name] * heads * n * n * d * share,
            bytes=heads * n * (tensors[name] * d * size + n * scores * share),
            wide=("lse_ptr", "delta_ptr", "ds_ptr", "db_ptr"),
            integers=("queries_ptr", "ends_ptr"),
        )
