"""Attention for some of the queries in plain PyTorch: gather and scatter head by head, without padding."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from xattn.kernels.ragged_queries.reference import Problem
from xattn.kernels.softmax import cpu as dense
from xattn.kernels.softmax.reference import Problem as DenseProblem
from xattn.kernels.softmax.reference import empty_outputs, per_key_head


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    o, lse = empty_outputs(p)
    o, lse = o.zero_(), lse.fill_(-torch.inf)
    for head, at, part in _heads(p):
        for whole, some in zip((o, lse), dense.forward(part), strict=True):
            whole[head].index_copy_(0, at, some[0, 0])
    return o, lse


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    heads, (grad, grad_lse) = p.q.shape[1], grads
    dq = torch.zeros_like(p.q)
    dk, dv = (x.new_zeros(x.shape[0], heads, *x.shape[2:]) for x in (p.k, p.v))
    for head, at, part in _heads(p):
        o, lse, g = (x[head].index_select(0, at)[None, None] for x in (*outputs, grad))
        g_lse = None if grad_lse is None else grad_lse[head].index_select(0, at)[None, None]
        found = dense.backward(part, (o, lse), (g, g_lse), ())
        dq[head].index_copy_(0, at, found["q"][0, 0])
        dk[head], dv[head] = found["k"][0, 0], found["v"][0, 0]
    return {"q": dq, "k": per_key_head(dk, p.k), "v": per_key_head(dv, p.v)}


def _heads(p: Problem) -> Iterator[tuple[tuple[int, int], Tensor, DenseProblem]]:
    """Each image and head with queries to compute, the indices of these queries, and their problem."""
    group = p.q.shape[1] // p.k.shape[1]
    for image, heads in enumerate(p.keep):
        for head, kept in enumerate(heads):
            at = kept.nonzero()[:, 0]
            if not len(at):
                continue
            q = p.q[image, head].index_select(0, at)[None, None]
            k, v = (x[image, head // group][None, None] for x in (p.k, p.v))
            bias = None
            if p.causal:
                later = torch.arange(k.shape[2], device=k.device) > at[:, None]
                bias = q.new_zeros(later.shape).masked_fill_(later, -torch.inf)[None, None]
            yield (image, head), at, DenseProblem(q, k, v, bias, p.scale, False, "cpu")
