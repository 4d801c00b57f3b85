"""Key segments, and block lists that define which of their keys a query sees.

Most sparse mechanisms compute one softmax over a union of such segments, see
:mod:`xattn.attention.operators.lowering`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.inputs import to_heads
from xattn.attention.plans import cache_plan
from xattn.kernels.block_sparse.block_lists import check_index, listed_blocks
from xattn.kernels.block_sparse.box import Box as Rule
from xattn.kernels.block_sparse.box import causal
from xattn.kernels.block_sparse.reference import rank_mask
from xattn.kernels.block_topk import block_topk


@dataclass(frozen=True, eq=False)
class Blocks:
    """Which key blocks each query block reads.

    Attributes: ``index``, int32 (B or 1, H or 1, ceil(N / q_block), s), a list of key blocks for each query
    block, without duplicates, where -1 marks unused entries; ``q_block`` and ``k_block``, tokens per block.

    Example:
        >>> import torch
        >>> from xattn.attention import Blocks
        >>> Blocks(torch.tensor([[0], [1]]).view(1, 1, 2, 1), q_block=4, k_block=4).shares(2)
        tensor([[[0.5000, 0.5000]]])
    """

    index: Tensor
    q_block: int
    k_block: int
    known: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def to(self, device: torch.device | str) -> Blocks:
        return replace(self, index=self.index.to(device))

    def holds_all(self, count: int) -> bool:
        """Return whether every list contains all ``count`` blocks. This is cached until ``index`` changes.

        Raises:
            ValueError: if a number is out of range or occurs twice in a list.
        """
        if self.index.shape[-1] != count:
            return False
        counted = not self.index.is_inference()  # inference tensors have no version counter
        key = (count, self.index._version) if counted else None
        if key is None or self.known.get("key") != key:
            check_index(self.index, count)
            self.known.update(key=key, all=bool((self.index >= 0).all()))
        return bool(self.known["all"])

    def shares(self, count: int) -> Tensor:
        """Return the share of the lists that contain each of ``count`` blocks, (B or 1, H or 1, count), in
        [0, 1]."""
        return listed_blocks(self.index, count).float().mean(2)


@dataclass(frozen=True, eq=False)
class Segment:
    """Keys of one kind: ``k`` (B, H, S, D), ``v`` (B, H, S, Dv), and which of them are visible.

    Attributes: ``blocks``, the key blocks that each query block reads (all if None); ``rule``, which
    keys of these blocks a query sees; ``bias``, (B or 1, H or 1, S), added to a key's scores;
    ``offset``, (B or 1, H or 1, N), added to all scores of a query; ``shift``, a number added to all
    scores; ``marks``, (B, H or Hk, blocks, D), landmarks that each represent a key block; ``weight``,
    (blocks,), the weight of each landmark. With landmarks, the keys of a block have a softmax of their own;
    this requires ``blocks`` and excludes ``rule``, see :mod:`xattn.kernels.grouped`.

    Example:
        >>> import torch
        >>> from xattn.attention import Segment, attend
        >>> q, k, v = torch.rand(3, 1, 2, 8, 4)
        >>> halves = [Segment(k[:, :, :5], v[:, :, :5]), Segment(k[:, :, 5:], v[:, :, 5:])]
        >>> output, _ = attend(q, halves)  # one softmax over both
        >>> expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        >>> torch.allclose(output, expected, atol=1e-6)
        True
    """

    k: Tensor
    v: Tensor | None = None
    blocks: Blocks | None = None
    rule: Rule | None = None
    bias: Tensor | None = None
    offset: Tensor | None = None
    shift: float = 0.0
    marks: Tensor | None = None
    weight: Tensor | None = None


def visible_blocks(rule: Rule, q_block: int, k_block: int) -> Blocks:
    """List, for each query block, the key blocks whose bounding box overlaps the box that its queries see.

    With a dilation and ``k_block=1``, a key is also left out if all queries of the block have the same
    residue and the key has a different one.

    Example:
        >>> from xattn.attention.selection import causal_blocks
        >>> from xattn.attention import visible_blocks
        >>> blocks, rule = causal_blocks(256)
        >>> visible_blocks(rule, 64, 64).index.shape
        torch.Size([1, 1, 4, 4])
    """
    low, high = _per_block(rule.low, q_block, 0), _per_block(rule.high, q_block, 1)
    real = (low <= high).all(-1)  # (blocks, q_block): padding queries have empty boxes
    far = torch.iinfo(torch.int32).max
    first = low.masked_fill(~real[..., None], far).amin(1)
    last = high.masked_fill(~real[..., None], -far).amax(1)
    position = rule.position
    start, end = position, position
    if k_block > 1:
        padded = -(-len(position) // k_block) * k_block - len(position)
        groups = F.pad(position, (0, 0, 0, padded), value=-1).unflatten(0, (-1, k_block))
        key = (groups >= 0) & (groups < 2**30)  # neither padding from here nor from earlier steps
        start = groups.masked_fill(~key, far).amin(1)
        end = groups.masked_fill(~key, -far).amax(1)
    seen = torch.ones(len(first), len(start), dtype=torch.bool, device=position.device)
    for t, d in enumerate(rule.dilation):
        seen &= (start[None, :, t] <= last[:, None, t]) & (end[None, :, t] >= first[:, None, t])
        if k_block == 1 and d > 1:
            residue = low[..., t] % d
            own = first[:, t] % d
            same = ((residue == own[:, None]) | ~real).all(1)
            seen &= ~same[:, None] | (position[None, :, t] % d == own[:, None])
    most = max(1, int(seen.sum(1).max()))
    # A stable sort puts the visible blocks first and keeps them in order.
    index = (~seen).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    index = index.masked_fill(~seen.gather(1, index), -1)
    return Blocks(index.int()[None, None], q_block, k_block)


@cache_plan
def causal_blocks(n: int) -> tuple[Blocks, Rule]:
    """Return blocks and a rule under which token i of ``n`` sees tokens 0 to i."""
    rule = causal(n)
    return visible_blocks(rule, 64, 64), rule


def _per_block(x: Tensor, block: int, fill: int) -> Tensor:
    """Split (N, n) into (ceil(N / block), block, n). Rows added as padding are empty boxes (1 > 0)."""
    missing = -(-len(x) // block) * block - len(x)
    return F.pad(x, (0, 0, 0, missing), value=1 - fill).unflatten(0, (-1, block))


def select(
    q: Tensor,
    k_pooled: Tensor,
    s: int,
    *,
    q_block: int,
    k_block: int,
    **options: Any,
) -> tuple[Blocks, Tensor]:
    """Select, for every query block, the ``s`` key blocks whose pooled keys score best, without gradient.

    Args:
        q: (B, H, N, D); ``k_pooled``: (B, Hk, C, D), one key per block of ``k_block``.
        options: ``reduce``, ``softmax``, ``spread``, ``forced``, ``within`` and the other options of
            :func:`xattn.kernels.block_topk.block_topk`.

    Returns:
        the blocks, and their scores (B, Hk, ceil(N / q_block), s).

    Example:
        >>> import torch
        >>> from xattn.attention import select
        >>> q, pooled = torch.rand(1, 2, 8, 4), torch.rand(1, 2, 4, 4)  # 4 blocks of keys
        >>> blocks, scores = select(q, pooled, 2, q_block=4, k_block=2)
        >>> blocks.index.shape
        torch.Size([1, 2, 2, 2])
    """
    index, scores = block_topk(q, k_pooled, s, q_block=q_block, **options)
    return Blocks(index, q_block, k_block), scores


def visible(segment: Segment, queries: Tensor) -> Tensor:
    """Return which keys of a segment the queries (R,) see, bool, broadcastable to (B, H, R, S)."""
    keys = segment.k.shape[2]
    seen = torch.ones(1, 1, len(queries), keys, dtype=torch.bool, device=queries.device)
    if segment.blocks is not None:
        k_block = segment.blocks.k_block
        index = segment.blocks.index.to(queries.device)
        lists = index[:, :, queries // segment.blocks.q_block]
        blocks = listed_blocks(lists, -(-keys // k_block))
        seen = blocks.repeat_interleave(k_block, -1)[..., :keys]
    if segment.rule is not None:
        low, high, position, dilation, rank, limit = segment.rule.to(queries.device)
        low, high = low[queries][:, None], high[queries][:, None]
        for t, step in enumerate(dilation):
            at, first = position[:, t], low[..., t]
            seen = seen & (first <= at) & (at <= high[..., t]) & ((at - first) % step == 0)
        if rank is not None and limit is not None:
            seen = to_heads(seen, rank.shape[1]) & rank_mask(rank, limit[:, :, queries], queries)
    return seen
