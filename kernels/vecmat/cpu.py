"""Row vectors times attention, tile by tile: a forward in reused buffers, and the backward of all fast
paths.

Scale and log-sum-exp are part of the product, P = exp([scale q, -lse] [k, 1]^T), so a tile takes one
matrix product and one exponential in place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from xattn.kernels.softmax.reference import per_key_head, per_query_head, widen
from xattn.kernels.vecmat.reference import Problem

QUERIES, KEYS = 1024, 512  # per tile: 2 MB in float32, which stay in the cache
HIDDEN = -1e30  # instead of -lse in a row without a key: exp gives 0, and inf - inf never occurs

Index = tuple[int, slice, slice]


def forward(p: Problem) -> tuple[Tensor]:
    p = _each_head(p)
    out = p.r.new_zeros(*p.q.shape[:2], p.r.shape[2], p.k.shape[2])
    v, g = (None if x is None else widen(x) for x in (p.v, p.grad))
    buffer = p.r.new_empty(_size(p)) if g is not None else None
    for i, j, w in _tiles(p):
        if v is not None and g is not None and buffer is not None:
            product = buffer[: w.numel()].view(w.shape)
            torch.bmm(g[i], v[j].transpose(1, 2), out=product)
            w.mul_(product.relu_())
        b, heads, columns = j
        out[b, heads, :, columns] += p.r[b, heads, :, i[2]] @ w
    return (out,)


def backward(
    p: Problem, outputs: tuple[Tensor], grads: tuple[Tensor], wanted: Collection[str]
) -> dict[str, Tensor]:
    own, dout, bias_grad = _each_head(p), grads[0], p.bias is not None and "bias" in wanted
    q, k = widen(own.q), widen(own.k)
    v, g = (None if x is None else widen(x) for x in (own.v, own.grad))
    found = {"q": torch.zeros_like(q), "k": torch.zeros_like(k)}
    found |= {name: torch.zeros_like(x) for name, x in (("lse", p.lse), ("r", p.r))}
    found |= {name: torch.zeros_like(x) for name, x in (("v", v), ("grad", g)) if x is not None}
    if p.bias is not None and bias_grad:
        found["bias"] = torch.zeros_like(widen(p.bias))
    for i, j, a in _tiles(own):
        b, heads, rows = i
        columns = j[2]
        dw = p.r[b, heads, :, rows].transpose(1, 2) @ dout[b, heads, :, columns]
        w = a
        if v is not None and g is not None:
            product = g[i] @ v[j].transpose(1, 2)
            dproduct = torch.where(product > 0, dw * a, 0.0)
            found["grad"][i] += dproduct @ v[j]
            found["v"][j] += dproduct.transpose(1, 2) @ g[i]
            w = a * product.relu_()
        found["r"][b, heads, :, rows] += dout[b, heads, :, columns] @ w.transpose(1, 2)
        ds = dw.mul_(w)
        found["q"][i] += ds @ k[j]
        found["k"][j] += ds.transpose(1, 2) @ q[i]
        found["lse"][i] -= ds.sum(-1)
        if bias_grad:
            part = _part(found["bias"], b, heads, rows, columns)
            part += ds.sum_to_size(part.shape)
    found["q"] *= p.scale
    found["k"] *= p.scale
    return {name: _as_given(x, getattr(p, name), name) for name, x in found.items()}


def _as_given(grad: Tensor, x: Tensor, name: str) -> Tensor:
    return per_key_head(grad, x) if name in ("k", "v") else grad.to(x.dtype)


def _each_head(p: Problem) -> Problem:
    """The same problem with keys and values for every query head."""
    if p.k.shape[1] == p.q.shape[1]:
        return p
    v = None if p.v is None else per_query_head(p.v, p.q)
    return p._replace(k=per_query_head(p.k, p.q), v=v)


def _tiles(p: Problem) -> Iterator[tuple[Index, Index, Tensor]]:
    """(batch, heads, rows), (batch, heads, columns) and P there; all tiles share one buffer for P."""
    minus = torch.where(p.lse.isneginf(), HIDDEN, -p.lse)[..., None].to(p.lse.dtype)
    left = torch.cat([widen(p.q) * p.scale, minus], -1)
    right = torch.cat([widen(p.k), torch.ones_like(p.k[..., :1], dtype=p.lse.dtype)], -1)
    buffer = p.lse.new_empty(_size(p))
    (batch, heads, n), s = p.q.shape[:3], p.k.shape[2]
    group = _group(p)
    for b in range(batch):
        for h in range(0, heads, group):
            hs = slice(h, min(h + group, heads))
            for start in range(0, s, KEYS):
                j = (b, hs, slice(start, min(start + KEYS, s)))
                for first in range(start if p.causal else 0, n, QUERIES):
                    i = (b, hs, slice(first, min(first + QUERIES, n)))
                    x, y = left[i], right[j].transpose(1, 2)
                    shape = (x.shape[0], x.shape[1], y.shape[2])
                    a = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
                    torch.bmm(x, y, out=a)
                    if p.bias is not None:
                        a += _part(p.bias, b, hs, i[2], j[2])
                    a.exp_()
                    yield i, j, a.tril_(first - start) if p.causal else a


def _group(p: Problem) -> int:
    """Heads per tile: several if there are few tokens."""
    tile = min(p.q.shape[2], QUERIES) * min(p.k.shape[2], KEYS)
    return max(1, min(p.q.shape[1], QUERIES * KEYS // tile))


def _size(p: Problem) -> int:
    return _group(p) * min(p.q.shape[2], QUERIES) * min(p.k.shape[2], KEYS)


def _part(bias: Tensor, b: int, heads: slice, rows: slice, columns: slice) -> Tensor:
    """The bias of a tile, broadcast or not: (heads or 1, rows or 1, columns)."""
    whole = slice(None)
    return bias[
        b if bias.shape[0] > 1 else 0,
        heads if bias.shape[1] > 1 else whole,
        rows if bias.shape[2] > 1 else whole,
        columns,
    ]
