"""Triton kernels of attention over lists of key blocks: one for the forward pass and one for dq, both by
tiles of queries, and one for dk and dv, by tiles of keys.

The forward pass and dq read tiles of keys from the list of their query block. Such a tile is a part of one
large block, or consists of several small blocks. The kernel of dk and dv follows the transposed list of its
keys. Every output element is written by one program, so there are no atomics and two runs agree to the bit.
Exponentials are in base 2.
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
from xattn.kernels.block_sparse.block_lists import transpose_index
from xattn.kernels.block_sparse.reference import Problem, reduce_bias
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
    softmax_step,
    softmax_weights,
    store_rows,
    tile_width,
)

TILE = 1024  # units whose lists are split at a time, and numbers that are added at a time


@triton.jit
def _inside(
    low_ptr, high_ptr, position_ptr, rows, keys, seen,
    DIMENSIONS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """``seen`` where the key's position lies in the query's box."""
    for t in tl.static_range(DIMENSIONS):
        low = tl.load(low_ptr + rows * DIMENSIONS + t, mask=rows >= 0, other=1)
        high = tl.load(high_ptr + rows * DIMENSIONS + t, mask=rows >= 0, other=0)
        at = tl.load(position_ptr + keys * DIMENSIONS + t, mask=keys >= 0, other=0)
        seen = seen & (at >= low) & (at <= high)
        if t == 0:
            if D0 > 1:
                seen = seen & ((at - low) % D0 == 0)
        elif t == 1:
            if D1 > 1:
                seen = seen & ((at - low) % D1 == 0)
        else:
            if D2 > 1:
                seen = seen & ((at - low) % D2 == 0)
    return seen


@triton.jit
def _scores(
    products, bias, low_ptr, high_ptr, position_ptr, rank, limit, tokens, keys, seen, scale,
    HAS_BIAS: tl.constexpr, HAS_RANK: tl.constexpr, DIMENSIONS: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Scores in base 2, -inf where the key is not seen; tokens and keys broadcast to the products."""
    s = products * (scale * 1.4426950408889634)
    if HAS_BIAS:
        s += tl.load(bias + keys, mask=keys >= 0, other=0.0).to(tl.float32) * 1.4426950408889634
    seen = seen & (tokens >= 0) & (keys >= 0)
    if DIMENSIONS > 0:
        seen = _inside(low_ptr, high_ptr, position_ptr, tokens, keys, seen, DIMENSIONS, D0, D1, D2)
    if HAS_RANK:
        own = tl.load(rank + keys, mask=keys >= 0, other=0)
        seen = seen & ((own <= limit) | (keys == tokens))
    return tl.where(seen, s, float("-inf"))


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, bias_ptr, low_ptr, high_ptr, position_ptr, rank_ptr, limit_ptr,
    o_ptr, lse_ptr, stride_ib, stride_ih, stride_bb, stride_bh, H, N, S, L, scale,
    GROUP: tl.constexpr, GROUP_I: tl.constexpr, GROUP_B: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RANK: tl.constexpr, DIMENSIONS: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    line, block, tokens, rows = own_rows(N, Q_BLOCK, HEADS, ROWS)
    batch, head = line // H, line % H
    key_line = line // GROUP
    d, w = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    blocks = index_ptr + batch * stride_ib + (head // GROUP_I) * stride_ih + block * L
    bias = bias_ptr + batch * stride_bb + (head // GROUP_B) * stride_bh
    q = load_rows(q_ptr + line * N * D, rows, d, D)
    limit = tokens
    if HAS_RANK:
        limit = tl.load(limit_ptr + line * N + rows, mask=rows >= 0, other=0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH_V], tl.float32)
    every = tl.full([ROWS, COLUMNS], 1, tl.int1)
    for start in range(0, list_end(blocks, L) * K_BLOCK, COLUMNS):
        keys = list_tokens(blocks, start, L, S, K_BLOCK, COLUMNS)
        k = load_rows(k_ptr + key_line * S * D, keys, d, D)
        v = load_rows(v_ptr + key_line * S * DV, keys, w, DV)
        s = _scores(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), bias, low_ptr, high_ptr,
            position_ptr, rank_ptr + line * S, limit[:, None], tokens[:, None], keys[None, :],
            every, scale, HAS_BIAS, HAS_RANK, DIMENSIONS, D0, D1, D2,
        )  # fmt: skip
        top, total, acc = softmax_step(s, v, top, total, acc, PRECISION)
    some = total > 0  # softmax_end, which needs lse before the store, would spill on sm_80
    store_rows(o_ptr + line * N * DV, rows, w, DV, acc / tl.where(some, total, 1.0)[:, None])
    lse = (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453
    tl.store(lse_ptr + line * N + rows, tl.where(some, lse, float("-inf")), mask=rows >= 0)


@triton.jit
def dq_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, index_ptr, bias_ptr, low_ptr, high_ptr, position_ptr, rank_ptr,
    limit_ptr, lse_ptr, delta_ptr, dq_ptr, stride_ib, stride_ih, stride_bb, stride_bh,
    H, N, S, L, scale,
    GROUP: tl.constexpr, GROUP_I: tl.constexpr, GROUP_B: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RANK: tl.constexpr, DIMENSIONS: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    line, block, tokens, rows = own_rows(N, Q_BLOCK, HEADS, ROWS)
    batch, head = line // H, line % H
    key_line = line // GROUP
    d, w = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    blocks = index_ptr + batch * stride_ib + (head // GROUP_I) * stride_ih + block * L
    bias = bias_ptr + batch * stride_bb + (head // GROUP_B) * stride_bh
    q = load_rows(q_ptr + line * N * D, rows, d, D)
    g = load_rows(g_ptr + line * N * DV, rows, w, DV)
    lse = tl.load(lse_ptr + line * N + rows, mask=rows >= 0, other=float("-inf"))
    delta = tl.load(delta_ptr + line * N + rows, mask=rows >= 0, other=0.0)
    limit = tokens
    if HAS_RANK:
        limit = tl.load(limit_ptr + line * N + rows, mask=rows >= 0, other=0)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    every = tl.full([ROWS, COLUMNS], 1, tl.int1)
    for start in range(0, list_end(blocks, L) * K_BLOCK, COLUMNS):
        keys = list_tokens(blocks, start, L, S, K_BLOCK, COLUMNS)
        k = load_rows(k_ptr + key_line * S * D, keys, d, D)
        v = load_rows(v_ptr + key_line * S * DV, keys, w, DV)
        s = _scores(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), bias, low_ptr, high_ptr,
            position_ptr, rank_ptr + line * S, limit[:, None], tokens[:, None], keys[None, :],
            every, scale, HAS_BIAS, HAS_RANK, DIMENSIONS, D0, D1, D2,
        )  # fmt: skip
        products = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        ds = softmax_weights(s, lse[:, None]) * (products - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    store_rows(dq_ptr + line * N * D, rows, d, D, dq * scale)


@triton.jit
def dkv_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, pointer_ptr, queries_ptr, bits_ptr, unit_ptr, first_ptr, bias_ptr,
    low_ptr, high_ptr, position_ptr, rank_ptr, limit_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, db_ptr,
    stride_ib, stride_ih, stride_bb, stride_bh, H, N, S, M, L, C, LENGTH, scale,
    GROUP: tl.constexpr, GROUP_I: tl.constexpr, GROUP_B: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PACK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RANK: tl.constexpr,
    DIMENSIONS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    WRITE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one tile of keys. A tile is a part of a block, or ``PACK`` blocks that share a
    list; bits tell which of these blocks each query block reads.

    A program handles one of the C parts of the lists; the sums of each part are stored separately.
    """
    span: tl.constexpr = K_BLOCK * PACK
    tiles: tl.constexpr = (span + COLUMNS - 1) // COLUMNS
    line, tile = place(C * tiles)
    batch, key_head = line // (H // GROUP), line % (H // GROUP)
    own, inner = tile // tiles, (tile % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    unit = tl.load(unit_ptr + line * C + own)
    part = own - tl.load(first_ptr + line * (M + 1) + unit)
    key = unit * span + inner
    keys = tl.where((inner < span) & (key < S), key, -1)
    out = tl.where(keys >= 0, own * span + inner, -1)
    d, w = tl.arange(0, WIDTH), tl.arange(0, WIDTH_V)
    k = load_rows(k_ptr + line * S * D, keys, d, D)
    v = load_rows(v_ptr + line * S * DV, keys, w, DV)
    dk = tl.zeros([COLUMNS, WIDTH], tl.float32)
    dv = tl.zeros([COLUMNS, WIDTH_V], tl.float32)
    for member in range(0, GROUP):
        head = key_head * GROUP + member
        query_line = batch * H + head
        # stride_ib and stride_ih count lists; a list has M + 1 pointers and L entries.
        own_list = batch * stride_ib + (head // GROUP_I) * stride_ih
        begin, count = list_part(pointer_ptr + own_list * (M + 1), unit, part, LENGTH)
        queries, sets = queries_ptr + own_list * L + begin, bits_ptr + own_list * L + begin
        bias = bias_ptr + batch * stride_bb + (head // GROUP_B) * stride_bh
        db = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, count * Q_BLOCK, ROWS):
            rows = list_tokens(queries, start, count, N, Q_BLOCK, ROWS)
            q = load_rows(q_ptr + query_line * N * D, rows, d, D)
            g = load_rows(g_ptr + query_line * N * DV, rows, w, DV)
            lse = tl.load(lse_ptr + query_line * N + rows, mask=rows >= 0, other=float("-inf"))
            delta = tl.load(delta_ptr + query_line * N + rows, mask=rows >= 0, other=0.0)
            limit = rows
            if HAS_RANK:
                limit = tl.load(limit_ptr + query_line * N + rows, mask=rows >= 0, other=0)
            seen = tl.full([COLUMNS, ROWS], 1, tl.int1)
            if PACK > 1:
                entry = (start + tl.arange(0, ROWS)) // Q_BLOCK
                bits = tl.load(sets + entry, mask=entry < count, other=0)
                seen = ((bits[None, :] >> (inner // K_BLOCK)[:, None].to(tl.int64)) & 1) != 0
            s = _scores(
                tl.dot(k, tl.trans(q), input_precision=PRECISION), bias, low_ptr, high_ptr,
                position_ptr, rank_ptr + query_line * S, limit[None, :], rows[None, :],
                keys[:, None], seen, scale, HAS_BIAS, HAS_RANK, DIMENSIONS, D0, D1, D2,
            )  # fmt: skip
            products = tl.dot(v, tl.trans(g), input_precision=PRECISION)
            p = softmax_weights(s, lse[None, :])
            ds = p * (products - delta[None, :])
            dv += tl.dot(p.to(g.dtype), g, input_precision=PRECISION)
            dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
            if WRITE:
                db += tl.sum(ds, 1)
        if WRITE:
            tl.store(db_ptr + query_line * C * span + out, db, mask=out >= 0)
    store_rows(dk_ptr + line * C * span * D, out, d, D, dk * scale)
    store_rows(dv_ptr + line * C * span * DV, out, w, DV, dv)


@triton.jit
def parts_kernel(
    pointer_ptr, first_ptr, unit_ptr, stride_ib, stride_ih, H, M, C, LENGTH,
    GROUP: tl.constexpr, GROUP_I: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """For the lists of a key head, store the number of each unit's first part, and the unit to which each
    part belongs."""
    line = tl.program_id(0).to(tl.int64)
    batch, key_head = line // (H // GROUP), line % (H // GROUP)
    lane, total = tl.arange(0, TILE), 0
    for start in range(0, M, TILE):
        unit = start + lane
        inside = unit < M
        longest = tl.zeros([TILE], tl.int32)
        for member in range(0, GROUP, GROUP_I):  # the heads with lists of their own
            own_list = batch * stride_ib + (key_head * GROUP + member) // GROUP_I * stride_ih
            pointer = pointer_ptr + own_list * (M + 1) + unit
            count = tl.load(pointer + 1, mask=inside, other=0)
            longest = tl.maximum(longest, count - tl.load(pointer, mask=inside, other=0))
        parts = tl.where(inside, tl.maximum((longest + LENGTH - 1) // LENGTH, 1), 0)
        first = total + tl.cumsum(parts, 0) - parts
        tl.store(first_ptr + line * (M + 1) + unit, first, mask=inside)
        for part in range(0, tl.max(parts, 0)):
            tl.store(unit_ptr + line * C + first + part, unit, mask=part < parts)
        total += tl.sum(parts, 0)
    tl.store(first_ptr + line * (M + 1) + M, total)
    for start in range(total, C, TILE):  # parts beyond the last are empty ones of the last unit
        own = start + lane
        tl.store(unit_ptr + line * C + own, lane * 0 + M - 1, mask=own < C)


@triton.jit
def _sum_parts(parts_ptr, out_ptr, unit, first, end, SIZE, WHOLE, TILE: tl.constexpr):
    """Write the sums of a unit's parts, of SIZE numbers each, to their place among WHOLE numbers."""
    for start in range(0, SIZE, TILE):
        lane = start + tl.arange(0, TILE)
        inside = (lane < SIZE) & (unit.to(tl.int64) * SIZE + lane < WHOLE)
        total = tl.zeros([TILE], tl.float32)
        at = parts_ptr + first.to(tl.int64) * SIZE + lane
        for _ in range(first, end):
            total += tl.load(at, mask=inside, other=0.0)
            at += SIZE
        at = out_ptr + unit.to(tl.int64) * SIZE + lane
        tl.store(at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sums_kernel(
    first_ptr, dk_parts_ptr, dv_parts_ptr, dm_parts_ptr, db_parts_ptr, dk_ptr, dv_ptr, dm_ptr, db_ptr,
    S, M, C, SPAN, D, DV, GROUP: tl.constexpr, MARKS: tl.constexpr, WRITE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of the lists of a unit, in their order."""
    line, unit = place(M)
    first = tl.load(first_ptr + line * (M + 1) + unit)
    end = tl.load(first_ptr + line * (M + 1) + unit + 1)
    dk, dv = dk_parts_ptr + line * C * SPAN * D, dv_parts_ptr + line * C * SPAN * DV
    _sum_parts(dk, dk_ptr + line * S * D, unit, first, end, SPAN * D, S * D, TILE)
    _sum_parts(dv, dv_ptr + line * S * DV, unit, first, end, SPAN * DV, S * DV, TILE)
    if MARKS:
        dm = dm_parts_ptr + line * C * D
        _sum_parts(dm, dm_ptr + line * M * D, unit, first, end, D, M * D, TILE)
    if WRITE:
        for member in range(0, GROUP):
            head = line * GROUP + member
            db = db_parts_ptr + head * C * SPAN
            _sum_parts(db, db_ptr + head * S, unit, first, end, SPAN, S, TILE)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    q, k, v = (x.contiguous() for x in (p.q, p.k, p.v))
    o = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    index, bias, *more = p.lists.contiguous(), *_optional(p)
    tile = _tile("forward", p)
    forward_kernel[tiles_of_queries(p, tile)](
        q, k, v, index, bias, *more, o, lse, *batch_strides(index), *batch_strides(bias), q.shape[1],
        q.shape[2], k.shape[2], index.shape[3], p.scale, **_constants(p), **tile,
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
    g, q, k, v, lse = (x.contiguous() for x in (grad.to(p.q.dtype), p.q, p.k, p.v, lse))
    index, bias, *more = p.lists.contiguous(), *_optional(p)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    (batch, heads, n), s = q.shape[:3], k.shape[2]
    constants, tile = _constants(p), _tile("dq", p)
    dq_kernel[tiles_of_queries(p, tile)](
        g, q, k, v, index, bias, *more, lse, d, dq, *batch_strides(index), *batch_strides(bias), heads, n,
        s, index.shape[3], p.scale, **constants, **tile,
    )  # fmt: skip
    tile = _tile("dkv", p)
    pack = _pack(tile, p.k_block)
    pointer, queries, bits = transpose_index(index, p.key_blocks, pack)
    found = {"k": dk, "v": dv}
    if write := p.bias is not None and "bias" in wanted:
        found["bias"] = q.new_empty((batch, heads, s), dtype=torch.float32)
    span, parts = p.k_block * pack, split_lists(p, pointer, queries.shape[2])
    sums = {name: parts.places(x, span) for name, x in found.items()}
    grid = (parts.unit.numel() * triton.cdiv(span, tile["COLUMNS"]),)
    dkv_kernel[grid](
        g, q, k, v, pointer, queries, queries if bits is None else bits, parts.unit, parts.first, bias,
        *more, lse, d, sums["k"], sums["v"], sums.get("bias", d), *list_steps(index), *batch_strides(bias),
        heads, n, s, pointer.shape[2] - 1, queries.shape[2], parts.unit.shape[1], parts.length, p.scale,
        **constants, **tile, PACK=pack, WRITE=write,
    )  # fmt: skip
    parts.add(sums, found, span)
    if write and p.bias is not None:
        found["bias"] = reduce_bias(found["bias"], p.bias)
    return found | {"q": dq}


PART = 4096  # queries of a part, unless lists are longer on average


class Parts(NamedTuple):
    """The lists of M units of keys (blocks, or groups of blocks) in C parts, so that no program has to read
    a long list alone."""

    unit: Tensor
    """int32 (B Hk, C): the unit of each part."""
    first: Tensor
    """int32 (B Hk, M + 1): unit m has the parts ``first[m]`` to ``first[m + 1] - 1``."""
    length: int
    """The most entries of a part."""

    def places(self, x: Tensor, span: int) -> Tensor:
        """Return memory for the parts of the gradient ``x`` (B, heads, tokens, ...); each part has ``span``
        tokens."""
        shape = *x.shape[:2], self.unit.shape[1] * span, *x.shape[3:]
        return x.new_empty(shape, dtype=torch.float32)

    def add(self, places: dict[str, Tensor], found: dict[str, Tensor], span: int) -> None:
        """Write the sum of the parts of each gradient."""
        dk, dv, (lines, units) = found["k"], found["v"], self.first.shape
        both = [x.get(name, dk) for x in (places, found) for name in ("k", "v", "marks", "bias")]
        sums_kernel[(lines * (units - 1),)](
            self.first, *both, dk.shape[2], units - 1, self.unit.shape[1], span, dk.shape[3],
            dv.shape[3], GROUP=both[-1].shape[1] // dk.shape[1], MARKS="marks" in found,
            WRITE="bias" in found, TILE=TILE,
        )  # fmt: skip


def split_lists(p: Any, pointer: Tensor, entries: int) -> Parts:
    """Split transposed lists into parts, whose number is the same for all key heads.

    Args:
        p: a problem with queries and keys in blocks.
        pointer: (B or 1, 1 or Hk or H, M + 1), as returned by :func:`transpose_index`.
        entries: total number of entries in the lists of one of these heads.
    """
    (batch, heads), key_heads, units = p.q.shape[:2], p.k.shape[1], pointer.shape[2] - 1
    entries *= max(1, pointer.shape[1] // key_heads)
    length = max(1, PART // p.q_block, 2 * entries // units)
    count = units + (entries // length if p.query_blocks > length else 0)
    first, unit = (pointer.new_empty(batch * key_heads, x) for x in (units + 1, count))
    parts_kernel[(batch * key_heads,)](
        pointer, first, unit, *list_steps(pointer), heads, units, count, length,
        GROUP=heads // key_heads, GROUP_I=heads // pointer.shape[1], TILE=TILE,
    )  # fmt: skip
    return Parts(unit, first, length)


def compile_cases() -> Iterator[Case]:
    """Yield each kernel for 16,384 tokens, in four settings: 8 blocks of 64 keys; 32 blocks of 16 keys with
    a bias and a box; 16 query heads that share a key head, where each query reads 8 blocks of 64 keys; and
    256 single keys with ranks. The kernels that split lists and add up their parts come last."""
    kernels = (forward_kernel, dq_kernel, dkv_kernel)
    for kernel, name, width in product(kernels, DTYPES, WIDTHS):
        if name != "fp16":
            yield _case(kernel, name, width, (64, 64), 8)
        yield _case(kernel, name, width, (16, 16), 32, [1, 2])
        if name != "fp16" and width >= 64:
            yield _case(kernel, name, width, (1, 64), 8, heads=16)
            yield _case(kernel, name, width, (64, 1), 256, [1], ranked=True)
    options = {"GROUP": 16, "TILE": TILE, "num_warps": 4, "num_stages": 3}
    yield make_case(
        parts_kernel, "fp32", options | {"GROUP_I": 1}, "block_sparse parts", 64.0 * TILE, 64.0 * TILE,
        integers=parts_kernel.arg_names,
    )  # fmt: skip
    for name in DTYPES:
        yield make_case(
            sums_kernel, name, options | {"MARKS": True, "WRITE": True}, f"block_sparse sums {name}",
            2.0 * 16384 * 128, 12.0 * 16384 * 128, integers=("first_ptr",),
            wide=("dk_parts_ptr", "dv_parts_ptr", "dm_parts_ptr", "db_parts_ptr", "db_ptr"),
        )  # fmt: skip


def _case(
    kernel: Any, name: str, width: int, blocks: tuple[int, int], s: int,
    dilation: list[int] | None = None, heads: int = 1, ranked: bool = False,
) -> Case:  # fmt: skip
    role = {forward_kernel: "forward", dq_kernel: "dq", dkv_kernel: "dkv"}[kernel]
    n, dtype = 16384, DTYPES[name]
    q = torch.empty(1, heads, n, width, dtype=dtype, device="meta")
    index = torch.empty(1, 1, n // blocks[0], s, dtype=torch.int32, device="meta")
    bias = None if dilation is None else q[..., 0]
    rank = q[..., 0] if ranked else None
    p = Problem(
        q, q[:, :1], q[:, :1], index, bias, None, None, None, rank, rank, dilation or [], *blocks, 1.0,
        "triton",
    )  # fmt: skip
    options = _tile(role, p) | _constants(p)
    if role == "dkv":
        pack = _pack(options, blocks[1])
        options |= {"PACK": pack, "WRITE": bias is not None}
    products, tensors = {"forward": (2, 4), "dq": (3, 5), "dkv": (4, 6)}[role]
    kind = " heads" if heads > 1 else " rank" if ranked else "" if bias is None else " box"
    case = make_case(
        kernel, name, options, f"block_sparse {role} {name} D={width}{kind}",
        2.0 * products * heads * n * s * blocks[1] * width,
        float(tensors * heads * n * width * dtype.itemsize),
        wide=("bias_ptr", "lse_ptr", "delta_ptr", "db_ptr"),
        integers=(
            "index_ptr", "pointer_ptr", "queries_ptr", "unit_ptr", "first_ptr", "low_ptr", "high_ptr",
            "position_ptr", "rank_ptr", "limit_ptr",
        ),
    )  # fmt: skip
    if "bits_ptr" in case.signature:
        case.signature["bits_ptr"] = "*i64"
    return case


# (role, half precision, D or Dv above 64): rows, columns, warps and stages that spill least.
_TILES = {
    ("forward", True, False): (64, 64, 4, 3),
    ("forward", True, True): (64, 32, 4, 3),
    ("forward", False, False): (32, 32, 4, 2),
    ("forward", False, True): (16, 32, 8, 2),
    ("dq", True, False): (64, 32, 4, 3),
    ("dq", True, True): (64, 32, 4, 2),
    ("dq", False, False): (32, 32, 4, 2),
    ("dq", False, True): (16, 32, 8, 2),
    ("dkv", True, False): (32, 64, 4, 3),
    ("dkv", True, True): (32, 64, 8, 3),
    ("dkv", False, False): (16, 32, 4, 2),
    ("dkv", False, True): (16, 32, 8, 2),
}
# (role, half precision, padded width, box): the same, where that one spills.
_OTHER_TILES = {
    ("forward", False, 32, False): (32, 32, 8, 2),
    ("forward", False, 64, True): (32, 16, 8, 2),
    ("forward", False, 128, True): (32, 16, 8, 2),
    ("dq", False, 32, False): (32, 16, 8, 2),
    ("dq", False, 64, False): (32, 32, 8, 2),
    ("dq", False, 128, False): (16, 32, 8, 1),
    ("dq", False, 128, True): (16, 16, 8, 2),
    ("dkv", False, 64, False): (16, 16, 4, 2),
    ("dkv", False, 128, False): (16, 16, 8, 2),
    ("dkv", False, 128, True): (16, 16, 8, 1),
}


def _tile(role: str, p: Problem) -> dict[str, int]:
    """Tile and launch options; only dkv can fill its rows from several query blocks."""
    half, width = p.q.dtype != torch.float32, tile_width(max(p.q.shape[-1], p.v.shape[-1]))
    tile = _TILES[role, half, width > 64]
    rows, columns, warps, stages = _OTHER_TILES.get((role, half, width, len(p.dilation) > 0), tile)
    chosen = {"ROWS": rows, "COLUMNS": columns, "num_warps": warps, "num_stages": stages}
    return chosen if role == "dkv" else shared(chosen, p, p.lists, p.bias, p.rank)


def _pack(tile: dict[str, int], k_block: int) -> int:
    """Key blocks per tile of dkv; their bits have to fit into a signed 64-bit integer."""
    return max(1, min(63, tile["COLUMNS"] // k_block))


def shared(tile: dict[str, Any], p: Any, *given: Tensor | None) -> dict[str, Any]:
    """Adapt a tile so that the query heads of a key head share its rows, provided that each tensor in
    ``given``, such as the lists, is the same for all of these heads. The tile has no more rows than they
    need."""
    group = p.q.shape[1] // p.k.shape[1]
    heads = group if all(x is None or p.k.shape[1] % x.shape[1] == 0 for x in given) else 1
    return tile | {"HEADS": heads, "ROWS": min(tile["ROWS"], tile_width(p.q_block * heads))}


def tiles_of_queries(p: Any, tile: dict[str, Any]) -> tuple[int]:
    """The flat grid of :func:`~xattn.kernels.tiles.own_rows`."""
    lines = p.q.shape[0] * p.q.shape[1] // tile["HEADS"]
    return (lines * p.query_blocks * triton.cdiv(p.q_block * tile["HEADS"], tile["ROWS"]),)


def _optional(p: Problem) -> tuple[Tensor, ...]:
    """The tensors to pass; a missing tensor, which the kernel does not read, is replaced by part of
    ``q``."""
    given, none = (p.bias, p.low, p.high, p.position, p.rank, p.limit), p.q[:1, :1]
    return tuple(none if x is None else x.contiguous() for x in given)


def _constants(p: Problem) -> dict[str, Any]:
    d, dv, heads = p.q.shape[3], p.v.shape[3], p.q.shape[1]
    d0, d1, d2 = (*p.dilation, 1, 1, 1)[:3]
    return {
        "GROUP": heads // p.k.shape[1],
        "GROUP_I": heads // p.lists.shape[1],
        "GROUP_B": 1 if p.bias is None else heads // p.bias.shape[1],
        "D": d, "DV": dv, "WIDTH": tile_width(d), "WIDTH_V": tile_width(dv),
        "Q_BLOCK": p.q_block, "K_BLOCK": p.k_block,
        "HAS_BIAS": p.bias is not None, "HAS_RANK": p.rank is not None,
        "DIMENSIONS": len(p.dilation), "D0": d0, "D1": d1, "D2": d2, "PRECISION": precision(),
    }  # fmt: skip


def list_steps(lists: Tensor) -> tuple[int, ...]:
    """The steps, counted in lists, from one batch entry to the next and from one head to the next; a step
    is 0 if all of them use the same lists."""
    return batch_strides(lists.new_empty(lists.shape[:2]))
