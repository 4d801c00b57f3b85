"""Triton kernels of grouped attention: one for the forward pass and one for dq, both by tiles of queries,
and one for dk, dv and dm, by key blocks.

A tile holds a whole key block, so its softmax is computed in place, and the landmark's score enters the
online softmax over blocks. Every output element is written by one program. Exponentials are in base 2.
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
from xattn.kernels.block_sparse.block_lists import transpose_index
from xattn.kernels.block_sparse.reference import reduce_bias
from xattn.kernels.block_sparse.triton import list_steps, shared, split_lists, tiles_of_queries
from xattn.kernels.grouped.reference import Problem
from xattn.kernels.tiles import (
    batch_strides,
    delta,
    list_end,
    list_part,
    list_tokens,
    load_rows,
    own_rows,
    place,
    precision,
    softmax_end,
    softmax_weights,
    store_rows,
    tile_width,
)


@triton.jit
def _inner(products, bias, rows, keys, scale, HAS_BIAS: tl.constexpr, AXIS: tl.constexpr):
    """w of one key block along ``AXIS``, and which rows see a key of it; rows and keys broadcast."""
    s = products * (scale * 1.4426950408889634)
    if HAS_BIAS:
        b = tl.load(bias + keys, mask=keys >= 0, other=0.0).to(tl.float32)
        s += b * 1.4426950408889634
    s = tl.where((rows >= 0) & (keys >= 0), s, float("-inf"))
    top = tl.max(s, AXIS)
    p = tl.exp2(s - tl.expand_dims(tl.where(top == float("-inf"), 0.0, top), AXIS))
    total = tl.sum(p, AXIS)
    some = total > 0
    return p / tl.expand_dims(tl.where(some, total, 1.0), AXIS), some


@triton.jit
def _gate(q, mark, weight_ptr, block, some, scale, HAS_WEIGHT: tl.constexpr):
    """t of one key block in base 2, -inf where a row sees no key of it."""
    t = tl.sum(q.to(tl.float32) * mark[None, :], 1) * (scale * 1.4426950408889634)
    if HAS_WEIGHT:
        t += tl.log2(tl.load(weight_ptr + tl.maximum(block, 0)).to(tl.float32))
    return tl.where(some, t, float("-inf"))


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, marks_ptr, index_ptr, bias_ptr, weight_ptr, o_ptr, lse_ptr,
    stride_ib, stride_ih, stride_bb, stride_bh, H, N, S, M, L, scale,
    GROUP: tl.constexpr, GROUP_I: tl.constexpr, GROUP_B: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    line, own, _, rows = own_rows(N, Q_BLOCK, HEADS, ROWS)
    batch, head = line // H, line % H
    key_line = line // GROUP
    d, w, lane = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V), tl.arange(0, COLUMNS)
    blocks = index_ptr + batch * stride_ib + (head // GROUP_I) * stride_ih + own * L
    bias = bias_ptr + batch * stride_bb + (head // GROUP_B) * stride_bh
    q = load_rows(q_ptr + line * N * D, rows, d, D)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH_V], tl.float32)
    for entry in range(0, list_end(blocks, L)):
        block = tl.load(blocks + entry)
        token = block * K_BLOCK + lane
        keys = tl.where((block >= 0) & (lane < K_BLOCK) & (token < S), token, -1)
        k = load_rows(k_ptr + key_line * S * D, keys, d, D)
        v = load_rows(v_ptr + key_line * S * DV, keys, w, DV)
        inner, some = _inner(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), bias, rows[:, None], keys[None, :],
            scale, HAS_BIAS, 1,
        )  # fmt: skip
        at = marks_ptr + (key_line * M + block) * D + d
        mark = tl.load(at, mask=tl.where(block >= 0, d, D) < D, other=0.0).to(tl.float32)
        t = _gate(q, mark, weight_ptr, block, some, scale, HAS_WEIGHT)
        new = tl.maximum(top, t)
        safe = tl.where(new == float("-inf"), 0.0, new)
        share, keep = tl.exp2(t - safe), tl.exp2(top - safe)
        total = total * keep + share
        part = tl.dot(inner.to(v.dtype), v, input_precision=PRECISION)
        acc = acc * keep[:, None] + share[:, None] * part
        top = new
    acc, lse = softmax_end(top, total, acc)
    store_rows(o_ptr + line * N * DV, rows, w, DV, acc)
    tl.store(lse_ptr + line * N + rows, lse, mask=rows >= 0)


@triton.jit
def dq_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, marks_ptr, index_ptr, bias_ptr, weight_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_ib, stride_ih, stride_bb, stride_bh, H, N, S, M, L, scale,
    GROUP: tl.constexpr, GROUP_I: tl.constexpr, GROUP_B: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    line, own, _, rows = own_rows(N, Q_BLOCK, HEADS, ROWS)
    batch, head = line // H, line % H
    key_line = line // GROUP
    d, w, lane = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V), tl.arange(0, COLUMNS)
    blocks = index_ptr + batch * stride_ib + (head // GROUP_I) * stride_ih + own * L
    bias = bias_ptr + batch * stride_bb + (head // GROUP_B) * stride_bh
    q = load_rows(q_ptr + line * N * D, rows, d, D)
    g = load_rows(g_ptr + line * N * DV, rows, w, DV)
    lse = tl.load(lse_ptr + line * N + rows, mask=rows >= 0, other=float("-inf"))
    delta = tl.load(delta_ptr + line * N + rows, mask=rows >= 0, other=0.0)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    for entry in range(0, list_end(blocks, L)):
        block = tl.load(blocks + entry)
        token = block * K_BLOCK + lane
        keys = tl.where((block >= 0) & (lane < K_BLOCK) & (token < S), token, -1)
        k = load_rows(k_ptr + key_line * S * D, keys, d, D)
        inner, some = _inner(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), bias, rows[:, None], keys[None, :],
            scale, HAS_BIAS, 1,
        )  # fmt: skip
        at = marks_ptr + (key_line * M + block) * D + d
        mark = tl.load(at, mask=tl.where(block >= 0, d, D) < D, other=0.0).to(tl.float32)
        t = _gate(q, mark, weight_ptr, block, some, scale, HAS_WEIGHT)
        share = softmax_weights(t, lse)
        v = load_rows(v_ptr + key_line * S * DV, keys, w, DV)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        c = tl.sum(inner * dp, 1)
        ds = share[:, None] * inner * (dp - c[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
        dq += (share * (c - delta))[:, None] * mark[None, :]
    store_rows(dq_ptr + line * N * D, rows, d, D, dq * scale)


@triton.jit
def dkv_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, marks_ptr, pointer_ptr, queries_ptr, unit_ptr, first_ptr, bias_ptr,
    weight_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dm_ptr, db_ptr,
    stride_ib, stride_ih, stride_bb, stride_bh, H, N, S, M, L, C, LENGTH, scale,
    GROUP: tl.constexpr, GROUP_I: tl.constexpr, GROUP_B: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, WRITE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dk, dv and dm of one key block and its landmark, from one of the C parts of the lists of
    query blocks.

    The sums of each part are stored separately.
    """
    line, own = place(C)
    batch, key_head = line // (H // GROUP), line % (H // GROUP)
    unit = tl.load(unit_ptr + line * C + own)
    part = own - tl.load(first_ptr + line * (M + 1) + unit)
    d, w, lane = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V), tl.arange(0, COLUMNS)
    token = unit * K_BLOCK + lane
    keys = tl.where((lane < K_BLOCK) & (token < S), token, -1)
    out = tl.where(keys >= 0, own * K_BLOCK + lane, -1)
    k = load_rows(k_ptr + line * S * D, keys, d, D)
    v = load_rows(v_ptr + line * S * DV, keys, w, DV)
    at = (line * M + unit) * D + d
    mark = tl.load(marks_ptr + at, mask=d < D, other=0.0).to(tl.float32)
    dk = tl.zeros([COLUMNS, WIDTH], tl.float32)
    dv = tl.zeros([COLUMNS, WIDTH_V], tl.float32)
    dm = tl.zeros([WIDTH], tl.float32)
    for member in range(0, GROUP):
        head = key_head * GROUP + member
        query_line = batch * H + head
        # stride_ib and stride_ih count lists; a list has M + 1 pointers and L entries.
        own_list = batch * stride_ib + (head // GROUP_I) * stride_ih
        begin, count = list_part(pointer_ptr + own_list * (M + 1), unit, part, LENGTH)
        queries = queries_ptr + own_list * L + begin
        bias = bias_ptr + batch * stride_bb + (head // GROUP_B) * stride_bh
        db = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, count * Q_BLOCK, ROWS):
            rows = list_tokens(queries, start, count, N, Q_BLOCK, ROWS)
            q = load_rows(q_ptr + query_line * N * D, rows, d, D)
            g = load_rows(g_ptr + query_line * N * DV, rows, w, DV)
            lse = tl.load(lse_ptr + query_line * N + rows, mask=rows >= 0, other=float("-inf"))
            delta = tl.load(delta_ptr + query_line * N + rows, mask=rows >= 0, other=0.0)
            inner, some = _inner(
                tl.dot(k, tl.trans(q), input_precision=PRECISION), bias, rows[None, :],
                keys[:, None], scale, HAS_BIAS, 0,
            )  # fmt: skip
            t = _gate(q, mark, weight_ptr, unit, some, scale, HAS_WEIGHT)
            share = softmax_weights(t, lse)
            dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
            c = tl.sum(inner * dp, 0)
            a = share[None, :] * inner
            ds = a * (dp - c[None, :])
            dv += tl.dot(a.to(g.dtype), g, input_precision=PRECISION)
            dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
            dm += tl.sum((share * (c - delta))[:, None] * q.to(tl.float32), 0)
            if WRITE:
                db += tl.sum(ds, 1)
        if WRITE:
            tl.store(db_ptr + query_line * C * K_BLOCK + out, db, mask=out >= 0)
    store_rows(dk_ptr + line * C * K_BLOCK * D, out, d, D, dk * scale)
    store_rows(dv_ptr + line * C * K_BLOCK * DV, out, w, DV, dv)
    at = (line * C + own) * D + d
    tl.store(dm_ptr + at, (dm * scale).to(dm_ptr.dtype.element_ty), mask=d < D)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    q, k, v, m = (x.contiguous() for x in (p.q, p.k, p.v, p.marks))
    o = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    index, (bias, weight), tile = p.lists.contiguous(), _optional(p), _tile("forward", p)
    forward_kernel[tiles_of_queries(p, tile)](
        q, k, v, m, index, bias, weight, o, lse, *batch_strides(index), *batch_strides(bias),
        q.shape[1], q.shape[2], k.shape[2], p.key_blocks, index.shape[3], p.scale, **_constants(p), **tile,
    )  # fmt: skip
    return o, lse


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    (o, lse), (grad, grad_lse) = outputs, grads
    d = delta(grad, grad_lse, o)
    g, q, k, v, m, lse = (x.contiguous() for x in (grad.to(p.q.dtype), p.q, p.k, p.v, p.marks, lse))
    index, (bias, weight), constants = p.lists.contiguous(), _optional(p), _constants(p)
    dq, dk, dv, dm = (torch.empty_like(x) for x in (q, k, v, m))
    (batch, heads, n), s, blocks = q.shape[:3], k.shape[2], p.key_blocks
    tile = _tile("dq", p)
    dq_kernel[tiles_of_queries(p, tile)](
        g, q, k, v, m, index, bias, weight, lse, d, dq, *batch_strides(index), *batch_strides(bias), heads,
        n, s, blocks, index.shape[3], p.scale, **constants, **tile,
    )  # fmt: skip
    pointer, queries, _ = transpose_index(index, blocks)
    found = {"k": dk, "v": dv, "marks": dm}
    if write := p.bias is not None and "bias" in wanted:
        found["bias"] = q.new_empty((batch, heads, s), dtype=torch.float32)
    parts = split_lists(p, pointer, queries.shape[2])
    sums = {name: parts.places(x, 1 if x is dm else p.k_block) for name, x in found.items()}
    dkv_kernel[(parts.unit.numel(),)](
        g, q, k, v, m, pointer, queries, parts.unit, parts.first, bias, weight, lse, d, sums["k"],
        sums["v"], sums["marks"], sums.get("bias", d), *list_steps(index), *batch_strides(bias), heads, n,
        s, blocks, queries.shape[2], parts.unit.shape[1], parts.length, p.scale, **constants,
        **_tile("dkv", p), WRITE=write,
    )  # fmt: skip
    parts.add(sums, found, p.k_block)
    if write and p.bias is not None:
        found["bias"] = reduce_bias(found["bias"], p.bias)
    return found | {"q": dq}


def compile_cases() -> Iterator[Case]:
    """Yield each kernel for 16,384 tokens, once with lists of 8 blocks of 64 keys, and once with a bias and
    lists of 32 blocks of 16 keys."""
    kernels = (forward_kernel, dq_kernel, dkv_kernel)
    for kernel, name, width in product(kernels, DTYPES, WIDTHS):
        if name != "fp16":
            yield _case(kernel, name, width, 64, 8, False)
        yield _case(kernel, name, width, 16, 32, True)


def _case(kernel: Any, name: str, width: int, block: int, s: int, biased: bool) -> Case:
    role = {forward_kernel: "forward", dq_kernel: "dq", dkv_kernel: "dkv"}[kernel]
    n, dtype = 16384, DTYPES[name]
    q = torch.empty(1, 1, n, width, dtype=dtype, device="meta")
    index = torch.empty(1, 1, n // block, s, dtype=torch.int32, device="meta")
    bias = q[..., 0] if biased else None
    marks, weight = q[:, :, ::block], q[0, 0, ::block, 0]
    p = Problem(q, q, q, marks, index, bias, weight, block, block, 1.0, "triton")
    options = _tile(role, p) | _constants(p)
    if role == "dkv":
        options |= {"WRITE": biased}
    products, tensors = {"forward": (2, 4), "dq": (3, 5), "dkv": (4, 6)}[role]
    return make_case(
        kernel, name, options,
        f"grouped {role} {name} D={width}" + (" bias" if biased else ""),
        2.0 * products * n * s * block * width,
        float(tensors * n * width * dtype.itemsize),
        wide=("bias_ptr", "weight_ptr", "lse_ptr", "delta_ptr", "db_ptr"),
        integers=("index_ptr", "pointer_ptr", "queries_ptr", "unit_ptr", "first_ptr"),
    )  # fmt: skip


# (role, half precision, padded width above 64): rows, warps and stages that spill least.
_TILES = {
    ("forward", True, False): (64, 4, 3),
    ("forward", True, True): (64, 8, 2),
    ("forward", False, False): (32, 8, 2),
    ("forward", False, True): (16, 4, 2),
    ("dq", True, False): (64, 4, 3),
    ("dq", True, True): (64, 8, 2),
    ("dq", False, False): (32, 8, 2),
    ("dq", False, True): (32, 8, 2),
    ("dkv", True, False): (32, 4, 1),
    ("dkv", True, True): (32, 8, 2),
    ("dkv", False, False): (32, 8, 2),
    ("dkv", False, True): (16, 4, 2),
}
# (role, half precision, padded width) with key blocks above 32: the same, where that one spills.
_LONG_TILES = {
    ("forward", False, 64): (16, 4, 2),
    ("forward", False, 128): (16, 16, 2),
    ("dq", False, 64): (16, 4, 2),
    ("dq", False, 128): (16, 16, 2),
    ("dkv", True, 64): (16, 4, 1),
    ("dkv", False, 64): (16, 4, 2),
    ("dkv", False, 128): (16, 8, 1),
}


def _tile(role: str, p: Problem) -> dict[str, Any]:
    """Tile and launch options; the columns are those of a whole key block."""
    half, width = p.q.dtype != torch.float32, tile_width(max(p.q.shape[-1], p.v.shape[-1]))
    tile, columns = _TILES[role, half, width > 64], tile_width(p.k_block)
    if columns > 32:
        tile = _LONG_TILES.get((role, half, width), tile)
    rows, warps, stages = tile
    single = precision()
    if single == "tf32x3" and (role == "dkv" or columns > 32):
        single = "ieee"  # three products of a whole key block need more registers than there are
    chosen = {
        "ROWS": rows, "COLUMNS": columns, "PRECISION": single, "num_warps": warps,
        "num_stages": stages,
    }  # fmt: skip
    return chosen if role == "dkv" else shared(chosen, p, p.lists, p.bias)


def _optional(p: Problem) -> tuple[Tensor, Tensor]:
    """The bias and weight to pass; a missing one, which the kernels do not read, is part of ``q``."""
    bias, weight = (p.q[:1, :1] if x is None else x.contiguous() for x in (p.bias, p.weight))
    return bias, weight


def _constants(p: Problem) -> dict[str, Any]:
    d, dv, heads = p.q.shape[3], p.v.shape[3], p.q.shape[1]
    return {
        "GROUP": heads // p.k.shape[1],
        "GROUP_I": heads // p.lists.shape[1],
        "GROUP_B": 1 if p.bias is None else heads // p.bias.shape[1],
        "D": d, "DV": dv, "WIDTH": tile_width(d), "WIDTH_V": tile_width(dv),
        "Q_BLOCK": p.q_block, "K_BLOCK": p.k_block, "HAS_BIAS": p.bias is not None,
        "HAS_WEIGHT": p.weight is not None,
    }  # fmt: skip
