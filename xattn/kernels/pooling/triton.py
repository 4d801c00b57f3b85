"""Triton kernels of softmax pooling, tiled over the width of the tokens, which may have any size.

    scores    s = scale q k^T + b            a program per tile of tokens, a loop over the width
    pool      o = softmax(s) v, or ds k      a program per tile of the width, a loop over the tokens
    slope     ds = p o (dO v^T - d)          a program per tile of tokens, a loop over the width
    spread    dV = p^T dO, dK = ds^T q       a program per tile of tokens and width, a loop over queries

Scores (B, Q, T) and their gradient are written once each. Every output element is written by one
program, so two runs agree to the bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xattn.kernels.aot import Case, make_case
from xattn.kernels.pooling.reference import Problem
from xattn.kernels.tiles import delta, load_tile, place, precision, store_tile

# Tile options; with 8 warps no kernel spills on sm_80 and sm_90, see compile_cases. Not timed on a GPU.
TOKENS, WIDTH = 64, 64


@triton.jit
def _weights(s, lse):
    """exp(s - lse); 0 in rows without a token."""
    seen = lse != float("-inf")
    return tl.where(seen, tl.exp(s - tl.where(seen, lse, 0.0)), 0.0)


@triton.jit
def scores_kernel(
    q_ptr, k_ptr, bias_ptr, s_ptr, stride_qb, Q, T, D, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, COLUMNS)
    image, tile = place(tiles * tl.cdiv(Q, ROWS))
    rows = tile // tiles * ROWS + tl.arange(0, ROWS)
    columns = tile % tiles * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        q = load_tile(q_ptr + image * stride_qb, rows, d, Q, D)
        k = load_tile(k_ptr + image * T * D, columns, d, T, D)
        acc += tl.dot(q, tl.trans(k), input_precision=PRECISION)
    acc = acc * scale
    if HAS_BIAS:
        acc += load_tile(bias_ptr + image * Q * T, rows, columns, Q, T).to(tl.float32)
    store_tile(s_ptr + image * Q * T, rows, columns, Q, T, acc)


@triton.jit
def pool_kernel(
    s_ptr, v_ptr, o_ptr, lse_ptr, Q, T, V, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Q is the number of queries in a group; ``scale`` multiplies sums that are computed without
    softmax."""
    tiles = tl.cdiv(V, BLOCK)
    group, tile = place(tiles * tl.cdiv(Q, ROWS))
    rows = tile // tiles * ROWS + tl.arange(0, ROWS)
    w = tile % tiles * BLOCK + tl.arange(0, BLOCK)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, T, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        v = load_tile(v_ptr + group * T * V, columns, w, T, V)
        p = load_tile(s_ptr + group * Q * T, rows, columns, Q, T)
        if SOFTMAX:
            p = tl.where(columns[None, :] < T, p, float("-inf"))
            new = tl.maximum(top, tl.max(p, 1))
            safe = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp(p - safe[:, None])
            keep = tl.exp(top - safe)
            total = total * keep + tl.sum(p, 1)
            acc = acc * keep[:, None]
            top = new
        acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    if SOFTMAX:
        some = total != 0
        whole = tl.where(some, total, 1.0)
        acc = acc / whole[:, None]
        lse = tl.where(some, top + tl.log(whole), float("-inf"))
        if tile % tiles == 0:
            tl.store(lse_ptr + group * Q + rows, lse, mask=rows < Q)
    else:
        acc = acc * scale
    store_tile(o_ptr + group * Q * V, rows, w, Q, V, acc)


