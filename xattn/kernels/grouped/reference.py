"""The definition of grouped attention, in plain torch; stores N x S scores."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.block_sparse.reference import expand_to_heads, listed_mask, reduce_bias
from xattn.kernels.softmax.reference import delta, per_key_head, per_query_head, weights, widen


class Problem(NamedTuple):
    """The arguments of grouped attention over lists of key blocks.

    See :func:`xattn.kernels.grouped.grouped_attention`.
    """

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, Hk, S, D)"""
    v: Tensor
    """(B, Hk, S, Dv)"""
    marks: Tensor
    """(B, Hk, key blocks, D)"""
    lists: Tensor
    """(B or 1, 1 or Hk or H, query blocks, entries) int32"""
    bias: Tensor | None
    """(B or 1, 1 or Hk or H, S)"""
    weight: Tensor | None
    """(key blocks,)"""
    q_block: int
    k_block: int
    scale: float
    backend: str

    @property
    def query_blocks(self) -> int:
        return -(-self.q.shape[2] // self.q_block)

    @property
    def key_blocks(self) -> int:
        return -(-self.k.shape[2] // self.k_block)


class Weights(NamedTuple):
    """The weights of M key blocks of l keys."""

    inner: Tensor
    """w (..., N, M, l), 0 if a block has no visible key."""
    gates: Tensor
    """t (..., N, M), -inf there."""


def group_weights(s: Tensor, t: Tensor) -> Weights:
    """Compute w and t from the scores of the keys, (..., N, M, l) with -inf for hidden keys, and the scores
    of the landmarks."""
    lse = s.logsumexp(-1)
    return Weights(weights(s, lse), t.masked_fill(lse.isneginf(), -torch.inf))


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    inner, gates = _weights(p)
    lse = gates.logsumexp(-1)
    a = _tokens(weights(gates, lse)[..., None] * inner, p)
    return (a @ widen(per_query_head(p.v, p.q))).to(p.q.dtype), lse


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    (o, lse), (grad, grad_lse) = outputs, grads
    q, k, v, m = (widen(per_query_head(x, p.q)) for x in (p.q, p.k, p.v, p.marks))
    grad = widen(grad)
    inner, gates = _weights(p)
    g = weights(gates, lse)
    dp = _blocks(grad @ v.transpose(-2, -1), p, 0.0)
    c = (inner * dp).sum(-1)
    dt = g * (c - delta(grad, grad_lse, o)[..., None])
    ds = _tokens(g[..., None] * inner * (dp - c[..., None]), p)
    a = _tokens(g[..., None] * inner, p)
    found = {
        "q": (p.scale * (ds @ k + dt @ m)).to(p.q.dtype),
        "k": per_key_head(p.scale * (ds.transpose(-2, -1) @ q), p.k),
        "v": per_key_head(a.transpose(-2, -1) @ grad, p.v),
        "marks": per_key_head(p.scale * (dt.transpose(-2, -1) @ q), p.marks),
    }
    if p.bias is not None and "bias" in wanted:
        found["bias"] = reduce_bias(ds.sum(2), p.bias)
    return found


def _weights(p: Problem) -> Weights:
    q, k, m = (widen(per_query_head(x, p.q)) for x in (p.q, p.k, p.marks))
    s = p.scale * (q @ k.transpose(-2, -1))
    if p.bias is not None:
        s = s + expand_to_heads(p.bias, p.q)[:, :, None].to(s.dtype)
    t = p.scale * (q @ m.transpose(-2, -1))
    if p.weight is not None:
        t = t + p.weight.to(t.dtype).log()
    return group_weights(
        _blocks(s, p, -torch.inf), t.masked_fill(~expand_to_heads(listed_mask(p), p.q), -torch.inf)
    )


def _blocks(x: Tensor, p: Problem, fill: float) -> Tensor:
    """(..., S) to (..., M, l)"""
    return F.pad(x, (0, -x.shape[-1] % p.k_block), value=fill).unflatten(-1, (-1, p.k_block))


def _tokens(x: Tensor, p: Problem) -> Tensor:
    """The inverse of :func:`_blocks`."""
    return x.flatten(-2)[..., : p.k.shape[2]]
