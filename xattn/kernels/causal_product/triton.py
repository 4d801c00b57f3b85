"""Triton kernels of causal low-rank products: one for the sums before each chunk of tokens, and one for the
products.

    states    S_(c+1) = S_c + R_c^T X_c                a program per part of S, a loop over the chunks
    product   Y_c = tril(L_c R_c^T) X_c + L_c S_c      a program per chunk, a loop over the features

Sums are stored in float32, and products with these sums are computed in float32. Every output element is
written by one program, so two runs agree to the bit.
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
from xattn.kernels.backend import tile_entries
from xattn.kernels.causal_product.reference import Problem
from xattn.kernels.tiles import load_tile, place, precision, store_tile, tile_width


@triton.jit
def states_kernel(
    right_ptr, x_ptr, states_ptr, N, C, F, M,
    CHUNK: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(M, WIDTH)
    head, tile = place(parts * tl.cdiv(F, FEATURES))
    f = tile // parts * FEATURES + tl.arange(0, FEATURES)
    m = tile % parts * WIDTH + tl.arange(0, WIDTH)
    state = tl.zeros([FEATURES, WIDTH], tl.float32)
    for i in range(0, C):
        chunk = C - 1 - i if REVERSE else i
        store_tile(states_ptr + (head * C + chunk) * F * M, f, m, F, M, state)
        rows = chunk * CHUNK + tl.arange(0, CHUNK)
        right = load_tile(right_ptr + head * N * F, rows, f, N, F)
        x = load_tile(x_ptr + head * N * M, rows, m, N, M)
        state += tl.dot(tl.trans(right), x, input_precision=PRECISION)


@triton.jit
def product_kernel(
    left_ptr, right_ptr, x_ptr, states_ptr, out_ptr, N, C, F, M,
    CHUNK: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(M, WIDTH)
    head, tile = place(parts * C)
    chunk, lane = tile // parts, tl.arange(0, CHUNK)
    rows = chunk * CHUNK + lane
    m = tile % parts * WIDTH + tl.arange(0, WIDTH)
    a = tl.zeros([CHUNK, CHUNK], tl.float32)
    acc = tl.zeros([CHUNK, WIDTH], tl.float32)
    for start in range(0, F, FEATURES):
        f = start + tl.arange(0, FEATURES)
        left = load_tile(left_ptr + head * N * F, rows, f, N, F)
        right = load_tile(right_ptr + head * N * F, rows, f, N, F)
        state = load_tile(states_ptr + (head * C + chunk) * F * M, f, m, F, M)
        a += tl.dot(left, tl.trans(right), input_precision=PRECISION)
        acc += tl.dot(left.to(tl.float32), state, input_precision=PRECISION)
    later = lane[None, :] > lane[:, None]
    if REVERSE:
        later = lane[None, :] < lane[:, None]
    x = load_tile(x_ptr + head * N * M, rows, m, N, M).to(tl.float32)
    acc += tl.dot(tl.where(later, 0.0, a), x, input_precision=PRECISION)
    store_tile(out_ptr + head * N * M, rows, m, N, M, acc)


def forward(p: Problem) -> tuple[Tensor]:
    """Y (H, N, m)."""
    left, right, x = (t.contiguous() for t in (p.left, p.right, p.x))
    out, (n, f), m = torch.empty_like(x), left.shape[1:], x.shape[2]
    chosen = {**options(m), "REVERSE": p.reverse}
    chunks = triton.cdiv(n, chosen["CHUNK"])
    heads = max(1, tile_entries(x.device, 0) // (chunks * f * m))
    for a, b, c, y in zip(*(t.split(heads) for t in (left, right, x, out)), strict=True):
        states = c.new_empty(len(c), chunks, f, m, dtype=torch.float32)
        parts = len(c) * triton.cdiv(m, chosen["WIDTH"])
        states_kernel[(parts * triton.cdiv(f, chosen["FEATURES"]),)](
            b, c, states, n, chunks, f, m, **chosen
        )
        product_kernel[(parts * chunks,)](a, b, c, states, y, n, chunks, f, m, **chosen)
    return (out,)


def options(m: int) -> dict[str, Any]:
    """Tile and launch options for values of width m. They do not spill registers on sm_80 and sm_90 (see
    compile_cases) and were not timed on a GPU."""
    return {
        "CHUNK": 64, "FEATURES": 16, "WIDTH": min(32, tile_width(m)),
        "PRECISION": precision(), "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip


def compile_cases() -> Iterator[Case]:
    """Yield both kernels for 4,096 tokens and 12 heads; the number of features equals the width of the
    values."""
    n, heads = 4096, 12
    kernels = {"states": (states_kernel, 1, 2), "product": (product_kernel, 3, 4)}
    for name, dtype, d in product(kernels, DTYPES, WIDTHS):
        kernel, products, tensors = kernels[name]
        chosen, size = options(d), 4 if dtype == "fp32" else 2
        yield make_case(
            kernel,
            dtype,
            {**chosen, "REVERSE": False},
            f"causal_product {name} {dtype} D={d}",
            operations=2.0 * products * heads * n * d * d,
            bytes=heads * n * d * (tensors * size + 4.0 * d / chosen["CHUNK"]),
            wide=("states_ptr",),
        )
