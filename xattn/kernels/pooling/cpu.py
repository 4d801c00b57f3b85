"""Softmax pooling by matrix products over a few images at a time.

Weights are written once and kept for the backward pass. The log-sum-exp is computed from the largest
weight, because on a CPU PyTorch's ``logsumexp`` costs half the time of a matrix product with the tokens,
and so does its ``exp`` where weights underflow.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from xattn.kernels.backend import tile_entries
from xattn.kernels.pooling.reference import Problem
from xattn.kernels.softmax.reference import wide, widen

CHUNK = 2**20  # scores per chunk of images on a CPU: 4 MB in float32
Part = slice


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse and the weights."""
    (batch, queries, tokens), v, kind = p.sizes, p.v, wide(p.v.dtype)
    o = v.new_empty(batch, queries, v.shape[3])
    lse = v.new_empty(batch, queries, dtype=kind)
    weights = v.new_empty(batch, queries, tokens, dtype=kind)
    for i in _chunks(batch, queries * tokens, p.v.device):
        s = _scores(p, i)
        w = torch.softmax(s, -1, out=weights[i])
        largest, at = w.max(-1, keepdim=True)  # exp(its score - lse)
        top = s.gather(-1, at)
        if p.bias is not None:  # rows without a token are NaN where all scores are -inf
            empty = top.isneginf()
            w.masked_fill_(empty, 0.0)
            largest.masked_fill_(empty, 1.0)
        lse[i] = (top - largest.log())[..., 0]
        o[i] = _product(_groups(w, v), widen(v[i])).flatten(1, 2)
    return o, lse, weights


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    (batch, queries, tokens), (_, lse, weights) = p.sizes, outputs
    grad, grad_lse = grads
    found = {
        name: torch.empty_like(x, memory_format=torch.contiguous_format)
        for name, x in (("k", p.k), ("v", p.v), ("bias", p.bias))
        if x is not None and name in wanted
    }
    if p.q is not None and "q" in wanted:
        found["q"] = p.q.new_zeros(p.q.shape, dtype=lse.dtype)
    for i in _chunks(batch, queries * tokens, p.v.device):
        w, g = weights[i], widen(grad[i])
        if "v" in found:
            _product(_groups(w, p.v).transpose(2, 3), _groups(g, p.v), found["v"][i])
        if set(found) == {"v"}:
            continue
        dw = _product(_groups(g, p.v), widen(p.v[i]).transpose(2, 3)).flatten(1, 2)
        # p o (dp - rowsum(p o dp)), in one pass
        ds = torch.ops.aten._softmax_backward_data(dw, w, -1, w.dtype)
        if grad_lse is not None:
            ds.addcmul_(w, grad_lse[i, :, None].to(w.dtype))
        if "bias" in found:
            found["bias"][i] = ds
        if p.q is None or p.k is None:
            continue
        if "q" in found:
            own = found["q"][_rows(p.q, i)]
            own += torch.bmm(ds, widen(p.k[i])).sum_to_size(own.shape).mul_(p.scale)
        if "k" in found:
            turned, own = ds.transpose(1, 2)[:, None], widen(_of(p.q, i)) * p.scale
            _product(turned, own[:, None], found["k"][i][:, None])
    if p.q is not None and "q" in found:
        found["q"] = found["q"].to(p.q.dtype)
    return found


def _chunks(batch: int, each: int, device: torch.device) -> list[Part]:
    size = max(1, tile_entries(device, CHUNK) // each)
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def _rows(x: Tensor, i: Part) -> Part:
    return slice(0, 1) if x.shape[0] == 1 else i


def _of(q: Tensor, i: Part) -> Tensor:
    """Return the queries of some images, whether or not all images share them."""
    part = q[_rows(q, i)]
    return part.expand(i.stop - i.start, -1, -1)


def _scores(p: Problem, i: Part) -> Tensor:
    """scale q k^T + bias for some images."""
    bias = None if p.bias is None else p.bias[i].to(wide(p.v.dtype))
    if p.q is None or p.k is None:
        assert bias is not None
        return bias
    q, keys = widen(_of(p.q, i)), widen(p.k[i]).transpose(1, 2)
    if bias is None:
        return torch.bmm(q * p.scale, keys)  # there are only a few queries
    return torch.baddbmm(bias, q, keys, alpha=p.scale)


def _groups(x: Tensor, v: Tensor) -> Tensor:
    """(b, Q, ...) -> (b, G, Q / G, ...) for values (B, G, T, V)."""
    return x.unflatten(1, (v.shape[1], -1))


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b of (b, G, n, m) and (b, G, m, r), written to ``out``; no copy if it has the same type."""
    flat = a.flatten(0, 1), b.flatten(0, 1)
    if out is not None and out.dtype == a.dtype and out.is_contiguous():
        torch.bmm(*flat, out=out.flatten(0, 1))
        return out
    made = torch.bmm(*flat).unflatten(0, a.shape[:2])
    return made if out is None else out.copy_(made)
