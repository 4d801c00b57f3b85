"""Softplus attention by tiles of rows, in place: plain PyTorch on every device.

A tile holds the scores of a few rows with all keys, so they are computed once and stay in the cache for
both sweeps. No N x S matrix is stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.backend import tile_entries
from xattn.kernels.softplus.reference import (
    Problem,
    Rows,
    empty_outputs,
    is_plain,
    levels,
    norms,
    rows_of,
)

TILE = 2**20  # scores in a tile: 4 MB in float32; with 1 MB, sleeping threads are woken too often
ROWS = 128  # most rows of a tile
LARGE = 80.0  # scores below it have a finite exponential


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    o, statistics = empty_outputs(p)
    buffer = p.q.new_empty(0)
    given = [x.flatten(0, 1) for x in (p.q, _by_column(p.k), p.v, o, statistics)]
    for at, i, j, rows in _tiles(p):
        q, k, v, y, kept = (x[at] for x in given)
        a = _softplus(p, q[:, i], k[:, j], rows, i.start, buffer)
        total, top = a.sum(-1, keepdim=True), a.amax(-1, keepdim=True)
        mean, inverse = levels(p, rows, total, top)
        r = a.mul_(inverse) if is_plain(p) else _relative(p, a, mean, inverse)
        t = _power(r, p.power)
        norm, damped = norms(p, rows, total, inverse, t.sum(-1, keepdim=True))
        y[:, i] = (t @ v[:, j].to(t.dtype)).mul_(norm).to(y.dtype)
        kept[:, :, i] = torch.stack([x[..., 0] for x in (mean, inverse, norm, damped)], 1)
    return o, statistics


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    dtype = p.q.dtype
    found = {
        "q": p.q.new_empty(p.q.shape),
        "k": p.k.new_zeros(p.k.shape),
        "v": p.v.new_zeros(p.v.shape, dtype=dtype),
    }
    scores = "q" in wanted or "k" in wanted
    buffers = [p.q.new_empty(0) for _ in range(4)]
    given = [
        x.flatten(0, 1) for x in (p.q, _by_column(p.k), p.v, grads[0], *outputs, *found.values())
    ]
    for at, i, j, rows in _tiles(p):
        q, k, v, g, o, kept, dq, dk, dv = (x[at] for x in given)
        q, k, v, g, o = q[:, i], k[:, j], v[:, j].to(dtype), g[:, i].to(dtype), o[:, i].to(dtype)
        mean, inverse, norm, damped = kept[:, :, i].unsqueeze(-1).unbind(1)
        a = _softplus(p, q, k, rows, i.start, buffers[0])
        r = _relative(p, _like(a, buffers[1]).copy_(a), mean, inverse)
        less = _like(a, buffers[2])
        if p.power == 1:
            torch.gt(r, 0, out=less)
        else:
            _power(less.copy_(r), p.power - 1)
        if "v" in wanted:
            dv[:, j].baddbmm_(r.mul_(less).transpose(1, 2), g * norm)
        if not scores:
            continue
        inner = (g * o).sum(-1, keepdim=True)
        h = torch.bmm(g, v.transpose(1, 2), out=_like(a, buffers[3])).sub_(inner).mul_(less)
        h.mul_(p.power * norm * inverse)
        share = torch.where(mean > 0, rows.offset / rows.keys, 0.0)
        h.sub_(share * h.sum(-1, keepdim=True) + damped * inner)
        ds = h.mul_(a.neg_().expm1_()).mul_(-rows.tau)  # 0 at hidden keys, where a is 0
        dq[:, i] = ds @ k
        dk[:, j].baddbmm_(ds.transpose(1, 2), q)
    return found


def _tiles(p: Problem) -> Iterator[tuple[slice, slice, slice, Rows]]:
    """Tiles: heads of all images, rows, the keys that they see, and facts about the rows."""
    batch, heads, n, _ = p.q.shape
    s = p.k.shape[2]
    entries = tile_entries(p.q.device, TILE)
    size = max(1, min(n, ROWS if p.q.is_cpu else n, entries // s))
    many = max(1, entries // (size * s))
    every = rows_of(p, torch.arange(n, device=p.q.device))
    for head in range(0, batch * heads, many):
        for start in range(0, n, size):
            i = slice(start, min(start + size, n))
            rows = Rows(*(x[i] for x in every))
            yield slice(head, head + many), i, slice(0, i.stop if p.causal else s), rows


def _by_column(k: Tensor) -> Tensor:
    """k with its transpose stored row by row, which makes products with few queries faster."""
    return k.transpose(2, 3).contiguous().transpose(2, 3)


def _softplus(p: Problem, q: Tensor, k: Tensor, rows: Rows, first: int, buffer: Tensor) -> Tensor:
    """a of a tile, 0 at hidden keys, in the memory of ``buffer``."""
    out = _shaped(buffer, (q.shape[0], q.shape[1], k.shape[1]))
    torch.bmm(q * rows.tau, k.transpose(1, 2), out=out)
    if p.causal:
        out.tril_(first)  # 0 at hidden keys, which lowers no maximum below 0
    least, most = out.amax(-1).aminmax()
    if out.is_cpu and least >= 0 and most <= LARGE:
        out.exp_().add_(1).log_()  # rounded to eps, which is nothing beside the maximum of the row
    else:
        out.copy_(F.softplus(out, threshold=40.0))
    return out.tril_(first) if p.causal else out


def _relative(p: Problem, a: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """r of a tile, in place; 0 if r^p would be a subnormal number, which is slow to multiply."""
    least = 1.01 * float(torch.finfo(a.dtype).tiny ** (1 / p.power))
    return F.threshold(a.sub_(mean).mul_(inverse), least, 0.0, inplace=True)


def _power(r: Tensor, power: int) -> Tensor:
    """r^power by squaring, in place; :func:`_relative` makes sure that no result is subnormal."""
    odd = None
    while power > 1:
        if power % 2:
            odd = r.clone() if odd is None else odd.mul_(r)
        r, power = r.mul_(r), power // 2
    return r if odd is None else r.mul_(odd)


def _like(a: Tensor, buffer: Tensor) -> Tensor:
    return _shaped(buffer, a.shape)


def _shaped(buffer: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The first elements of ``buffer`` in this shape; the buffer grows if it is too small."""
    size = torch.Size(shape).numel()
    if buffer.numel() < size:
        buffer.resize_(size)
    return buffer[:size].view(shape)
