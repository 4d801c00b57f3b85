"""Causal low-rank products chunk by chunk, with the sum over all earlier chunks carried along.

    Y_c = tril(L_c R_c^T) X_c + L_c S_c,   S_(c+1) = S_c + R_c^T X_c

Plain PyTorch on every device. With chunks of c tokens, a token costs c (f + m) + 2 f m multiplications,
compared with 2 f m for the bidirectional L (R^T X), so chunks are short. Many chunks of several heads are
multiplied at once: on a CPU as many as fit its cache, on a GPU as many as fit its memory. Each tensor
is copied to a buffer once, at least as float32, so strides and the padding of the last chunk cause no
further cost.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from xattn.kernels.backend import tile_entries
from xattn.kernels.causal_product.reference import Problem
from xattn.kernels.softmax.reference import widen

CHUNK = 32  # tokens
STEPS = 16  # chunks of one head multiplied at once
BATCH = 96  # chunks of all heads multiplied at once


def forward(p: Problem) -> tuple[Tensor]:
    """Y (H, N, m)."""
    out = torch.empty_like(p.x, memory_format=torch.contiguous_format)
    f, m = p.left.shape[2], p.x.shape[2]
    # Of a chunk: copies and products, its own sum, the sum before it.
    entries = CHUNK * (2 * f + 2 * m + CHUNK) + 2 * f * m
    batch = max(1, tile_entries(p.x.device, BATCH * entries) // entries)
    steps = min(-(-p.x.shape[1] // CHUNK), STEPS if p.x.is_cpu else batch)
    heads = max(1, batch // steps)
    parts = [t.split(heads) for t in (p.left, p.right, p.x, out)]
    for a, b, c, y in zip(*parts, strict=True):
        _scan(a, b, c, y, steps * CHUNK, p.reverse)
    return (out,)


def _scan(left: Tensor, right: Tensor, x: Tensor, out: Tensor, span: int, reverse: bool) -> None:
    """Fill ``out`` for a few heads, ``span`` tokens at a time, from the end if ``reverse``."""
    heads, tokens, m = x.shape
    carried = widen(x).new_zeros(heads, left.shape[2], m)
    buffers = [widen(t[:, :0]).new_empty(heads, span, t.shape[2]) for t in (left, right, x)]
    starts = range(0, tokens, span)
    for start in reversed(starts) if reverse else starts:
        count = min(span, tokens - start)
        a, b, c = (
            _chunks(t[:, start : start + count], buffer)
            for t, buffer in zip((left, right, x), buffers, strict=True)
        )
        inside = a @ b.transpose(1, 2)
        y = (inside.triu_() if reverse else inside.tril_()) @ c
        sums = (b.transpose(1, 2) @ c).unflatten(0, (heads, -1))
        before, carried = _running_sums(sums, carried, reverse)
        y.baddbmm_(a, before.flatten(0, 1))
        out[:, start : start + count] = y.view(heads, -1, m)[:, :count]


def _chunks(x: Tensor, buffer: Tensor) -> Tensor:
    """x (H, n, w), copied into the buffer and padded with zeros, as (H chunks, CHUNK, w)."""
    heads, tokens, width = x.shape
    size = -(-tokens // CHUNK) * CHUNK
    if size < buffer.shape[1]:
        buffer = buffer.new_empty(heads, size, width)
    buffer[:, :tokens] = x
    buffer[:, tokens:] = 0
    return buffer.view(-1, CHUNK, width)


def _running_sums(sums: Tensor, carried: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Sums over all earlier chunks (later chunks if ``reverse``), shaped like ``sums``, and the total
    over all chunks.

    A loop of additions: at these shapes ``torch.cumsum`` takes ten times as long on a CPU.
    """
    if not sums.is_cpu:
        return cumulative_sums(sums, carried, reverse)
    before = torch.empty_like(sums)
    own, total = sums.unbind(1), before.unbind(1)
    order = list(range(len(own)))[:: -1 if reverse else 1]
    total[order[0]].copy_(carried)
    for last, i in pairwise(order):
        torch.add(total[last], own[last], out=total[i])
    return before, total[order[-1]] + own[order[-1]]


def cumulative_sums(sums: Tensor, carried: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Like :func:`_running_sums`, with few kernel launches."""
    total = torch.cat([carried[:, None], sums.flip(1) if reverse else sums], 1).cumsum(1)
    before = total[:, :-1]
    return before.flip(1) if reverse else before, total[:, -1]
