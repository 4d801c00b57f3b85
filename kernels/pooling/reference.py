"""The definition of softmax pooling, in plain differentiable torch.

    s = scale q k^T + b,   p = exp(s - lse),   lse = log sum_t exp s_t,   o = p v

A row whose scores are all -inf has p = 0, o = 0 and lse = -inf. With dO and dlse given:

    dS = p o (dO v^T - rowsum(dO o O) + dlse) = dB,   dQ = scale dS k,   dK = scale dS^T q,   dV = p^T dO
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xattn.kernels.softmax.reference import delta, widen


def scores(q: Tensor | None, k: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """(B, Q, T) in at least float32; ``bias`` alone where there are no queries and keys."""
    if q is None or k is None:
        assert bias is not None
        return widen(bias)
    s = scale * (widen(q) @ widen(k).transpose(1, 2))
    return s if bias is None else s + bias.to(s.dtype)


def normalise(s: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (B, Q, T) and their log-sum-exp (B, Q) of scores; finite gradients in empty rows, too."""
    top = s.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top.isneginf(), 0.0)
    e = (s - top).exp()
    total = e.sum(-1, keepdim=True)
    some = total != 0
    total = torch.where(some, total, 1.0)
    lse = torch.where(some, top + total.log(), -torch.inf)
    return e / total, lse[..., 0]


def pooled(p: Tensor, v: Tensor) -> Tensor:
    """p v: (B, Q, T), (B, G, T, V) -> (B, Q, V), each group of values for Q / G queries in a row."""
    return (p.unflatten(1, (v.shape[1], -1)) @ v).flatten(1, 2)


def forward(
    q: Tensor | None, k: Tensor | None, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse, and what the backward pass keeps: here the weights."""
    s = scores(q, k, bias, scale).to(widen(v).dtype)
    p, lse = normalise(s)
    return pooled(p, widen(v)).to(v.dtype), lse, p


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
    """Gradients of q, k, v and bias, None for those that are not ``wanted``; ``kept`` as
    :func:`forward` returned it."""
    return gradients(kept, grad, delta(grad, grad_lse, o), q, k, v, bias, scale, wanted)


def second(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """:func:`backward` from the inputs alone, so that it can be differentiated once more."""
    p, _ = normalise(scores(q, k, bias, scale).to(widen(v).dtype))
    d = delta(grad, grad_lse, pooled(p, widen(v)))
    return gradients(p, grad, d, q, k, v, bias, scale, wanted)


def gradients(
    p: Tensor,
    grad: Tensor,
    d: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """dQ, dK, dV and dB from weights p, dO and d = rowsum(dO o O) - dlse."""
    groups = v.shape[1]
    g = widen(grad).unflatten(1, (groups, -1))
    ds = p * ((g @ widen(v).transpose(2, 3)).flatten(1, 2) - d[..., None])
    dq = dk = dv = db = None
    if q is not None and k is not None:
        if wanted[0]:
            dq = (scale * (ds @ widen(k))).sum_to_size(q.shape).to(q.dtype)
        if wanted[1]:
            dk = (scale * (ds.transpose(1, 2) @ widen(q))).to(k.dtype)
    if wanted[2]:
        dv = (p.unflatten(1, (groups, -1)).transpose(2, 3) @ g).to(v.dtype)
    if wanted[3] and bias is not None:
        db = ds.to(bias.dtype)
    return dq, dk, dv, db
