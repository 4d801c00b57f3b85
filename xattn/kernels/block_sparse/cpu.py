"""Attention over lists of key blocks: keys and values are gathered a few megabytes at a time, for batched
dense products.

Query blocks are independent problems, and a chunk of them forms one batch of PyTorch's fused attention.
Problems whose lists have the same number of entries are processed together, so that nothing is gathered
for missing entries and no mask is needed for them. Keys and values are gathered into buffers that all
chunks reuse, small enough to stay in the cache. The backward pass gathers again, recomputes the
weights, and adds up gradients by key block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.backend import tile_entries
from xattn.kernels.block_sparse.reference import Problem, box_mask, rank_mask, reduce_bias
from xattn.kernels.softmax import cpu as dense
from xattn.kernels.softmax.reference import Problem as DenseProblem
from xattn.kernels.softmax.reference import delta, wide, widen

FORWARD, BACKWARD = 2**24, 2**23  # bytes of keys and values gathered at a time on a CPU
TOGETHER = 2**20  # up to this size, problems with lists of different lengths are processed together


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    work = Work(p)
    queries, keys, values = work.rows(p.q), work.blocks(p.k), work.blocks(p.v)
    o = queries.new_empty(*queries.shape[:3], p.v.shape[3])
    lse = queries.new_empty(queries.shape[:3], dtype=wide(p.q.dtype))
    buffers = keys.new_empty(0), values.new_empty(0)
    for part, where, _, mask in work.chunks(FORWARD):
        kc, vc = work.gather(keys, where, buffers[0]), work.gather(values, where, buffers[1])
        problem = DenseProblem(widen(queries[part]), kc, vc, mask, p.scale, False, p.backend)
        own, total = dense.forward(problem)
        o[part], lse[part] = own.to(o.dtype), total.to(lse.dtype)
    return work.tokens(o), work.tokens(lse[..., None])[..., 0].contiguous()


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    (o, lse), (grad, grad_lse), work = outputs, grads, Work(p)
    # Rows without a key, and padding rows of the last block, get the weights exp(s - inf) = 0.
    lse = torch.where(lse.isneginf(), torch.inf, lse)[..., None]
    lse_rows, delta_rows = work.rows(lse, torch.inf), work.rows(delta(grad, grad_lse, o)[..., None])
    queries, grads_o, keys, values = (
        work.rows(p.q), work.rows(grad), work.blocks(p.k), work.blocks(p.v),
    )  # fmt: skip
    dq = queries.new_empty(queries.shape, dtype=lse.dtype)
    dk, dv = (x.new_zeros(x.shape, dtype=lse.dtype) for x in (keys, values))
    db = None if work.bias is None or "bias" not in wanted else torch.zeros_like(work.bias)
    buffers = keys.new_empty(0), values.new_empty(0)
    rows = queries.shape[2]  # scores are stored here, (rows, keys) of a problem
    for part, where, where_bias, mask in work.chunks(BACKWARD, rows):
        kc, vc = work.gather(keys, where, buffers[0]), work.gather(values, where, buffers[1])
        shape = (*kc.shape[:2], queries.shape[2], kc.shape[2])
        kc, vc = kc.flatten(0, 1), vc.flatten(0, 1)
        qc, gc, lc, dc = (
            widen(x[part]).flatten(0, 1) for x in (queries, grads_o, lse_rows, delta_rows)
        )
        a = torch.baddbmm(lc, qc, kc.transpose(1, 2), beta=-1, alpha=p.scale)
        if mask is not None:
            a.view(shape).add_(mask)
        a.exp_()
        ds = torch.baddbmm(dc, gc, vc.transpose(1, 2), beta=-1).mul_(a)
        dq[part] = torch.bmm(ds, kc).view(*shape[:3], -1)
        # The gathered keys and values are no longer needed, so the gradients reuse their memory.
        torch.bmm(ds.transpose(1, 2), qc, out=kc)
        torch.bmm(a.transpose(1, 2), gc, out=vc)
        where = where.flatten()
        dk.index_add_(0, where, kc.view(where.numel(), -1))
        dv.index_add_(0, where, vc.view(where.numel(), -1))
        if db is not None:
            sums = ds.view(shape).sum(2).view(where.numel(), -1)
            db.index_add_(0, where_bias.flatten(), sums)
    found = {
        "q": work.tokens(dq.mul_(p.scale)).to(p.q.dtype),
        "k": work.unblock(dk.mul_(p.scale), p.k),
        "v": work.unblock(dv, p.v),
    }
    if db is not None and p.bias is not None:
        per_head = db.view(p.q.shape[0], work.heads, -1)[..., : p.k.shape[2]]
        found["bias"] = reduce_bias(per_head, p.bias)
    return found


class Chunk(NamedTuple):
    """A chunk of the table: problems whose lists have at most E entries."""

    part: tuple[slice, slice | Tensor]
    """Lines and problems."""
    where: Tensor
    """(lines, problems, E), the numbers of their blocks among the blocks of all keys."""
    where_bias: Tensor
    """The same among the blocks of all biases."""
    mask: Tensor | None
    """(lines or 1, problems, rows or 1, keys of a problem), added to the scores."""


class Work:
    """The op as a table (lines, problems) of problems of the same size, one for each query block.

    If all heads share a list, there is one line per head, so masks are built once per query block;
    otherwise all problems are in one line. The query heads of one key head share the rows of a problem
    unless their lists or biases differ.
    """

    def __init__(self, p: Problem) -> None:
        self.p = p
        batch, heads = p.q.shape[:2]
        key_heads, index, bias = p.k.shape[1], p.lists, p.bias
        own = heads in (x.shape[1] for x in (index, bias, p.rank) if x is not None)
        self.heads = heads if own else key_heads
        self.group = heads // self.heads
        self.counts = (index >= 0).sum(-1)
        if int(self.counts.min()) < index.shape[3]:  # holes go behind the entries
            index = index.gather(-1, (index < 0).byte().argsort(dim=-1, stable=True))
        shared = index.shape[:2] == (1, 1) and p.rank is None
        self.lines = batch * self.heads if shared else 1
        # First block of each (batch, head) among the blocks of all keys, and among those of biases.
        line = torch.arange(batch * self.heads, device=p.q.device)
        first = line.div(self.heads // key_heads, rounding_mode="floor") * p.key_blocks
        lists = index
        if not shared:
            lists, self.counts = (
                x.expand(batch, *x.shape[1:]).repeat_interleave(self.heads // x.shape[1], 1)
                for x in (lists, self.counts)
            )
        lists, self.counts = lists.flatten(0, 1), self.counts.flatten()
        self.where, self.where_bias = (
            (lists.clamp(min=0) + x[:, None, None]).view(self.lines, -1, index.shape[3])
            for x in (first, line * p.key_blocks)
        )
        self.index = lists.flatten(0, 1)
        self.low, self.high = self._box_rows(p.low, 1), self._box_rows(p.high, 0)
        self.limit = None if p.limit is None else self.rows(p.limit[..., None])[0, ..., 0]
        self.bias = None
        if bias is not None:
            full = widen(bias).to(wide(p.q.dtype)).expand(batch, *bias.shape[1:])
            full = full.repeat_interleave(self.heads // bias.shape[1], 1)[..., None]
            self.bias = self.blocks(full)

    def rows(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Reshape (B, H, N, width) to (lines, problems, rows of a problem, width)."""
        blocks, size = self.p.query_blocks, self.p.q_block
        x = _lengthen(x, blocks * size, fill)
        x = x.reshape(x.shape[0], self.heads, self.group, blocks, size, -1)
        return x.transpose(2, 3).reshape(self.lines, -1, self.group * size, x.shape[-1])

    def tokens(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`rows`."""
        batch, heads, n, _ = self.p.q.shape
        x = x.view(batch, self.heads, self.p.query_blocks, self.group, self.p.q_block, -1)
        return x.transpose(2, 3).reshape(batch, heads, -1, x.shape[-1])[:, :, :n]

    def blocks(self, x: Tensor) -> Tensor:
        """Reshape (B, heads, S, width) to (B * heads * blocks, block * width)."""
        x = _lengthen(x, self.p.key_blocks * self.p.k_block)
        return x.reshape(-1, self.p.k_block * x.shape[-1])

    def unblock(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`blocks`."""
        return x.view(*like.shape[:2], -1, like.shape[3])[:, :, : like.shape[2]].to(like.dtype)

    def gather(self, blocks: Tensor, where: Tensor, buffer: Tensor) -> Tensor:
        """The gathered blocks as (lines, problems, keys of a problem, width), in at least float32."""
        size = where.numel()
        if buffer.numel() < size * blocks.shape[1]:
            buffer.resize_(size * blocks.shape[1])
        out = buffer[: size * blocks.shape[1]].view(size, -1)
        torch.index_select(blocks, 0, where.flatten(), out=out)
        return widen(out.view(*where.shape[:2], where.shape[2] * self.p.k_block, -1))

    def chunks(self, limit: int, rows: int = 0) -> Iterator[Chunk]:
        """Yield the table in chunks. The keys, values and outputs of a chunk, and ``rows`` numbers per key,
        fit into ``limit`` bytes or, on a GPU, into the memory that plain PyTorch may use there."""
        number, v = wide(self.p.q.dtype).itemsize, self.p.v.shape[3]
        entry = number * self.p.k_block * max(rows, self.p.k.shape[3] + v)
        output = number * self.group * self.p.q_block * v
        limit = tile_entries(self.index.device, limit // number) * number
        for problems, entries, even in self._runs(TOGETHER // (entry * self.lines)):
            each = entry * entries + output
            size, lines = max(1, limit // (each * self.lines)), self.lines
            if size == 1:
                lines = max(1, min(lines, limit // each))
            for start in range(0, len(problems), size):
                some = problems[start : start + size]
                mask = self._mask(some, entries, even)
                # Consecutive numbers form a slice, which needs no copy.
                column = slice(some.start, some.stop) if isinstance(some, range) else some
                for line in range(0, self.lines, lines):
                    part = (slice(line, line + lines), column)
                    where, bias = (x[part][..., :entries] for x in (self.where, self.where_bias))
                    yield Chunk(part, where, bias, self._with_bias(mask, bias))

    def _runs(self, least: int) -> Iterator[tuple[range | Tensor, int, bool]]:
        """Group the problems whose lists have the same number of entries; lists with at most ``least``
        entries form one group. Yields the problems, the number of entries, and whether all lists have
        exactly that number."""
        most, count = int(self.counts.max()), len(self.counts)
        if most == int(self.counts.min()):
            yield range(count), max(most, 1), most > 0
            return
        counts, order = self.counts.sort(descending=True, stable=True)
        sizes = counts.tolist()
        start = 0
        while start < count:
            entries, stop = max(sizes[start], 1), start + 1
            while stop < count and (
                sizes[stop] == sizes[start] or (stop - start) * entries < least
            ):
                stop += 1
            yield order[start:stop], entries, sizes[stop - 1] == entries
            start = stop

    def _box_rows(self, x: Tensor | None, fill: int) -> Tensor | None:
        if x is None:
            return None
        x = _lengthen(x, self.p.query_blocks * self.p.q_block, fill)
        return x.reshape(self.p.query_blocks, self.p.q_block, -1)

    def _mask(self, problems: range | Tensor, entries: int, even: bool) -> Tensor | None:
        """(problems, rows or 1, keys of a problem), 0 or -inf; None if all keys are seen."""
        p, device, seen = self.p, self.index.device, None
        low, high, position = self.low, self.high, p.position
        s = p.k.shape[2]
        if even and low is None and p.rank is None and s % p.k_block == 0:
            return None
        if isinstance(problems, range):
            problems = torch.arange(problems.start, problems.stop, device=device)
        index = self.index[problems, :entries]
        lane = torch.arange(p.k_block, device=device)
        keys = (index[..., None] * p.k_block + lane).flatten(1)
        if not even or s % p.k_block:
            seen = ((keys >= 0) & (keys < s))[:, None]
            seen = None if seen.all() else seen
        if low is not None and high is not None and position is not None:
            block = problems % p.query_blocks
            at = position[keys.clamp(0, s - 1)]
            near = box_mask(low[block], high[block], at, p.dilation)
            near = near.repeat(1, self.group, 1)
            seen = near if seen is None else seen & near
        if p.rank is not None and self.limit is not None:
            line = problems.div(p.query_blocks, rounding_mode="floor")
            rank = p.rank.flatten(0, 1)[line[:, None], keys.clamp(0, s - 1)]
            token = (problems % p.query_blocks * p.q_block)[:, None] + torch.arange(
                p.q_block, device=device
            )
            near = rank_mask(rank, self.limit[problems], token, keys)
            seen = near if seen is None else seen & near
        if seen is None:
            return None
        mask = torch.full(seen.shape, -torch.inf, dtype=torch.float32, device=device)
        return mask.masked_fill_(seen, 0.0)

    def _with_bias(self, mask: Tensor | None, where: Tensor) -> Tensor | None:
        """(lines or 1, problems, rows or 1, keys), for the indices of the biases' blocks."""
        if self.bias is None:
            return None if mask is None else mask[None]
        bias = self.bias[where.flatten()].view(*where.shape[:2], 1, -1)
        return bias if mask is None else bias + mask


def _lengthen(x: Tensor, rows: int, fill: float = 0.0) -> Tensor:
    """Pad ``x`` to (..., rows, width); unlike ``F.pad``, this makes no copy if ``x`` is long enough."""
    missing = rows - x.shape[-2]
    return F.pad(x, (0, 0, 0, missing), value=fill) if missing else x
