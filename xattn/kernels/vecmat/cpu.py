"""Row vectors times attention, tile by tile. The forward pass reuses its buffers; the backward pass also
serves the other fast paths.

Scale and log-sum-exp are part of the product, P = exp([scale q, -lse] [k, 1]^T), so a tile takes one matrix
product and one exponential in place.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from itertools import product

import torch
from torch import Tensor

from xattn.kernels.backend import tile_entries
from xattn.kernels.softmax.reference import per_key_head, per_query_head, widen
from xattn.kernels.vecmat.reference import Problem

QUERIES, KEYS = 1024, 512  # per tile on a CPU: 2 MB in float32, which stay in the cache
HIDDEN = -1e30  # instead of -lse in a row without a key: exp gives 0, and inf - inf never occurs

Index = tuple[slice, slice, slice]


def forward(p: Problem) -> tuple[Tensor]:
    p = _each_head(p)
    out = p.r.new_zeros(*p.q.shape[:2], p.r.shape[2], p.k.shape[2])
    v, g = (None if x is None else widen(x) for x in (p.v, p.grad))
    buffer = p.r.new_empty(math.prod(_extent(p))) if g is not None else None
    for i, j, w in _tiles(p):
        if v is not None and g is not None and buffer is not None:
            dots = buffer[: w.numel()].view(w.shape)
            _product(g[i], v[j], dots)
            w.mul_(dots.relu_())
        images, heads, columns = j
        out[images, heads, :, columns] += p.r[images, heads, :, i[2]] @ w
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
        images, heads, rows = i
        columns = j[2]
        dw = p.r[images, heads, :, rows].mT @ dout[images, heads, :, columns]
        w = a
        if v is not None and g is not None:
            dots = g[i] @ v[j].mT
            dproduct = torch.where(dots > 0, dw * a, 0.0)
            found["grad"][i] += dproduct @ v[j]
            found["v"][j] += dproduct.mT @ g[i]
            w = a * dots.relu_()
        found["r"][images, heads, :, rows] += dout[images, heads, :, columns] @ w.mT
        ds = dw.mul_(w)
        found["q"][i] += ds @ k[j]
        found["k"][j] += ds.mT @ q[i]
        found["lse"][i] -= ds.sum(-1)
        if bias_grad:
            part = _part(found["bias"], images, heads, rows, columns)
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
    """(images, heads, rows), (images, heads, columns) and P there; all tiles share one buffer for P."""
    minus = torch.where(p.lse.isneginf(), HIDDEN, -p.lse)[..., None].to(p.lse.dtype)
    left = torch.cat([widen(p.q) * p.scale, minus], -1)
    right = torch.cat([widen(p.k), torch.ones_like(p.k[..., :1], dtype=p.lse.dtype)], -1)
    images, group, queries, keys = _extent(p)
    buffer = p.lse.new_empty(images * group * queries * keys)
    (batch, heads, n), s = p.q.shape[:3], p.k.shape[2]
    for b, h, start in product(range(0, batch, images), range(0, heads, group), range(0, s, keys)):
        bs, hs = slice(b, min(b + images, batch)), slice(h, min(h + group, heads))
        j = (bs, hs, slice(start, min(start + keys, s)))
        for first in range(start if p.causal else 0, n, queries):
            i = (bs, hs, slice(first, min(first + queries, n)))
            x, y = left[i], right[j]
            a = buffer[: x[..., 0].numel() * y.shape[2]].view(*x.shape[:3], y.shape[2])
            _product(x, y, a)
            if p.bias is not None:
                a += _part(p.bias, bs, hs, i[2], j[2])
            a.exp_()
            yield i, j, a.tril_(first - start) if p.causal else a


def _product(x: Tensor, y: Tensor, out: Tensor) -> None:
    """x y^T of several images' heads, into ``out``."""
    torch.bmm(x.flatten(0, 1), y.flatten(0, 1).mT, out=out.flatten(0, 1))


def _extent(p: Problem) -> tuple[int, int, int, int]:
    """The images, heads, queries and keys of a tile; an outer dimension exceeds 1 only if the inner ones
    are complete."""
    (batch, heads, n), s = p.q.shape[:3], p.k.shape[2]
    if p.q.is_cpu:
        queries, keys = min(n, QUERIES), min(s, KEYS)
        return 1, max(1, min(heads, QUERIES * KEYS // (queries * keys))), queries, keys
    entries = tile_entries(p.q.device, QUERIES * KEYS)
    keys = min(s, entries)
    queries = min(n, max(1, entries // keys))
    group = min(heads, max(1, entries // (queries * keys)))
    return min(batch, max(1, entries // (group * queries * keys))), group, queries, keys


def _part(bias: Tensor, images: slice, heads: slice, rows: slice, columns: slice) -> Tensor:
    """The bias of a tile, broadcast or not: (images or 1, heads or 1, rows or 1, columns)."""
    whole = slice(None)
    return bias[
        images if bias.shape[0] > 1 else whole,
        heads if bias.shape[1] > 1 else whole,
        rows if bias.shape[2] > 1 else whole,
        columns,
    ]