@triton.jit
def slope_kernel(
    g_ptr, v_ptr, s_ptr, lse_ptr, delta_ptr, ds_ptr, Q, T, V,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, COLUMNS)
    group, tile = place(tiles * tl.cdiv(Q, ROWS))
    rows = tile // tiles * ROWS + tl.arange(0, ROWS)
    columns = tile % tiles * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, V, BLOCK):
        w = start + tl.arange(0, BLOCK)
        g = load_tile(g_ptr + group * Q * V, rows, w, Q, V)
        v = load_tile(v_ptr + group * T * V, columns, w, T, V)
        acc += tl.dot(g, tl.trans(v), input_precision=PRECISION)
    lse = tl.load(lse_ptr + group * Q + rows, mask=rows < Q, other=float("-inf"))
    delta = tl.load(delta_ptr + group * Q + rows, mask=rows < Q, other=0.0)
    s = load_tile(s_ptr + group * Q * T, rows, columns, Q, T)
    ds = _weights(s, lse[:, None]) * (acc - delta[:, None])
    store_tile(ds_ptr + group * Q * T, rows, columns, Q, T, ds)


@triton.jit
def spread_kernel(
    s_ptr, lse_ptr, x_ptr, out_ptr, stride_xb, Q, T, W, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, EXP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out_t = scale sum_q w_qt x_q, where w are the weights of the scores s or, without EXP, s itself."""
    tiles = tl.cdiv(T, COLUMNS)
    group, tile = place(tiles * tl.cdiv(W, BLOCK))
    columns = tile % tiles * COLUMNS + tl.arange(0, COLUMNS)
    w = tile // tiles * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([COLUMNS, BLOCK], tl.float32)
    for start in range(0, Q, ROWS):
        rows = start + tl.arange(0, ROWS)
        x = load_tile(x_ptr + group * stride_xb, rows, w, Q, W)
        p = load_tile(s_ptr + group * Q * T, rows, columns, Q, T)
        if EXP:
            lse = tl.load(lse_ptr + group * Q + rows, mask=rows < Q, other=float("-inf"))
            p = _weights(p, lse[:, None])
        acc += tl.dot(tl.trans(p).to(x.dtype), x, input_precision=PRECISION)
    store_tile(out_ptr + group * T * W, columns, w, T, W, acc * scale)


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse and the scores; if the bias holds the scores, an empty tensor takes their place."""
    v = p.v.contiguous()
    (batch, queries, _), (groups, tokens, width) = p.sizes, v.shape[1:]
    if p.q is None or p.k is None:
        assert p.bias is not None
        s = p.bias.float().contiguous()
        kept = s.new_empty(batch, 0)
    else:
        s = kept = _scores(p.q.contiguous(), p.k.contiguous(), p.bias, p.scale)
    o = v.new_empty(batch, queries, width)
    lse = v.new_empty(batch, queries, dtype=torch.float32)
    each = queries // groups
    _pool(s, v, o, lse, (each, tokens, width), batch * groups)
    return o, lse, kept


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    (o, lse, kept), (grad, grad_lse) = outputs, grads
    d = delta(grad[:, None], None if grad_lse is None else grad_lse[:, None], o[:, None])
    g, v, lse = grad.to(p.v.dtype).contiguous(), p.v.contiguous(), lse.contiguous()
    source = p.bias if p.q is None else kept
    assert source is not None
    s = source.float().contiguous()
    batch, groups, tokens, width = v.shape
    each = s.shape[1] // groups
    found = {}
    if "v" in wanted:
        found["v"] = torch.empty_like(v)
        _spread(s, lse, g, found["v"], each * width, (each, tokens, width), 1.0, exp=True)
    if set(wanted) <= {"v"}:
        return found
    ds = torch.empty_like(s)
    options = _options(each)
    grid = triton.cdiv(tokens, TOKENS) * triton.cdiv(each, options["ROWS"]) * batch * groups
    slope_kernel[(grid,)](g, v, s, lse, d, ds, each, tokens, width, **options)
    if p.bias is not None and "bias" in wanted:
        found["bias"] = ds.to(p.bias.dtype)
    return found | _products(p, ds, lse, wanted)


def _products(p: Problem, ds: Tensor, lse: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
    """The gradients of queries and keys from the gradient of the scores."""
    found: dict[str, Tensor] = {}
    if p.q is None or p.k is None:
        return found
    q, k = p.q.contiguous(), p.k.contiguous()
    (batch, tokens, depth), queries = k.shape, q.shape[1]
    if "q" in wanted:
        dq = k.new_empty(batch, queries, depth, dtype=torch.float32)
        _pool(ds, k, dq, None, (queries, tokens, depth), batch, p.scale)
        found["q"] = dq.sum_to_size(q.shape).to(q.dtype)
    if "k" in wanted:
        found["k"], step = torch.empty_like(k), 0 if q.shape[0] == 1 else queries * depth
        _spread(ds, lse, q, found["k"], step, (queries, tokens, depth), p.scale, exp=False)
    return found


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    (batch, tokens, depth), queries = k.shape, q.shape[1]
    s = k.new_empty(batch, queries, tokens, dtype=torch.float32)
    options = _options(queries)
    grid = triton.cdiv(tokens, TOKENS) * triton.cdiv(queries, options["ROWS"]) * batch
    added = q if bias is None else bias.contiguous()
    step = 0 if q.shape[0] == 1 else queries * depth
    scores_kernel[(grid,)](
        q, k, added, s, step, queries, tokens, depth, scale, HAS_BIAS=bias is not None, **options
    )
    return s


def _pool(
    s: Tensor, v: Tensor, o: Tensor, lse: Tensor | None, sizes: Any, count: int, scale: float = 1.0
) -> None:
    options = _options(sizes[0])
    grid = triton.cdiv(sizes[2], WIDTH) * triton.cdiv(sizes[0], options["ROWS"]) * count
    target = s if lse is None else lse
    pool_kernel[(grid,)](s, v, o, target, *sizes, scale, SOFTMAX=lse is not None, **options)


def _spread(
    s: Tensor, lse: Tensor, x: Tensor, out: Tensor, step: int, sizes: Any, scale: float, exp: bool
) -> None:
    options = _options(sizes[0])
    count = out.numel() // (sizes[1] * sizes[2])
    grid = triton.cdiv(sizes[1], TOKENS) * triton.cdiv(sizes[2], WIDTH) * count
    spread_kernel[(grid,)](s, lse, x, out, step, *sizes, scale, EXP=exp, **options)


def _options(queries: int) -> dict[str, Any]:
    """The tile and launch options for a number of queries per group."""
    rows = 16 if queries <= 16 else 32
    return {
        "ROWS": rows, "COLUMNS": TOKENS, "BLOCK": WIDTH, "PRECISION": precision(),
        "num_warps": 8, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip


def compile_cases() -> Iterator[Case]:
    """Yield every kernel for 32 queries and 4,096 tokens of widths 768 and 1,536, in a batch of 8."""
    batch, queries, tokens = 8, 32, 4096
    kernels = {
        "scores": (scores_kernel, {"HAS_BIAS": True}),
        "pool": (pool_kernel, {"SOFTMAX": True}),
        "sum": (pool_kernel, {"SOFTMAX": False}),
        "slope": (slope_kernel, {}),
        "spread weights": (spread_kernel, {"EXP": True}),
        "spread": (spread_kernel, {"EXP": False}),
    }
    for name, dtype, width in product(kernels, ("bf16", "fp16", "fp32"), (768, 1536)):
        kernel, flags = kernels[name]
        size = 4 if dtype == "fp32" else 2
        matrix = 4 * queries * tokens
        written = 2 if name in ("scores", "slope") else 1  # scores with a bias, or with ds
        yield make_case(
            kernel,
            dtype,
            {**_options(queries), **flags},
            f"pooling {name} {dtype} D={width}",
            operations=2.0 * batch * queries * tokens * width,
            bytes=batch * (size * width * (tokens + queries) + written * matrix),
            wide=("s_ptr", "lse_ptr", "delta_ptr", "ds_ptr", "bias_ptr"),
        )
