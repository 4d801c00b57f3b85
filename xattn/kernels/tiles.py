"""Shared parts of Triton kernels: loading and storing tiles, lists of blocks, the softmax.

They are inlined where they are called. Scores are multiplied by log2 e, so that exp2 can be used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xattn.kernels.backend import on_device
from xattn.kernels.softmax.reference import row_by_row


@triton.jit
def place(tiles, LAST_FIRST: tl.constexpr = False):
    """The line (batch and head, int64) and the tile of this program; a line has ``tiles`` tiles.

    Lines and tiles share axis 0 of the grid, because CUDA limits the other axes to 65,535. The tiles of a
    line follow each other, so that they find its keys in the cache. With ``LAST_FIRST``, the last tile of a
    line comes first, because it has the most to do.
    """
    tile = tl.program_id(0) % tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return (tl.program_id(0) // tiles).to(tl.int64), tile


@triton.jit
def load_tile(base, rows, columns, count, width, stride=None, WHOLE: tl.constexpr = False):
    """A tile (rows, columns) of a (count, width) matrix, 0 outside; its rows are ``stride`` elements apart,
    by default directly one after the other. WHOLE means that no row of the tile is outside the matrix."""
    inside = columns[None, :] < width
    if not WHOLE:
        inside = inside & (rows[:, None] < count)
    step = width if stride is None else stride
    at = base + rows[:, None].to(tl.int64) * step + columns[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_tile(base, rows, columns, count, width, value):
    """Write a tile (rows, columns) of a contiguous (count, width) matrix."""
    inside = (rows[:, None] < count) & (columns[None, :] < width)
    at = base + rows[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_rows(base, rows, columns, width):
    """Read rows of a contiguous matrix, with 0 for row -1 and beyond the matrix's width."""
    at = base + rows[:, None].to(tl.int64) * width + columns[None, :]
    return tl.load(at, mask=(rows[:, None] >= 0) & (columns[None, :] < width), other=0.0)


