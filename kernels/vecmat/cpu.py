"""Row vectors times attention, tile by tile: a forward in reused buffers, and the backward of all fast
paths.

Scale and log-sum-exp are part of the product, P = exp([scale q, -lse] [k, 1]^T), so a tile takes one
matrix product and one exponential in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xattn.kernels.softmax.reference import per_key_head, per_query_head, widen

QUERIES, KEYS = 1024, 512  # per tile: 2 MB in float32, which stay in the cache
HIDDEN = -1e30  # instead of -lse in a row without a key: exp gives 0, and inf - inf never occurs

Index = tuple[int, slice, slice]


def forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    r: Tensor,
    v: Tensor | None,
    g: Tensor | None,
    bias: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    k, v = per_query_head(k, q), None if v is None else per_query_head(v, q)
    out = r.new_zeros(*q.shape[:2], r.shape[2], k.shape[2])
    v, g = (None if x is None else widen(x) for x in (v, g))
    buffer = r.new_empty(_size(q, k)) if g is not None else None
    for i, j, p in _tiles(q, k, lse, bias, scale, causal):
        if v is not None and g is not None and buffer is not None:
            product = buffer[: p.numel()].view(p.shape)
            torch.bmm(g[i], v[j].transpose(1, 2), out=product)
            p.mul_(product.relu_())
        b, heads, columns = j
        out[b, heads, :, columns] += r[b, heads, :, i[2]] @ p
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    r: Tensor,
    v: Tensor | None,
    g: Tensor | None,
    bias: Tensor | None,
    scale: float,
    causal: bool,
    bias_grad: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, lse, r, v, g and bias; None for those that are None."""
    qw, kw = widen(q), widen(per_query_head(k, q))
    vw, gw = (None if x is None else widen(per_query_head(x, q)) for x in (v, g))
    dq, dk, dlse, dr = (torch.zeros_like(x) for x in (qw, kw, lse, r))
    dv, dg = (None if x is None else torch.zeros_like(x) for x in (vw, gw))
    db = torch.zeros_like(widen(bias)) if bias_grad and bias is not None else None
    for i, j, p in _tiles(q, kw, lse, bias, scale, causal):
        b, heads, rows = i
        columns = j[2]
        dw = r[b, heads, :, rows].transpose(1, 2) @ grad[b, heads, :, columns]
        w = p
        if vw is not None and gw is not None and dv is not None and dg is not None:
            product = gw[i] @ vw[j].transpose(1, 2)
            dproduct = torch.where(product > 0, dw * p, 0.0)
            dg[i] += dproduct @ vw[j]
            dv[j] += dproduct.transpose(1, 2) @ gw[i]
            w = p * product.relu_()
        dr[b, heads, :, rows] += grad[b, heads, :, columns] @ w.transpose(1, 2)
        ds = dw.mul_(w)
        dq[i] += ds @ kw[j]
        dk[j] += ds.transpose(1, 2) @ qw[i]
        dlse[i] -= ds.sum(-1)
        if db is not None:
            part = _part(db, b, heads, rows, columns)
            part += ds.sum_to_size(part.shape)
    dq, dk = (dq * scale).to(q.dtype), per_key_head(dk * scale, k)
    dv = None if dv is None or v is None else per_key_head(dv, v)
    dg, db = (None if d is None or x is None else d.to(x.dtype) for d, x in ((dg, g), (db, bias)))
    return dq, dk, dlse, dr, dv, dg, db


def _tiles(
    q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None, scale: float, causal: bool
) -> Iterator[tuple[Index, Index, Tensor]]:
    """(batch, heads, rows), (batch, heads, columns) and P there; all tiles share one buffer for P."""
    minus = torch.where(lse.isneginf(), HIDDEN, -lse)[..., None].to(lse.dtype)
    left = torch.cat([widen(q) * scale, minus], -1)
    right = torch.cat([widen(k), torch.ones_like(k[..., :1], dtype=lse.dtype)], -1)
    buffer = lse.new_empty(_size(q, k))
    (batch, heads, n), s = q.shape[:3], k.shape[2]
    group = _group(q, k)
    for b in range(batch):
        for h in range(0, heads, group):
            hs = slice(h, min(h + group, heads))
            for start in range(0, s, KEYS):
                j = (b, hs, slice(start, min(start + KEYS, s)))
                for first in range(start if causal else 0, n, QUERIES):
                    i = (b, hs, slice(first, min(first + QUERIES, n)))
                    a, c = left[i], right[j].transpose(1, 2)
                    shape = (a.shape[0], a.shape[1], c.shape[2])
                    p = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
                    torch.bmm(a, c, out=p)
                    if bias is not None:
                        p += _part(bias, b, hs, i[2], j[2])
                    p.exp_()
                    yield i, j, p.tril_(first - start) if causal else p


def _group(q: Tensor, k: Tensor) -> int:
    """Heads per tile: several if there are few tokens."""
    tile = min(q.shape[2], QUERIES) * min(k.shape[2], KEYS)
    return max(1, min(q.shape[1], QUERIES * KEYS // tile))


def _size(q: Tensor, k: Tensor) -> int:
    return _group(q, k) * min(q.shape[2], QUERIES) * min(k.shape[2], KEYS)


def _part(bias: Tensor, b: int, heads: slice, rows: slice, columns: slice) -> Tensor:
    """The bias of a tile, broadcast or not: (heads or 1, rows or 1, columns)."""
    whole = slice(None)
    return bias[
        b if bias.shape[0] > 1 else 0,
        heads if bias.shape[1] > 1 else whole,
        rows if bias.shape[2] > 1 else whole,
        columns,
    ]
