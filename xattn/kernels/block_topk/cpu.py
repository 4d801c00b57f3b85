"""Finds the best blocks for chunks of query blocks. Scores are batched products; one partial sort per chunk
then selects the blocks.

The sum of the scores of several queries is the score of the sum of these queries, so only ``max`` and
``softmax`` visit every query. The score and the index of a candidate form one 64-bit integer, so ties have
the same order on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.backend import tile_entries
from xattn.kernels.block_topk import reference
from xattn.kernels.block_topk.reference import Problem
from xattn.kernels.softmax.reference import widen

TILE = 2**20  # scores per chunk on a CPU, over batch and heads: 4 MB in float32


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    p = p._replace(q=widen(p.q), k=widen(p.k))
    rows, members, mean = p.query_blocks, None, p.reduce == "mean"
    if p.linear:
        q, members = sum_queries(p.q, p.k.shape[1], p.q_block)
        p = p._replace(q=q, q_block=1, reduce="sum")
    index = p.q.new_empty((*p.k.shape[:2], rows, p.s), dtype=torch.int32)
    values = p.q.new_empty(index.shape)
    near = p.within is not None and p.linear and not p.pools
    for part, *found in _among_children(p) if near else _among_all(p):
        index[:, :, part], values[:, :, part] = found
    # Sums decide the order: dividing before could create ties.
    return index, values / members if mean and members is not None else values


def sum_queries(q: Tensor, key_heads: int, q_block: int) -> tuple[Tensor, Tensor]:
    """Sums over blocks and groups of heads, (B, Hk, ceil(N / q_block), D), and the number of terms."""
    n, group = q.shape[2], q.shape[1] // key_heads
    if q_block > 1:
        rows = -(-n // q_block)
        q = F.pad(q, (0, 0, 0, rows * q_block - n)).unflatten(2, (rows, q_block)).sum(3)
    if group > 1:
        q = q.unflatten(1, (key_heads, group)).sum(2)
    members = (n - torch.arange(q.shape[2], device=q.device) * q_block).clamp(max=q_block)
    return q, (members * group)[:, None]


def best(values: Tensor, number: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """The ``s`` candidates with the highest values; -1 and -inf if there are fewer.

    Args:
        values: (..., C), -inf for entries that are not candidates.
        number: the candidates' indices, which broadcast to ``values``; distinct within a row except
            where values are -inf.
    """
    number = number.expand(values.shape)
    if values.dtype == torch.float64:
        number, order = number.sort(-1)
        found, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        found, index = found[..., :s], number.gather(-1, order)[..., :s]
    else:
        bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0 into 0
        rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the floats
        key = (rising.long() << 32) | (0x7FFFFFFF - number)
        key = key.topk(min(s, values.shape[-1]), -1).values
        rising, index = (key >> 32).int(), 0x7FFFFFFF - (key & 0x7FFFFFFF)
        found = (rising ^ ((rising >> 31) & 0x7FFFFFFF)).view(torch.float32)
    index = index.masked_fill(found.isneginf(), -1)
    missing = (0, s - index.shape[-1])
    return F.pad(index, missing, value=-1).int(), F.pad(found, missing, value=-torch.inf)


def _among_all(p: Problem) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Every candidate is scored."""
    rows, heads = p.query_blocks, p.q.shape[0] * p.q.shape[1]
    each = 1 if p.softmax else p.q_block  # for a softmax, only sums of scores are kept
    step = max(1, tile_entries(p.q.device, TILE) // (heads * each * p.k.shape[2]))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        some = p.part(part)
        values = _softmax_scores(some) if p.softmax else reference.scores(some)
        if p.within is not None:
            own = reference.parents(rows, p.within)[part].to(p.q.device)
            allowed = reference.is_child(p.within[:, :, own], p.children, values.shape[3])
            values = values.masked_fill(~allowed, -torch.inf)
        values = reference.force(values, some.forced)
        yield part, *best(values, torch.arange(values.shape[3], device=p.q.device), p.s)


def _softmax_scores(p: Problem) -> Tensor:
    """:func:`reference.scores` for a softmax, computed for parts of the queries."""
    rows, c = p.query_blocks, p.k.shape[2]
    step = max(1, tile_entries(p.q.device, TILE) // (p.q.shape[0] * p.q.shape[1] * p.q_block * c))
    out = p.q.new_empty(*p.k.shape[:2], rows, c)
    each = p._replace(table=None, weight=None, spread=[1, 1, 0])
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        out[:, :, part] = _reduced_softmax(each.part(part))
    return reference.pool(out, p) if p.pools else out


def _reduced_softmax(p: Problem) -> Tensor:
    (batch, _, n, width), (key_heads, c) = p.q.shape, p.k.shape[1:3]
    if p.visible is not None or n % p.q_block or p.reduce == "max":
        return reference.scores(p)
    q, k = p.q.reshape(batch * key_heads, -1, width), p.k.reshape(-1, c, width).transpose(1, 2)
    t = torch.baddbmm(q.new_empty(()), q, k, beta=0, alpha=p.scale)
    t = t.view(batch, key_heads, -1, n, c)
    t = torch.softmax(t, -1, out=t) if p.lse is None else reference.weights(t, p)
    r = t.unflatten(3, (-1, p.q_block)).sum(4)
    r = r.sum(2) if r.shape[2] > 1 else r[:, :, 0]
    return r / (p.q_block * p.q.shape[1] // key_heads) if p.reduce == "mean" else r


def _among_children(p: Problem) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Only the children of the listed parents are scored; q has one row per query block."""
    assert p.within is not None
    (batch, heads, c, width), rows, device = p.k.shape, p.q.shape[2], p.k.device
    ratio = -(-rows // p.within.shape[2])
    number = p.within.long()[..., None] * p.children + torch.arange(p.children, device=device)
    number = number.flatten(3).expand(batch, heads, -1, -1)
    line = (torch.arange(batch * heads, device=device) * c).view(batch, heads, 1, 1)
    keys = p.k.reshape(-1, width)
    step = max(
        1, tile_entries(device, TILE) // (batch * heads * number.shape[3] * max(ratio, width))
    )
    for start in range(0, -(-rows // ratio), step):
        part = slice(start * ratio, min((start + step) * ratio, rows))
        some, count = p.part(part), part.stop - part.start
        own = number[:, :, start : start + step]
        real = (own >= 0) & (own < c)
        near = keys[(torch.where(real, own, 0) + line).flatten()].view(*own.shape, width)
        q = F.pad(some.q, (0, 0, 0, own.shape[2] * ratio - count))
        values = p.scale * (q.unflatten(2, (-1, ratio)) @ near.transpose(-2, -1))
        values = values.masked_fill(~real[:, :, :, None], -torch.inf).flatten(2, 3)
        own, values = own.repeat_interleave(ratio, 2)[:, :, :count], values[:, :, :count]
        if some.visible is not None:
            values = values.masked_fill(own >= some.visible[:, None], -torch.inf)
        if some.forced is not None:
            values, own = _with_forced(values, own, some.forced)
        yield part, *best(values, own, p.s)


def _with_forced(values: Tensor, own: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
    """The scores and indices of candidates, with each forced one added once with score +inf."""
    first = forced.long().expand(*own.shape[:3], -1).sort(-1).values
    again = F.pad(first[..., 1:] == first[..., :-1], (1, 0))
    for f in first.unbind(-1):
        values = values.masked_fill(own == f[..., None], -torch.inf)
    certain = torch.where((first < 0) | again, -torch.inf, torch.inf).to(values.dtype)
    return torch.cat([values, certain], -1), torch.cat([own, first], -1)
