"""Softmax pooling by matrix products over some images at a time.

Weights are written once and kept for the backward pass. The log-sum-exp comes from the largest of them:
PyTorch's ``logsumexp`` takes half as long as a product of the tokens on a CPU, and its ``exp`` is as slow
where weights underflow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xattn.kernels.softmax.reference import widen

CHUNK = 2**20  # scores of a chunk of images: 4 MB in float32
Part = slice


def forward(
    q: Tensor | None, k: Tensor | None, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse and the weights."""
    batch, queries, tokens = _sizes(q, v, bias)
    wide = widen(v).dtype
    o = v.new_empty(batch, queries, v.shape[3])
    lse = v.new_empty(batch, queries, dtype=wide)
    weights = v.new_empty(batch, queries, tokens, dtype=wide)
    for i in _chunks(batch, queries * tokens):
        added = None if bias is None else bias[i].to(wide)
        s = added if q is None or k is None else _scores(_of(q, i), k[i], added, scale)
        assert s is not None
        p = torch.softmax(s, -1, out=weights[i])
        largest, at = p.max(-1, keepdim=True)  # exp(its score - lse)
        top = s.gather(-1, at)
        if bias is not None:  # rows without a token are NaN where all scores are -inf
            empty = top.isneginf()
            p.masked_fill_(empty, 0.0)
            largest.masked_fill_(empty, 1.0)
        lse[i] = (top - largest.log())[..., 0]
        o[i] = _product(_groups(p, v), widen(v[i])).flatten(1, 2)
    return o, lse, weights


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    weights: Tensor,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    batch, queries, tokens = _sizes(q, v, bias)
    keyed = q is not None and k is not None
    dq = q.new_zeros(q.shape, dtype=lse.dtype) if q is not None and keyed and wanted[0] else None
    dk = k.new_empty(k.shape) if k is not None and keyed and wanted[1] else None
    dv = v.new_empty(v.shape) if wanted[2] else None
    db = bias.new_empty(bias.shape) if bias is not None and wanted[3] else None
    for i in _chunks(batch, queries * tokens):
        p, g = weights[i], widen(grad[i])
        if dv is not None:
            _product(_groups(p, v).transpose(2, 3), _groups(g, v), dv[i])
        if dq is None and dk is None and db is None:
            continue
        dp = _product(_groups(g, v), widen(v[i]).transpose(2, 3)).flatten(1, 2)
        # p o (dp - rowsum(p o dp)), in one pass
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        if grad_lse is not None:
            ds.addcmul_(p, grad_lse[i, :, None].to(p.dtype))
        if db is not None:
            db[i] = ds
        if q is None or k is None:
            continue
        if dq is not None:
            part = torch.bmm(ds, widen(k[i]))
            dq[_rows(dq, i)] += part.sum_to_size(dq[_rows(dq, i)].shape).mul_(scale)
        if dk is not None:
            turned, own = ds.transpose(1, 2)[:, None], widen(_of(q, i)) * scale
            _product(turned, own[:, None], dk[i][:, None])
    return None if dq is None or q is None else dq.to(q.dtype), dk, dv, db


def _sizes(q: Tensor | None, v: Tensor, bias: Tensor | None) -> tuple[int, int, int]:
    queries = q if q is not None else bias
    assert queries is not None
    return v.shape[0], queries.shape[1], v.shape[2]


def _chunks(batch: int, each: int) -> list[Part]:
    size = max(1, CHUNK // each)
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def _rows(x: Tensor, i: Part) -> Part:
    return slice(0, 1) if x.shape[0] == 1 else i


def _of(q: Tensor, i: Part) -> Tensor:
    """The queries of some images, all alike or not."""
    part = q[_rows(q, i)]
    return part.expand(i.stop - i.start, -1, -1)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """scale q k^T + bias."""
    q, keys = widen(q), widen(k).transpose(1, 2)
    if bias is None:
        return torch.bmm(q * scale, keys)  # the queries are few
    return torch.baddbmm(bias, q, keys, alpha=scale)


def _groups(x: Tensor, v: Tensor) -> Tensor:
    """(b, Q, ...) -> (b, G, Q / G, ...) for values (B, G, T, V)."""
    return x.unflatten(1, (v.shape[1], -1))


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b of (b, G, n, m) and (b, G, m, r); written into ``out`` without a copy where it has their type."""
    flat = a.flatten(0, 1), b.flatten(0, 1)
    if out is not None and out.dtype == a.dtype and out.is_contiguous():
        torch.bmm(*flat, out=out.flatten(0, 1))
        return out
    made = torch.bmm(*flat).unflatten(0, a.shape[:2])
    return made if out is None else out.copy_(made)
