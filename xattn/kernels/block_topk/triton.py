"""Triton kernel of block selection, which computes scores tile by tile and keeps a list of the best blocks
of each query block.

A program handles some query blocks of one parent (or of all, without a parent list) and one key head.
Each tile of candidates is scored, reduced and pooled in registers; rounds of arg-max then move every
candidate that beats the worst entry into the lists. The sum of the scores of several queries is the score
of the sum of these queries, which is computed beforehand, so only "max" and softmax visit every query. For
softmax, a first pass computes the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from xattn.kernels.aot import DTYPES, WIDTHS, Case, make_case
from xattn.kernels.block_topk.cpu import sum_queries
from xattn.kernels.block_topk.reference import LARGE, Problem
from xattn.kernels.tiles import batch_strides, place, precision, tile_width

BEYOND = tl.constexpr(2**30)  # above every candidate's number
LOG2_E = 1.4426950408889634
MOST = tl.constexpr(LARGE * LOG2_E)


@triton.jit
def _products(
    q_ptr, k_ptr, rows, candidates, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale q_i . k_c for some rows and candidates; an index of -1 gives zeros."""
    d = tl.arange(0, WIDTH)[None, :]
    at = rows[:, None].to(tl.int64) * D + d
    q = tl.load(q_ptr + at, mask=(rows[:, None] >= 0) & (d < D), other=0.0)
    at = candidates[:, None].to(tl.int64) * D + d
    k = tl.load(k_ptr + at, mask=(candidates[:, None] >= 0) & (d < D), other=0.0)
    return tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * scale


