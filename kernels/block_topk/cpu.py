"""The best blocks by chunks of query blocks: batched products, then one partial sort per chunk.

The sum of the scores of queries is the score of their sum, so only ``max`` and ``softmax`` visit every
query. Score and number of a candidate form one 64-bit integer, so ties have one order on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.block_topk import reference
from xattn.kernels.softmax.reference import widen

TILE = 2**20  # scores of a chunk, over batch and heads: 4 MB in float32


def topk(
    q: Tensor,
    k: Tensor,
    forced: Tensor | None,
    within: Tensor | None,
    visible: Tensor | None,
    s: int,
    q_block: int,
    reduce: str,
    softmax: bool,
    spread: list[int],
    pooling: str,
    children: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    rows = -(-q.shape[2] // q_block)
    q, k, linear = widen(q), widen(k), reduce != "max" and not softmax
    if linear:
        q, members = sum_queries(q, k.shape[1], q_block)
        q_block = 1
    index = q.new_empty((*k.shape[:2], rows, s), dtype=torch.int32)
    values = q.new_empty(index.shape)
    if within is not None and linear and spread == [1, 1, 0]:
        chunks = _among_children(q, k, forced, within, visible, s, children, scale)
    else:
        chunks = _among_all(
            q, k, forced, within, visible, s, q_block, reduce, softmax, spread, pooling, children,
            scale,
        )  # fmt: skip
    for part, *best in chunks:
        index[:, :, part], values[:, :, part] = best
    # Sums decide the order: dividing before could create ties.
    return index, values / members if linear and reduce == "mean" else values


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
    """The ``s`` candidates of the highest value; -1 and -inf where there are fewer.

    Args:
        values: (..., C), -inf for entries that are no candidates.
        number: the candidates' numbers, which broadcast to ``values``; distinct within a row except
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


def _among_all(
    q: Tensor,
    k: Tensor,
    forced: Tensor | None,
    within: Tensor | None,
    visible: Tensor | None,
    s: int,
    q_block: int,
    reduce: str,
    softmax: bool,
    spread: list[int],
    pooling: str,
    children: int,
    scale: float,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Every candidate is scored."""
    n, c = q.shape[2], k.shape[2]
    rows = -(-n // q_block)
    step = max(1, TILE // (q.shape[0] * q.shape[1] * q_block * c))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        tokens = slice(start * q_block, part.stop * q_block)
        some = None if visible is None else visible[part]
        values = reference.scores(
            q[:, :, tokens], k, some, q_block, reduce, softmax, spread, pooling, scale
        )
        if within is not None:
            own = reference.parents(rows, within)[part].to(q.device)
            allowed = reference.is_child(within[:, :, own], children, values.shape[3])
            values = values.masked_fill(~allowed, -torch.inf)
        values = reference.force(values, None if forced is None else forced[:, :, part])
        yield part, *best(values, torch.arange(values.shape[3], device=q.device), s)


def _among_children(
    q: Tensor,
    k: Tensor,
    forced: Tensor | None,
    within: Tensor,
    visible: Tensor | None,
    s: int,
    children: int,
    scale: float,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Only the children of the listed parents are scored; ``q`` has one row a query block."""
    batch, heads, c, width = k.shape
    rows = q.shape[2]
    ratio = -(-rows // within.shape[2])
    number = within.long()[..., None] * children + torch.arange(children, device=k.device)
    number = number.flatten(3).expand(batch, heads, -1, -1)
    line = (torch.arange(batch * heads, device=k.device) * c).view(batch, heads, 1, 1)
    keys = k.reshape(-1, width)
    step = max(1, TILE // (batch * heads * number.shape[3] * max(ratio, width)))
    for start in range(0, -(-rows // ratio), step):
        part = slice(start * ratio, min((start + step) * ratio, rows))
        own = number[:, :, start : start + step]
        real = (own >= 0) & (own < c)
        near = keys[(torch.where(real, own, 0) + line).flatten()].view(*own.shape, width)
        qc = F.pad(q[:, :, part], (0, 0, 0, own.shape[2] * ratio - (part.stop - part.start)))
        values = scale * (qc.unflatten(2, (-1, ratio)) @ near.transpose(-2, -1))
        values = values.masked_fill(~real[:, :, :, None], -torch.inf).flatten(2, 3)
        own = own.repeat_interleave(ratio, 2)[:, :, : part.stop - part.start]
        values = values[:, :, : part.stop - part.start]
        if visible is not None:
            values = values.masked_fill(own >= visible[part, None], -torch.inf)
        if forced is not None:
            first = forced[:, :, part].long().expand(*own.shape[:3], -1).sort(-1).values
            again = F.pad(first[..., 1:] == first[..., :-1], (1, 0))
            for f in first.unbind(-1):
                values = values.masked_fill(own == f[..., None], -torch.inf)
            certain = torch.where((first < 0) | again, -torch.inf, torch.inf).to(values.dtype)
            values, own = torch.cat([values, certain], -1), torch.cat([own, first], -1)
        yield part, *best(values, own, s)
