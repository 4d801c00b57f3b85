"""Grouped attention: keys and values are gathered a few megabytes at a time, for batched dense products.

Query blocks are gathered as in :mod:`xattn.kernels.block_sparse.cpu`, a few at a time. The backward pass
gathers again, recomputes the weights, and adds up gradients by key block.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from xattn.kernels.block_sparse.cpu import BACKWARD, FORWARD, Work
from xattn.kernels.block_sparse.reference import Problem as Lists
from xattn.kernels.block_sparse.reference import reduce_bias
from xattn.kernels.grouped.reference import Problem, group_weights
from xattn.kernels.softmax.reference import delta, weights, wide, widen


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    work, tensors = _Tensors.of(p)
    queries = work.rows(p.q)
    o = queries.new_empty(*queries.shape[:3], p.v.shape[3])
    lse = queries.new_empty(queries.shape[:3], dtype=wide(p.q.dtype))
    for part, where, _, mask in work.chunks(FORWARD, queries.shape[2]):
        k, v, m = tensors.gather(where, p.k_block)
        more = mask, _log_weight(where, p)
        inner, gates = _weights(widen(queries[part]), k, m, *more, p)
        lse[part] = total = gates.logsumexp(-1)
        a = inner.mul_(weights(gates, total)[..., None]).flatten(-2)
        o[part] = (a @ v).to(o.dtype)
    return work.tokens(o), work.tokens(lse[..., None])[..., 0].contiguous()


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    (o, lse), (grad, grad_lse) = outputs, grads
    work, tensors = _Tensors.of(p)
    # Rows without a key, and padding rows of the last block, get the weights exp(t - inf) = 0.
    lse = torch.where(lse.isneginf(), torch.inf, lse)[..., None]
    lse_rows, delta_rows = work.rows(lse, torch.inf), work.rows(delta(grad, grad_lse, o)[..., None])
    queries, grads_o = work.rows(p.q), work.rows(grad)
    dq = queries.new_empty(queries.shape, dtype=lse.dtype)
    dk, dv, dm = (torch.zeros_like(x, dtype=lse.dtype) for x in tensors)
    db = None if work.bias is None or "bias" not in wanted else torch.zeros_like(work.bias)
    for part, where, where_bias, mask in work.chunks(BACKWARD, queries.shape[2]):
        k, v, m = tensors.gather(where, p.k_block)
        q, g, total, d = (widen(x[part]) for x in (queries, grads_o, lse_rows, delta_rows))
        more = mask, _log_weight(where, p)
        inner, gates = _weights(q, k, m, *more, p)
        gates = (gates - total).exp()
        dp = (g @ v.transpose(-2, -1)).view(inner.shape)
        c = (inner * dp).sum(-1)
        a = inner.mul_(gates[..., None])
        ds = dp.sub_(c[..., None]).mul_(a).flatten(-2)
        dt, a = gates * (c - d), a.flatten(-2)
        dq[part] = ds @ k + dt @ m
        where = where.flatten()
        for out, product in ((dk, (ds, q)), (dv, (a, g)), (dm, (dt, q))):
            slope = product[0].transpose(-2, -1) @ product[1]
            out.index_add_(0, where, slope.reshape(len(where), -1))
        if db is not None:
            sums = ds.sum(-2).reshape(len(where), -1)
            db.index_add_(0, where_bias.flatten(), sums)
    found = {
        "q": work.tokens(dq.mul_(p.scale)).to(p.q.dtype),
        "k": work.unblock(dk.mul_(p.scale), p.k),
        "v": work.unblock(dv, p.v),
        "marks": dm.mul_(p.scale).view(p.marks.shape).to(p.marks.dtype),
    }
    if db is not None and p.bias is not None:
        per_head = db.view(p.q.shape[0], work.heads, -1)[..., : p.k.shape[2]]
        found["bias"] = reduce_bias(per_head, p.bias)
    return found


class _Tensors(NamedTuple):
    """Keys, values and landmarks by block, (B Hk M, width)."""

    keys: Tensor
    values: Tensor
    marks: Tensor

    @classmethod
    def of(cls, p: Problem) -> tuple[Work, _Tensors]:
        work = Work(
            Lists(
                p.q, p.k, p.v, p.lists, p.bias, None, None, None, None, None, [], p.q_block,
                p.k_block, p.scale, p.backend,
            )
        )  # fmt: skip
        return work, cls(work.blocks(p.k), work.blocks(p.v), p.marks.reshape(-1, p.k.shape[3]))

    def gather(self, where: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors of some query blocks, (lines, problems, keys or blocks, width)."""
        k, v, m = (widen(x.index_select(0, where.flatten())) for x in self)
        keys = (*where.shape[:2], where.shape[2] * block, -1)
        return k.view(keys), v.view(keys), m.view(*where.shape, -1)


def _weights(
    q: Tensor, k: Tensor, m: Tensor, mask: Tensor | None, added: Tensor | None, p: Problem
) -> tuple[Tensor, Tensor]:
    """w (..., rows, entries, l) and t (..., rows, entries) of gathered keys and landmarks."""
    s = p.scale * (q @ k.transpose(-2, -1))
    s = s if mask is None else s + mask
    t = p.scale * (q @ m.transpose(-2, -1))
    t = t if added is None else t + added
    return group_weights(s.unflatten(-1, (-1, p.k_block)), t)


def _log_weight(where: Tensor, p: Problem) -> Tensor | None:
    """(lines, problems, 1, entries)"""
    if p.weight is None:
        return None
    log = p.weight.to(wide(p.q.dtype)).log()
    return log[where % p.key_blocks][:, :, None]