@triton.jit
def lse_kernel(
    q_ptr, k_ptr, visible_ptr, lse_ptr, N, C, scale,
    GROUP: tl.constexpr, Q_BLOCK: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_VISIBLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of each query over the candidates that it may see, in base 2."""
    line, tile = place((N + ROWS - 1) // ROWS)
    row = tile * ROWS + tl.arange(0, ROWS)
    rows = tl.where(row < N, row, -1)
    limit = tl.full([ROWS], 0, tl.int32) + C
    if HAS_VISIBLE:
        limit = tl.load(visible_ptr + row // Q_BLOCK, mask=row < N, other=0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    keys = k_ptr + line // GROUP * C * D
    for start in range(0, tl.minimum(C, tl.max(limit, 0)), COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        near = tl.where(c < C, c, -1)
        t = _products(q_ptr + line * N * D, keys, rows, near, scale, D, WIDTH, PRECISION)
        t = tl.where((c < C)[None, :] & (c[None, :] < limit[:, None]), t, float("-inf"))
        t *= 1.4426950408889634
        new = tl.maximum(top, tl.max(t, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(t - safe[:, None]), 1)
        top = new
    # A query that sees nothing gets weights exp2(t - inf) = 0.
    some = total > 0
    lse = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("inf"))
    tl.store(lse_ptr + line * N + row, lse, mask=row < N)


@triton.jit
def _reduced(
    q_ptr, k_ptr, lse_ptr, first, block, candidates, N, scale,
    GROUP: tl.constexpr, Q_BLOCK: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, REDUCE: tl.constexpr, SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(1, COLUMNS) scores of one query block, reduced over its queries and the heads of the group."""
    start = -float("inf") if REDUCE == "max" else 0.0
    out = tl.full([COLUMNS], start, tl.float32)
    for tile in range(0, GROUP * Q_BLOCK, ROWS):
        lane = tile + tl.arange(0, ROWS)
        token = block * Q_BLOCK + lane % Q_BLOCK
        real = (lane < GROUP * Q_BLOCK) & (token < N)
        rows = tl.where(real, (lane // Q_BLOCK) * N + token, -1)
        t = _products(q_ptr + first * N * D, k_ptr, rows, candidates, scale, D, WIDTH, PRECISION)
        if SOFTMAX:
            lse = tl.load(lse_ptr + first * N + rows, mask=real, other=0.0)
            t = tl.exp2(tl.minimum(t * 1.4426950408889634 - lse[:, None], MOST))
        if REDUCE == "max":
            out = tl.maximum(out, tl.max(tl.where(real[:, None], t, float("-inf")), 0))
        else:
            out += tl.sum(tl.where(real[:, None], t, 0.0), 0)
    if REDUCE == "mean":
        members = tl.maximum(tl.minimum(Q_BLOCK, N - block * Q_BLOCK), 1)
        out /= (GROUP * members).to(tl.float32)
    return out[None, :]


@triton.jit
def _insert(t, c, values, numbers):
    """Move scores ``t`` of candidates ``c`` into the lists while they beat the worst entry."""
    more = 1
    while more > 0:
        high = tl.max(t, 1)
        number = tl.min(tl.where(t == high[:, None], c, BEYOND), 1)
        low = tl.min(values, 1)
        worst = tl.max(tl.where(values == low[:, None], numbers, -1), 1)
        better = (high > low) | ((high == low) & (number < worst))
        better = better & (high > float("-inf"))
        out = better[:, None] & (values == low[:, None]) & (numbers == worst[:, None])
        values = tl.where(out, high[:, None], values)
        numbers = tl.where(out, number[:, None], numbers)
        t = tl.where(c == number[:, None], float("-inf"), t)
        more = tl.max(better.to(tl.int32), 0)
    return values, numbers


@triton.jit
def topk_kernel(
    q_ptr, k_ptr, lse_ptr, forced_ptr, within_ptr, visible_ptr, table_ptr, weight_ptr,
    index_ptr, scores_ptr,
    stride_fb, stride_fh, stride_wb, stride_wh, H, N, C, M, R, RATIO, CHILDREN, L, F, K, scale,
    GROUP: tl.constexpr, Q_BLOCK: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LISTS: tl.constexpr, SLOTS: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, POOLING: tl.constexpr,
    REDUCE: tl.constexpr, SOFTMAX: tl.constexpr, HAS_FORCED: tl.constexpr,
    HAS_WITHIN: tl.constexpr, HAS_VISIBLE: tl.constexpr, HAS_TABLE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For ``LISTS`` of the R query blocks, choose K of M blocks, whose scores are pooled from C candidates.

    With REDUCE "none", q has one row per query block; otherwise LISTS is 1.
    """
    heads, per_parent = H // GROUP, (RATIO + LISTS - 1) // LISTS
    line, tile = place((R + RATIO - 1) // RATIO * per_parent)
    batch, head = line // heads, line % heads
    parent = tile // per_parent
    inner = (tile % per_parent) * LISTS + tl.arange(0, LISTS)
    block = parent * RATIO + inner
    real = (inner < RATIO) & (block < R)
    rows = tl.where(real, block, -1)
    only = parent * RATIO + tile % per_parent  # the query block if LISTS is 1
    slot = tl.arange(0, SLOTS)[None, :] + tl.zeros([LISTS, SLOTS], tl.int32)
    # Padding slots (beyond K) never rank last, empty slots always do.
    values = tl.where(slot < K, float("-inf"), float("inf"))
    numbers = tl.where(slot < K, BEYOND + slot, -1)
    forced = forced_ptr + batch * stride_fb + head * stride_fh + block.to(tl.int64) * F
    if HAS_FORCED:
        for f in range(0, F):
            c = tl.load(forced + f, mask=real, other=-1)[:, None]
            known = tl.max((numbers == c).to(tl.int32), 1)[:, None]
            t = tl.where((c >= 0) & (known == 0), float("inf"), float("-inf"))
            values, numbers = _insert(t, c, values, numbers)
    limit = tl.full([LISTS], 0, tl.int32) + C
    if HAS_VISIBLE:
        limit = tl.load(visible_ptr + block, mask=real, other=0)
    far = tl.max(limit, 0)
    keys = k_ptr + line * C * D
    count = M
    if HAS_WITHIN:
        count = L * CHILDREN
    for start in range(0, count, COLUMNS):
        lane = start + tl.arange(0, COLUMNS)
        if HAS_WITHIN:
            listed = within_ptr + batch * stride_wb + head * stride_wh + parent.to(tl.int64) * L
            p = tl.load(listed + lane // CHILDREN, mask=lane < count, other=-1)
            number = tl.where(p >= 0, p * CHILDREN + lane % CHILDREN, M)
        else:
            number = lane
        number = tl.where(number < M, number, -1)
        total = tl.full([LISTS, COLUMNS], float("-inf") if POOLING == "max" else 0.0, tl.float32)
        pooled = tl.zeros([LISTS, COLUMNS], tl.float32)
        for j in range(0, KERNEL):
            c = number * STRIDE - PADDING + j
            if HAS_TABLE:
                c = tl.load(table_ptr + number * KERNEL + j, mask=number >= 0, other=-1)
            c = tl.where((number >= 0) & (c >= 0) & (c < C), c, -1)
            if tl.max(((c >= 0) & (c < far)).to(tl.int32), 0) > 0:
                if REDUCE == "none":
                    near = _products(
                        q_ptr + line * R * D, keys, rows, c, scale, D, WIDTH, PRECISION
                    )
                else:
                    first = batch * H + head * GROUP
                    near = _reduced(
                        q_ptr, keys, lse_ptr, first, only, c, N, scale,
                        GROUP, Q_BLOCK, D, WIDTH, ROWS, COLUMNS, REDUCE, SOFTMAX, PRECISION,
                    )  # fmt: skip
                if HAS_WEIGHT:
                    at = weight_ptr + number * KERNEL + j
                    near *= tl.load(at, mask=number >= 0, other=0.0)[None, :]
                seen = (c[None, :] >= 0) & (c[None, :] < limit[:, None])
                pooled += seen.to(tl.float32)
                if POOLING == "max":
                    total = tl.maximum(total, tl.where(seen, near, float("-inf")))
                else:
                    total += tl.where(seen, near, 0.0)
        if POOLING == "mean":
            total /= tl.maximum(pooled, 1.0)
        t = tl.where((pooled > 0) & real[:, None], total, float("-inf"))
        if HAS_FORCED:
            for f in range(0, F):
                c = tl.load(forced + f, mask=real, other=-1)
                t = tl.where(number[None, :] == c[:, None], float("-inf"), t)
        c = number[None, :] + tl.zeros([LISTS, COLUMNS], tl.int32)
        values, numbers = _insert(t, c, values, numbers)
    values = tl.where(slot < K, values, float("-inf"))
    at = (line * R + block) * K
    for j in range(0, K):
        high = tl.max(values, 1)
        found = high > float("-inf")
        number = tl.min(tl.where(values == high[:, None], numbers, BEYOND), 1)
        tl.store(index_ptr + at + j, tl.where(found, number, -1), mask=real)
        tl.store(scores_ptr + at + j, high, mask=real)
        values = tl.where(numbers == number[:, None], float("-inf"), values)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    q, k, rows, c, m = p.q, p.k, p.query_blocks, p.k.shape[2], p.candidates
    n, heads, group = q.shape[2], q.shape[1], q.shape[1] // k.shape[1]
    members = None
    if p.linear and (p.q_block > 1 or group > 1):
        q, members = sum_queries(q.float(), k.shape[1], p.q_block)
        k = k.float()
    q, k = q.contiguous(), k.contiguous()
    index = q.new_empty((*k.shape[:2], rows, min(p.s, m)), dtype=torch.int32)
    values = q.new_empty(index.shape, dtype=torch.float32)
    tile = _tile(q, min(p.s, m), p.linear)
    shapes = _shapes(group, p.q_block, q) | tile
    lse = q.new_empty((q.shape[:3] if p.softmax else (1,)), dtype=torch.float32)
    weight = None if p.weight is None else p.weight.float()
    given = p.forced, p.within, p.visible, p.table, weight
    lists = [None if x is None else x.contiguous() for x in given]
    passed = [q[:1, :1] if x is None else x for x in lists]  # q stands in for a missing one
    if p.lse is not None:
        lse = torch.where(p.lse.isneginf(), 0.0, p.lse * LOG2_E).float().contiguous()
    elif p.softmax:
        options = _lse_options(shapes, q)
        lse_kernel[(triton.cdiv(n, options["ROWS"]) * q.shape[0] * heads,)](
            q, k, passed[2], lse, n, c, p.scale, HAS_VISIBLE=p.visible is not None, **options
        )
    ratio = rows if p.within is None else -(-rows // p.within.shape[2])
    tiles = -(-rows // ratio) * triton.cdiv(ratio, tile["LISTS"])
    topk_kernel[(tiles * k.shape[0] * k.shape[1],)](
        q, k, lse, *passed, index, values, *batch_strides(passed[0]), *batch_strides(passed[1]),
        heads, n, c, m, rows, ratio, p.children, 1 if p.within is None else p.within.shape[3],
        1 if p.forced is None else p.forced.shape[3], index.shape[3], p.scale,
        **shapes, **_options(p),
    )  # fmt: skip
    if p.reduce == "mean" and members is not None:
        values = values / members
    missing = (0, p.s - index.shape[3])
    if not missing[1]:
        return index, values
    return F.pad(index, missing, value=-1), F.pad(values, missing, value=-torch.inf)


def compile_cases() -> Iterator[Case]:
    """Yield the kernels that select the best 16 of 256 blocks for 256 query blocks: by sums, with and
    without parent lists, and by softmax with all options."""
    n, integers = 16384, ("forced_ptr", "within_ptr", "visible_ptr", "table_ptr", "index_ptr")
    for (name, dtype), width, linear in product(DTYPES.items(), WIDTHS, (True, False)):
        if name == "fp16" and linear:
            continue
        blocks, size = 256 if linear else n // 16, dtype.itemsize
        q = torch.empty(1, 1, blocks if linear else n, width, dtype=dtype, device="meta")
        options = _shapes(1, 64, q) | _tile(q, 16, linear)
        lists = None if linear else q  # stands for each of them
        table = None if linear else q.new_empty(256, 5)
        pooling = "max" if linear else "sum"
        spread = [1, 1, 0]
        p = Problem(
            q, q, lists, lists, lists, table, table, None, 16, 64, "sum", not linear, spread, pooling,
            1, 1.0, "triton",
        )  # fmt: skip
        kind, work = "topk", 2.0 * 256 * blocks * width
        if not linear:
            kind, work = "topk-softmax", 2.0 * 5 * n * 256 * width
            yield make_case(
                lse_kernel, name, _lse_options(options, q) | {"HAS_VISIBLE": True},
                f"block_topk lse {name} D={width}",
                2.0 * n * blocks * width, float(size * width * (n + blocks)), wide=("lse_ptr",),
                integers=integers,
            )  # fmt: skip
        searched = {"": p} if not linear else {"": p, "-within": p._replace(within=q)}
        for searches, problem in searched.items():
            yield make_case(
                topk_kernel, name, options | _options(problem),
                f"block_topk {kind}{searches} {name} D={width}",
                work, float(size * width * (q.shape[2] + blocks)),
                wide=("lse_ptr", "weight_ptr", "scores_ptr"), integers=integers,
            )  # fmt: skip


def _lse_options(options: dict[str, int], q: Tensor) -> dict[str, int]:
    """The launch options of the first pass, whose tiles hold more queries in half precision."""
    rows = options["ROWS"] if q.dtype == torch.float32 else 64
    return {name: options[name] for name in _LSE} | {"ROWS": rows}


_LSE = ("GROUP", "Q_BLOCK", "D", "WIDTH", "ROWS", "COLUMNS", "PRECISION", "num_warps", "num_stages")


# (single precision, padded width, linear): columns and warps, where the usual ones spill.
_OTHER_TILES = {
    (False, 16, False): (32, 4), (False, 128, False): (64, 8), (True, 32, False): (64, 8),
    (True, 16, True): (32, 4), (True, 16, False): (16, 8),
}  # fmt: skip


def _tile(q: Tensor, s: int, linear: bool) -> dict[str, int]:
    """LISTS query blocks choose at a time from COLUMNS scores; ROWS queries enter a product."""
    single, wide = q.dtype == torch.float32, q.shape[-1] > 64
    # Without tensor cores a product takes its operands into registers: smaller tiles, more warps.
    columns, warps = 64, 4
    if single and linear:
        columns = 32 if wide else 64
    elif single:
        columns, warps = (16 if wide else 32), 8
    columns, warps = _OTHER_TILES.get((single, tile_width(q.shape[-1]), linear), (columns, warps))
    slots = max(16, triton.next_power_of_2(s))
    lists = 16 if linear else 1
    return {
        "ROWS": 16, "COLUMNS": columns, "LISTS": lists, "SLOTS": slots, "num_warps": warps,
        "num_stages": 2,
    }  # fmt: skip


def _shapes(group: int, q_block: int, q: Tensor) -> dict[str, Any]:
    d = q.shape[-1]
    return {
        "GROUP": group, "Q_BLOCK": q_block, "D": d, "WIDTH": tile_width(d), "PRECISION": precision(),
    }  # fmt: skip


def _options(p: Problem) -> dict[str, Any]:
    kernel = p.spread[0] if p.table is None else p.table.shape[1]
    return {
        "KERNEL": kernel, "STRIDE": p.spread[1], "PADDING": p.spread[2], "POOLING": p.pooling,
        "REDUCE": "none" if p.linear else p.reduce, "SOFTMAX": p.softmax,
        "HAS_FORCED": p.forced is not None, "HAS_WITHIN": p.within is not None,
        "HAS_VISIBLE": p.visible is not None, "HAS_TABLE": p.table is not None,
        "HAS_WEIGHT": p.weight is not None,
    }  # fmt: skip
