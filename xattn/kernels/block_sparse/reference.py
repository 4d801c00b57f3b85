"""The definition of attention over lists of key blocks, in plain torch; stores N x S scores.

    J(i) = {j : block(j) in index[block(i)] and j in box(i)}
    s_ij = scale q_i . k_j + b_j,   lse_i = log sum_{j in J(i)} exp s_ij,
    o_i = sum_{j in J(i)} exp(s_ij - lse_i) v_j

Dense softmax attention whose bias is -inf outside J; each key head has H / Hk query heads.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn.kernels.block_sparse.block_lists import listed_blocks
from xattn.kernels.softmax import reference as softmax
from xattn.kernels.softmax.reference import Problem as DenseProblem


class Problem(NamedTuple):
    """The arguments of attention over lists of key blocks.

    See :func:`xattn.kernels.block_sparse.block_sparse_attention`; the box may be None.
    """

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, Hk, S, D)"""
    v: Tensor
    """(B, Hk, S, Dv)"""
    lists: Tensor
    """(B or 1, 1 or Hk or H, query blocks, entries) int32"""
    bias: Tensor | None
    """(B or 1, 1 or Hk or H, S)"""
    low: Tensor | None
    """(N, n) int32, of the box"""
    high: Tensor | None
    """(N, n) int32"""
    position: Tensor | None
    """(S, n) int32"""
    rank: Tensor | None
    """(B, H, S) int32"""
    limit: Tensor | None
    """(B, H, N) int32"""
    dilation: list[int]
    """n numbers"""
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


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    return softmax.forward(_dense(p))


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    found = softmax.backward(_dense(p), outputs, grads, wanted)
    if p.bias is not None and "bias" in wanted:
        found["bias"] = reduce_bias(found["bias"].sum(2), p.bias)
    return found


def listed_mask(p: Any) -> Tensor:
    """Whether the block of query i lists key block c: bool (B or 1, heads of the lists, N, blocks)."""
    table = listed_blocks(p.lists, p.key_blocks)
    return table.repeat_interleave(p.q_block, 2)[:, :, : p.q.shape[2]]


def visible_mask(p: Problem) -> Tensor:
    """Whether key j is in J(i): bool (B or 1, heads of the lists or H, N, S)."""
    seen = listed_mask(p).repeat_interleave(p.k_block, 3)[..., : p.k.shape[2]]
    if p.low is not None and p.high is not None and p.position is not None:
        seen = seen & box_mask(p.low, p.high, p.position, p.dilation)
    if p.rank is not None and p.limit is not None:
        token = torch.arange(p.q.shape[2], device=p.q.device)
        seen = expand_to_heads(seen, p.q) & rank_mask(p.rank, p.limit, token)
    return seen


def box_mask(low: Tensor, high: Tensor, position: Tensor, dilation: list[int]) -> Tensor:
    """Return whether each key lies in each query's box, bool (..., N, S), for boxes ``low`` to ``high``,
    (..., N, n) each, and the keys' positions (..., S, n)."""
    seen = None
    for t, d in enumerate(dilation):
        first, at = low[..., :, None, t], position[..., None, :, t]
        one = (at >= first).logical_and_(at <= high[..., :, None, t])
        if d > 1:
            one &= (at - first) % d == 0
        seen = one if seen is None else seen.logical_and_(one)
    assert seen is not None
    return seen


def rank_mask(rank: Tensor, limit: Tensor, token: Tensor, key: Tensor | None = None) -> Tensor:
    """Return whether each query may read each key, bool (..., N, S), from the ranks (..., S) of the keys
    and the limits (..., N) of some queries.

    Args:
        token: (..., N), the queries' indices; ``key``: (..., S), the keys' indices, by default 0, 1, ...
    """
    key = torch.arange(rank.shape[-1], device=rank.device) if key is None else key
    return (rank[..., None, :] <= limit[..., None]) | (key[..., None, :] == token[..., None])


def reduce_bias(db: Tensor, bias: Tensor) -> Tensor:
    """Sum a gradient (B, heads, S) over the heads that share a bias, to the shape and dtype of this
    bias."""
    if bias.shape[1] not in (1, db.shape[1]):
        db = db.unflatten(1, (bias.shape[1], -1)).sum(2)
    return db.sum_to_size(bias.shape).to(bias.dtype)


def _dense(p: Problem) -> DenseProblem:
    """The same attention with a bias (B, H, N, S) that is -inf where a key is not visible."""
    seen = expand_to_heads(visible_mask(p), p.q).expand(*p.q.shape[:3], p.k.shape[2])
    values = p.q.new_zeros((), dtype=softmax.wide(p.q.dtype))
    if p.bias is not None:
        values = expand_to_heads(p.bias[:, :, None], p.q)
    bias = torch.where(seen, values, -torch.inf)
    return DenseProblem(p.q, p.k, p.v, bias, p.scale, False, p.backend)


def expand_to_heads(x: Tensor, q: Tensor) -> Tensor:
    """Return ``x``, which has one entry per key head or per query head, with one entry per query head. If
    ``x`` has a single entry for all heads, it is returned unchanged."""
    return x if x.shape[1] == 1 else softmax.per_query_head(x, q)
