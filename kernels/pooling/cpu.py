"""Softmax pooling by matrix products over a few images at a time.

Scores are written once and kept for the backward pass; weights and their gradients live in buffers of
at most ``CHUNK`` entries. Weights come from ``softmax`` and the log-sum-exp from the largest of them:
PyTorch's ``logsumexp`` takes half as long as a product of the tokens, and its ``exp`` is as slow where
weights underflow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xattn.kernels.softmax.reference import delta, widen

CHUNK = 2**20  # scores of a chunk of images: 4 MB in float32
Part = slice


def forward(
    q: Tensor | None, k: Tensor | None, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, tokens = _sizes(q, v, bias)
    wide = widen(v).dtype
    o = v.new_empty(batch, queries, v.shape[3])
    lse = v.new_empty(batch, queries, dtype=wide)
    kept = v.new_empty((batch, queries, tokens) if q is not None else 0, dtype=wide)
    for i in _chunks(batch, queries * tokens):
        if q is None or k is None:
            assert bias is not None
            s = bias[i].to(wide)
        else:
            s = _scores(_of(q, i), k[i], None if bias is None else bias[i], scale, kept[i])
        top = s.amax(-1, keepdim=True)
        p = s.softmax(-1)
        largest = p.amax(-1, keepdim=True)  # exp(top - lse)
        if bias is not None:  # rows without a token
            empty = top.isneginf()
            p.masked_fill_(empty, 0.0)
            largest.masked_fill_(empty, 1.0)
        lse[i] = (top - largest.log())[..., 0]
        o[i] = _grouped(p, widen(v[i]))
    return o, lse, kept


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    kept: Tensor,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    batch, queries, tokens = _sizes(q, v, bias)
    d = delta(grad, grad_lse, o)[..., None]
    empty = lse.isneginf()[..., None]
    keyed = q is not None and k is not None
    dq = q.new_zeros(q.shape, dtype=lse.dtype) if q is not None and keyed and wanted[0] else None
    dk = k.new_empty(k.shape) if k is not None and keyed and wanted[1] else None
    dv = v.new_empty(v.shape) if wanted[2] else None
    db = bias.new_empty(bias.shape) if bias is not None and wanted[3] else None
    source = kept if keyed else bias
    assert source is not None
    for i in _chunks(batch, queries * tokens):
        p = source[i].to(lse.dtype).softmax(-1)
        if bias is not None:
            p.masked_fill_(empty[i], 0.0)
        g = widen(grad[i])
        if dv is not None:
            _into(dv[i], _groups(p, v).transpose(2, 3), _groups(g, v))
        if dq is None and dk is None and db is None:
            continue
        ds = _groups(g, v) @ widen(v[i]).transpose(2, 3)
        ds = ds.flatten(1, 2).sub_(d[i]).mul_(p)
        if db is not None:
            db[i] = ds
        if q is None or k is None:
            continue
        if dq is not None:
            part = ds @ widen(k[i])
            dq[_rows(dq, i)] += part.sum_to_size(dq[_rows(dq, i)].shape).mul_(scale)
        if dk is not None:
            _into(dk[i], ds.transpose(1, 2), widen(_of(q, i)) * scale)
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


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, out: Tensor) -> Tensor:
    """scale q k^T + bias, written into ``out``."""
    if bias is None:
        torch.baddbmm(out, widen(q), widen(k).transpose(1, 2), beta=0, alpha=scale, out=out)
    else:
        added = bias.to(out.dtype)
        torch.baddbmm(added, widen(q), widen(k).transpose(1, 2), alpha=scale, out=out)
    return out


def _groups(x: Tensor, v: Tensor) -> Tensor:
    """(b, Q, ...) -> (b, G, Q / G, ...) for values (B, G, T, V)."""
    return x.unflatten(1, (v.shape[1], -1))


def _grouped(p: Tensor, v: Tensor) -> Tensor:
    """p v of a chunk: (b, Q, T), (b, G, T, V) -> (b, Q, V)."""
    if v.shape[1] == 1:
        return torch.bmm(p, v[:, 0])
    return (_groups(p, v) @ v).flatten(1, 2)


def _into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """a b, written into ``out`` without a copy where it has the type of the product."""
    if out.dtype == a.dtype:
        torch.matmul(a, b, out=out)
    else:
        out.copy_(a @ b)
