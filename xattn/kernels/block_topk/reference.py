"""The definition of block scores and of the selection of blocks, in plain torch; stores N x C scores.

    t_ic = scale q_i . k_c                      or its softmax over the candidates c that i may see
    r_mc = sum, mean or max of t_ic over the queries i of block m and the heads of the group
    r'_mj = max, sum or mean of r_mc over c in [j stride - padding, j stride - padding + kernel),
            or sum of w_jc r_mc over the c of a table

and the s best j for each m: first the forced candidates, then by descending score; ties go to the
    lowest j.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.block_sparse.block_lists import listed_blocks
from xattn.kernels.softmax.reference import widen


class Problem(NamedTuple):
    """The arguments of the selection of blocks. See :func:`xattn.kernels.block_topk.block_topk`."""

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, Hk, C, D)"""
    forced: Tensor | None
    """(B or 1, 1 or Hk, query blocks, f) int32"""
    within: Tensor | None
    """(B or 1, 1 or Hk, parents, sp) int32"""
    visible: Tensor | None
    """(query blocks,) int32"""
    table: Tensor | None
    """(M, f) int32, the candidates that each of M blocks pools; in place of ``spread``"""
    weight: Tensor | None
    """(M, f), weights of the entries of ``table``"""
    lse: Tensor | None
    """(B, H, N)"""
    s: int
    q_block: int
    reduce: str
    softmax: bool
    spread: list[int]
    """Kernel, stride and padding; 1, 1, 0 for none."""
    pooling: str
    children: int
    """Number of candidates per parent; 1 without ``within``."""
    scale: float
    backend: str

    @property
    def query_blocks(self) -> int:
        return -(-self.q.shape[2] // self.q_block)

    @property
    def candidates(self) -> int:
        """The number of candidates after pooling."""
        if self.table is not None:
            return self.table.shape[0]
        kernel, stride, padding = self.spread
        return (self.k.shape[2] + 2 * padding - kernel) // stride + 1

    @property
    def pools(self) -> bool:
        return self.table is not None or self.spread != [1, 1, 0]

    @property
    def linear(self) -> bool:
        """Whether the score of a query block is the score of the sum of its queries."""
        return self.reduce != "max" and not self.softmax

    def part(self, blocks: slice) -> Problem:
        """The same problem for some of the query blocks, without a selection of parents."""
        tokens = slice(blocks.start * self.q_block, blocks.stop * self.q_block)
        return self._replace(
            q=self.q[:, :, tokens],
            forced=None if self.forced is None else self.forced[:, :, blocks],
            within=None,
            visible=None if self.visible is None else self.visible[blocks],
            lse=None if self.lse is None else self.lse[:, :, tokens],
        )


LARGE = 80.0  # exponents end here, so that float32 and its sums stay finite


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    values = scores(p)
    if p.within is not None:
        parent = parents(p.query_blocks, p.within).to(values.device)
        allowed = is_child(p.within[:, :, parent], p.children, values.shape[3])
        values = values.masked_fill(~allowed, -torch.inf)
    values = force(values, p.forced)
    values, index = values.sort(dim=-1, descending=True, stable=True)
    index = torch.where(values.isneginf(), -1, index)
    missing = max(0, p.s - values.shape[3])
    return (
        F.pad(index[..., : p.s], (0, missing), value=-1).int(),
        F.pad(values[..., : p.s], (0, missing), value=-torch.inf),
    )


def scores(p: Problem) -> Tensor:
    """r' (B, Hk, query blocks, candidates); -inf if nothing is visible.

    The scores are differentiable; the selection is not.
    """
    (n, c), rows, key_heads = (p.q.shape[2], p.k.shape[2]), p.query_blocks, p.k.shape[1]
    t = p.scale * (
        widen(p.q).unflatten(1, (key_heads, -1)) @ widen(p.k)[:, :, None].transpose(-2, -1)
    )
    hidden = None
    if p.visible is not None:
        hidden = torch.arange(c, device=p.k.device) >= p.visible[:, None]
    if p.softmax:
        if hidden is not None:  # a query that sees nothing is overwritten below
            each = hidden & ~hidden.all(1, keepdim=True)
            t = t.masked_fill(each.repeat_interleave(p.q_block, 0)[:n], -torch.inf)
        t = weights(t, p)
    fill = -torch.inf if p.reduce == "max" else 0.0
    t = F.pad(t, (0, 0, 0, rows * p.q_block - n), value=fill).unflatten(3, (rows, p.q_block))
    r = t.amax((2, 4)) if p.reduce == "max" else t.sum((2, 4))
    if p.reduce == "mean":
        count = (n - torch.arange(rows, device=p.q.device) * p.q_block).clamp(max=p.q_block)
        r = r / (count * (p.q.shape[1] // key_heads))[:, None]
    if hidden is not None:
        r = r.masked_fill(hidden, -torch.inf)
    return pool(r, p) if p.pools else r


def weights(t: Tensor, p: Problem) -> Tensor:
    """exp of the scores (B, Hk, group, n, C) minus their log-sum-exp, or minus the one given."""
    if p.lse is None:
        return t.softmax(-1)
    lse = torch.where(p.lse.isneginf(), 0.0, p.lse).to(t.dtype)
    return (t - lse.view(*t.shape[:-1], 1)).clamp_max_(LARGE).exp_()


def pool(r: Tensor, p: Problem) -> Tensor:
    """Pooled scores (..., M) of the visible candidates (..., C); -inf if none is visible."""
    kernel, stride, padding = p.spread
    if p.table is not None:
        rows = (
            F.pad(r, (0, 1), value=-torch.inf).movedim(-1, 0).flatten(1)
        )  # whole rows move faster
        at = torch.where(p.table < 0, r.shape[-1], p.table)
        if p.pooling == "max":
            found = rows.index_select(0, at.flatten()).unflatten(0, at.shape).amax(1)
            return found.T.unflatten(0, r.shape[:-1])
        r = rows.T.index_select(1, at.flatten()).unflatten(0, r.shape[:-1]).unflatten(-1, at.shape)
    else:
        r = F.pad(r, (padding, padding), value=-torch.inf).unfold(-1, kernel, stride)
    if p.pooling == "max":
        return r.amax(-1)
    seen = ~r.isneginf()
    count = seen.sum(-1)
    r = r if p.weight is None else r * p.weight.to(r.dtype)
    total = torch.where(seen, r, 0.0).sum(-1)
    total = total / count.clamp(min=1) if p.pooling == "mean" else total
    return total.masked_fill(count == 0, -torch.inf)


def parents(rows: int, within: Tensor) -> Tensor:
    """The parent of each of ``rows`` query blocks."""
    ratio = -(-rows // within.shape[2])
    return torch.arange(rows, device="cpu") // ratio


def is_child(within: Tensor, children: int, candidates: int) -> Tensor:
    """(..., rows, sp) to bool (..., rows, candidates): whether a candidate's parent is listed."""
    table = listed_blocks(within, -(-candidates // children))
    return table.repeat_interleave(children, -1)[..., :candidates]


def force(values: Tensor, forced: Tensor | None) -> Tensor:
    """``values`` with +inf for the forced candidates."""
    if forced is None:
        return values
    where = torch.where(forced < 0, values.shape[-1], forced).long()
    values = F.pad(values, (0, 1))
    return values.scatter(-1, where.expand(*values.shape[:3], -1), torch.inf)[..., :-1]