@triton.jit
def store_rows(base, rows, columns, width, value):
    """Write rows of a contiguous matrix, except row -1."""
    at = base + rows[:, None].to(tl.int64) * width + columns[None, :]
    inside = (rows[:, None] >= 0) & (columns[None, :] < width)
    tl.store(at, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def list_tokens(blocks, start, count, limit, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Tokens of a list of ``count`` blocks, from lane ``start``; -1 where there is none."""
    lane = tl.arange(0, TILE)
    if BLOCK % TILE == 0:
        block = tl.load(blocks + start // BLOCK)
        token = block * BLOCK + start % BLOCK + lane
        return tl.where((block >= 0) & (token < limit), token, -1)
    else:
        entry = (start + lane) // BLOCK
        block = tl.load(blocks + entry, mask=entry < count, other=-1)
        token = block * BLOCK + (start + lane) % BLOCK
        return tl.where((block >= 0) & (token < limit), token, -1)


@triton.jit
def list_end(blocks, count):
    """Return the length of a list of ``count`` blocks without the entries of -1 at its end."""
    end = 0
    for start in range(0, count, 128):
        entry = start + tl.arange(0, 128)
        block = tl.load(blocks + entry, mask=entry < count, other=-1)
        end = tl.maximum(end, tl.max(tl.where(block >= 0, entry + 1, 0)))
    return end


@triton.jit
def list_part(pointer, unit, part, LENGTH):
    """Return where a part of the list of a ``unit`` begins, according to the pointers to the lists, and how
    many entries it has. It has at most LENGTH entries, and fewer or none if the list ends earlier."""
    begin = tl.load(pointer + unit) + part * LENGTH
    return begin, tl.minimum(tl.load(pointer + unit + 1) - begin, LENGTH)


@triton.jit
def own_rows(N, Q_BLOCK: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Return what a program works on if ``HEADS`` heads that share a list also share the rows of a tile.

    The results are the number of the program's first head among the heads of all images, its query block
    (int64), and two numbers for each row: the token of the row's query, and the query's distance from the
    first query of the first head. Both numbers are -1 if the row has no query.
    """
    tiles: tl.constexpr = (HEADS * Q_BLOCK + ROWS - 1) // ROWS
    line, tile = place((N + Q_BLOCK - 1) // Q_BLOCK * tiles)
    block, lane = tile // tiles, tile % tiles * ROWS + tl.arange(0, ROWS)
    token = block * Q_BLOCK + lane % Q_BLOCK
    real = (lane < HEADS * Q_BLOCK) & (token < N)
    row = tl.where(real, lane // Q_BLOCK * N + token, -1)
    return line * HEADS, block.to(tl.int64), tl.where(real, token, -1), row


@triton.jit
def softmax_step(s, v, top, total, acc, PRECISION: tl.constexpr):
    """Add the scores ``s`` (rows, keys) and values ``v`` of further keys to the running sums."""
    new = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - safe[:, None])
    keep = tl.exp2(top - safe)
    total = total * keep + tl.sum(p, 1)
    return new, total, acc * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)


@triton.jit
def softmax_end(top, total, acc):
    """The output and the log-sum-exp (in base e) of the running sums; they are 0 and -inf in rows without a
    key."""
    some = total > 0
    whole = tl.where(some, total, 1.0)
    lse = (top + tl.log2(whole)) * 0.6931471805599453
    return acc / whole[:, None], tl.where(some, lse, float("-inf"))


@triton.jit
def softmax_weights(s, lse):
    """exp(score - lse); 0 in rows without a key, whose lse is -inf."""
    seen = lse != float("-inf")
    p = tl.exp2(s - tl.where(seen, lse, 0.0) * 1.4426950408889634)
    return tl.where(seen, p, 0.0)


@triton.jit
def delta_kernel(
    g_ptr, o_ptr, minus_ptr, delta_ptr, stride_gb, stride_gh, stride_gn, H, N, D,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_MINUS: tl.constexpr,
):  # fmt: skip
    line, tile = place(tl.cdiv(N, ROWS))
    rows = tile * ROWS + tl.arange(0, ROWS)
    g_ptr += (line // H) * stride_gb + (line % H) * stride_gh
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        g = load_tile(g_ptr, rows, d, N, D, stride_gn).to(tl.float32)
        total += tl.sum(g * load_tile(o_ptr + line * N * D, rows, d, N, D).to(tl.float32), 1)
    if HAS_MINUS:
        total -= tl.load(minus_ptr + line * N + rows, mask=rows < N, other=0.0)
    tl.store(delta_ptr + line * N + rows, total, mask=rows < N)


DELTA = {"ROWS": 32, "BLOCK": 64, "num_warps": 4, "num_stages": 2}


def delta(grad: Tensor, grad_lse: Tensor | None, o: Tensor) -> Tensor:
    """rowsum(dO o O) - dlse, (B, H, N) in float32, in one pass over (B, H, N, Dv)."""
    grad, o = row_by_row(grad), o.contiguous()
    minus = o if grad_lse is None else grad_lse.contiguous()
    (batch, heads, n, width), d = o.shape, o.new_empty(o.shape[:3], dtype=torch.float32)
    delta_kernel[(triton.cdiv(n, DELTA["ROWS"]) * batch * heads,)](
        grad,
        o,
        minus,
        d,
        *grad.stride()[:3],
        heads,
        n,
        width,
        HAS_MINUS=grad_lse is not None,
        **DELTA,
    )
    return d


@triton.jit
def merge_kernel(
    o_ptr, lse_ptr, own_ptr, own_lse_ptr, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    lse = tl.load(lse_ptr + rows, mask=inside, other=float("-inf"))
    own_lse = tl.load(own_lse_ptr + rows, mask=inside, other=float("-inf"))
    top = tl.maximum(lse, own_lse)
    top = tl.where(top == float("-inf"), 0.0, top)
    first, second = tl.exp(lse - top), tl.exp(own_lse - top)
    total = first + second
    whole = tl.where(total > 0, total, 1.0)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        o = load_tile(o_ptr, rows, d, N, D).to(tl.float32) * (first / whole)[:, None]
        own = load_tile(own_ptr, rows, d, N, D).to(tl.float32) * (second / whole)[:, None]
        store_tile(o_ptr, rows, d, N, D, o + own)
    some = tl.where(total > 0, top + tl.log(whole), float("-inf"))
    tl.store(lse_ptr + rows, some, mask=inside)


MERGE = {"ROWS": 32, "BLOCK": 64, "num_warps": 4, "num_stages": 2}


def merge(o: Tensor, lse: Tensor, own: Tensor, own_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two parts of a softmax, given their contiguous outputs (..., D) and log-sum-exps, in the memory
    of the first."""
    n, width = lse.numel(), o.shape[-1]
    with on_device(o):
        merge_kernel[(triton.cdiv(n, MERGE["ROWS"]),)](o, lse, own, own_lse, n, width, **MERGE)
    return o, lse


def precision() -> str:
    """How kernels multiply float32: as three TF32 products, which are nearly as exact as the float32 units
    and several times faster, or as a single one if PyTorch's own products may use TF32."""
    matmul = torch.backends.cuda.matmul
    found = getattr(matmul, "fp32_precision", None)  # not before PyTorch 2.9
    single = matmul.allow_tf32 if found is None else found == "tf32"
    return "tf32" if single else "tf32x3"


def batch_strides(x: Tensor, axes: int = 2) -> tuple[int, ...]:
    """Strides over the first ``axes``, which are batch and heads; 0 if a single entry is used for all."""
    both = zip(x.shape[:axes], x.stride()[:axes], strict=True)
    return tuple(0 if size == 1 else step for size, step in both)


def tile_width(width: int) -> int:
    """The width of a tile: a power of two of at least 16."""
    return max(16, triton.next_power_of_2(width))
