"""The definition of softmax pooling, in plain differentiable torch.

    s = scale q k^T + b,   p = exp(s - lse),   lse = log sum_t exp s_t,   o = p v

A row whose scores are all -inf has p = 0, o = 0 and lse = -inf. With dO and dlse given:

    dS = p o (dO v^T - rowsum(dO o O) + dlse) = dB,   dQ = scale dS k,   dK = scale dS^T q,   dV = p^T dO
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xattn.kernels.softmax.reference import delta, wide, widen


class Problem(NamedTuple):
    """The arguments of softmax pooling.

    See :func:`xattn.kernels.pooling.softmax_pooling`; ``q`` and ``k`` are None if ``bias`` holds the
    scores."""

    q: Tensor | None
    """(B or 1, Q, D)"""
    k: Tensor | None
    """(B, T, D)"""
    v: Tensor
    """(B, G, T, V)"""
    bias: Tensor | None
    """(B, Q, T)"""
    scale: float
    backend: str

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, Q and T."""
        rows = self.bias if self.q is None else self.q
        assert rows is not None
        return self.v.shape[0], rows.shape[1], self.v.shape[2]


def scores(p: Problem) -> Tensor:
    """Scores (B, Q, T) in at least float32; only ``bias`` if there are no queries and keys."""
    if p.q is None or p.k is None:
        assert p.bias is not None
        return widen(p.bias).to(wide(p.v.dtype))
    s = p.scale * (widen(p.q) @ widen(p.k).transpose(1, 2))
    return s if p.bias is None else s + p.bias.to(s.dtype)


def normalise(s: Tensor) -> tuple[Tensor, Tensor]:
    """The weights (B, Q, T) and log-sum-exp (B, Q) of scores; gradients are finite even in empty rows."""
    top = s.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top.isneginf(), 0.0)
    e = (s - top).exp()
    total = e.sum(-1, keepdim=True)
    some = total != 0
    total = torch.where(some, total, 1.0)
    lse = torch.where(some, top + total.log(), -torch.inf)
    return e / total, lse[..., 0]


def pool_values(p: Tensor, v: Tensor) -> Tensor:
    """p v: (B, Q, T), (B, G, T, V) -> (B, Q, V); each group of values serves Q / G consecutive queries."""
    return (p.unflatten(1, (v.shape[1], -1)) @ v).flatten(1, 2)


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse, and what is kept for the backward pass: here the weights."""
    weights, lse = normalise(scores(p))
    return pool_values(weights, widen(p.v)).to(p.v.dtype), lse, weights


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    (o, _, weights), (grad, grad_lse) = outputs, grads
    return _gradients(p, weights, grad, delta(grad, grad_lse, o), wanted)


def second(
    p: Problem, grads: Sequence[Tensor | None], wanted: Collection[str]
) -> dict[str, Tensor]:
    """Compute :func:`backward` only from the inputs, so that the result can be differentiated again."""
    grad, grad_lse = grads
    assert grad is not None
    weights, _ = normalise(scores(p))
    d = delta(grad, grad_lse, pool_values(weights, widen(p.v)))
    return _gradients(p, weights, grad, d, wanted)


def _gradients(
    p: Problem, weights: Tensor, grad: Tensor, d: Tensor, wanted: Collection[str]
) -> dict[str, Tensor]:
    """dQ, dK, dV and dB from the weights, dO and d = rowsum(dO o O) - dlse."""
    groups, found = p.v.shape[1], {}
    g = widen(grad).unflatten(1, (groups, -1))
    ds = weights * ((g @ widen(p.v).transpose(2, 3)).flatten(1, 2) - d[..., None])
    if p.q is not None and p.k is not None:
        if "q" in wanted:
            found["q"] = (p.scale * (ds @ widen(p.k))).sum_to_size(p.q.shape).to(p.q.dtype)
        if "k" in wanted:
            found["k"] = (p.scale * (ds.transpose(1, 2) @ widen(p.q))).to(p.k.dtype)
    if "v" in wanted:
        found["v"] = (weights.unflatten(1, (groups, -1)).transpose(2, 3) @ g).to(p.v.dtype)
    if "bias" in wanted and p.bias is not None:
        found["bias"] = ds.to(p.bias.dtype)
    return found
