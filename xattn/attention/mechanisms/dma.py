"""Dynamic mask attention: for all queries, each head keeps only the w keys whose values score highest.

    b_j = a softplus(w_h . V_j),   A = softmax over the kept keys of (q k^T / sqrt(D) + b)
    block_smooth = s: a block of s keys is kept if more than half of them are among the w best, else dropped

V_j consists of the values of token j in all heads. The number a and the vector w_h are learned for each
head, through the term b; no gradient flows through the choice of keys. Without a causal mask, all queries
of a head share one list of keys, because b does not depend on the query. This takes 4 N w D operations and
needs no special kernel. In causal calls, each query keeps its own key and the best earlier ones, w in all.
The method is Trainable Dynamic Mask Sparse Attention, arXiv 2508.02124; the paper's exp(.) around b is
omitted, as in the authors' code.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.base import Mechanism, check_whole, register_attention
from xattn.attention.inputs import Inputs
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.operators.lowering import needs_grad
from xattn.attention.operators.patterns import Pattern, chosen_keys_operator, pattern_operator
from xattn.attention.recall import Choice
from xattn.attention.selection import Blocks, causal_blocks
from xattn.kernels.block_sparse.block_lists import listed_blocks

BLOCK = 64  # queries that share a list in a causal call


@register_attention(
    "dma",
    paper="arXiv 2508.02124",
    complexity="N w D",
    causal=True,
    cases=(
        {"window": 4},
        {"window": 4, "causal": True},
        {"window": 4, "causal": True, "backend": "cpu"},
        {"window": 64},
    ),
    bench=({"window": 128}, {"window": 512}),
    studies={"swap": ({"options": {"window": 64}},), "attention-maps": {"options": {"window": 64}}},
)
class DMA(Mechanism):
    """Dynamic mask attention.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        window: w, the number of keys that are kept in addition to the prefix tokens, whose b is 0.
        causal: whether every call is causal, so that a token sees only itself and earlier tokens. If False,
            only calls with ``causal=True`` are causal.
        block_smooth: s, the number of neighbouring keys in a block. All keys of a block are kept if more
            than half of them are among the w best, and dropped otherwise. If no block qualifies, the one
            with the most of these keys is kept (our own rule). Not available in causal calls.

    Raises:
        ValueError: if ``block_smooth`` is combined with causal attention, here or in a call.

    ``a`` starts at zero, so if ``window`` is at least N, the layer equals softmax attention until it is
    trained.
    """

    reads = ("values",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int = 128,
        causal: bool = False,
        block_smooth: int | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        self.window, self.causal = check_whole("window", window), causal
        self.block_smooth = (
            None if block_smooth is None else check_whole("block_smooth", block_smooth)
        )
        self._looks_ahead(causal)
        self.a = nn.Parameter(torch.zeros(num_heads))
        self.score = nn.Linear(dim, num_heads, bias=False)

    def key_bias(self, v: Tensor) -> Tensor:
        """Compute b, (B, H, N), from values (B, H, N, D)."""
        weight = self.score.weight.unflatten(1, (self.num_heads, -1))  # avoids copying v
        if needs_grad(v):  # in this form, the gradient has the memory layout of v
            z = (v @ weight.permute(1, 2, 0)).sum(1).transpose(1, 2)
        else:
            z = (weight.transpose(0, 1) @ v.transpose(2, 3)).sum(1)
        return self.a[:, None] * F.softplus(z)

    def kept(self, b: Tensor) -> Tensor:
        """Return the numbers of the w patches with the largest b, LongTensor (B, H, w), in ascending
        order."""
        return b.detach().topk(self.window, sorted=False).indices.sort(-1).values

    def kept_blocks(self, b: Tensor) -> Tensor:
        """Return the numbers of the blocks of ``block_smooth`` keys that are kept, int32 (B, H, 1, most),
        in ascending order; -1 = none."""
        assert self.block_smooth is not None
        size, n = self.block_smooth, b.shape[2]
        among = torch.zeros_like(b, dtype=torch.int64).scatter_(-1, self.kept(b), 1)
        count = -(-n // size)
        held = F.pad(among, (0, count * size - n)).unflatten(2, (count, size)).sum(-1)
        sizes = (n - size * torch.arange(count, device=b.device)).clamp_max(size)
        most = self._most(n)
        rank = torch.where(2 * held > sizes, held + n, held)  # puts kept blocks before all others
        found, index = rank.sort(dim=-1, descending=True, stable=True)
        found, index = found[..., :most], index[..., :most]
        left_out = found <= n
        left_out[..., 0] = False
        index = index.masked_fill(left_out, count).sort(-1).values
        return index.masked_fill(index == count, -1)[:, :, None].int()

    def _most(self, n: int) -> int:
        """Return the largest possible number of kept blocks. More than half of each must be among the w
        keys, and only the last block may be smaller than the others."""
        assert self.block_smooth is not None
        size = self.block_smooth
        return min(-(-n // size), self.window // (size // 2 + 1) + 1)

    def _looks_ahead(self, causal: bool) -> None:
        if causal and self.block_smooth is not None:
            raise ValueError(
                f"block_smooth: got {self.block_smooth} with causal attention, where a kept block would "
                "reveal later keys; give None"
            )

    def choice(self, inputs: Inputs) -> Choice | None:
        b = self.key_bias(inputs.v[:, :, inputs.prefix :])
        n = b.shape[2]
        self._looks_ahead(inputs.causal)
        if self.block_smooth is not None and self.window < n:
            return Choice(Blocks(self.kept_blocks(b), n, self.block_smooth))
        if self.causal or inputs.causal:
            return Choice(Blocks(causal_choice(b, self.window).by_query(self.window), 1, 1))
        return None if self.window >= n else Choice(Blocks(self.kept(b)[:, :, None].int(), n, 1))

    def operator(self, inputs: Inputs) -> Operator:
        b = self.key_bias(inputs.v[:, :, inputs.prefix :])
        self._looks_ahead(inputs.causal)
        if self.causal or inputs.causal:
            lists, rank, limit = causal_choice(b, self.window)
            rule = causal_blocks(b.shape[2], device=b.device)[1]._replace(rank=rank, limit=limit)
            pattern = Pattern(Blocks(lists, BLOCK, 1), rule=rule, bias=b)
            return pattern_operator(inputs.replace(causal=True), pattern, backend=self.backend)
        n, bias, keep = b.shape[2], F.pad(b, (inputs.prefix, 0)), None
        operator: Operator
        if self.window >= b.shape[2]:
            operator = SoftmaxOperator(
                inputs.q, inputs.k, inputs.scale, bias[:, :, None], None, self.backend, True
            )
        elif self.block_smooth is not None:
            among = listed_blocks(self.kept_blocks(b), -(-n // self.block_smooth))[:, :, 0]
            among = among.repeat_interleave(self.block_smooth, 2)[..., :n]
            most = min(n, self._most(n) * self.block_smooth)
            # All lists have the same length: the kept keys come first, followed by other keys, which
            # their bias hides.
            order = among.int().sort(dim=-1, descending=True, stable=True).indices[..., :most]
            bias = F.pad(b.masked_fill(~among, -torch.inf), (inputs.prefix, 0))
            operator = chosen_keys_operator(
                inputs, order + inputs.prefix, bias, backend=self.backend
            )
            keep = among
        else:
            keep = self.kept(b)
            operator = chosen_keys_operator(
                inputs, keep + inputs.prefix, bias, backend=self.backend
            )
        operator.context = b.detach(), keep
        return operator

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``importance``, b of each kept patch, and ``kept``, which is 1 for these patches, both
        per head. They are the same for all queries and classes. If all patches are kept, ``kept`` is
        left out."""
        if operator.context is None or inputs.grid is None or len(inputs.grid) != 2:
            return {}
        b, keep = operator.context
        if keep is None:
            return {"importance": b.unflatten(-1, inputs.grid)}
        kept = keep.to(b.dtype)
        if keep.dtype != torch.bool:
            kept = torch.zeros_like(b).scatter_(-1, keep, 1.0)
        return {
            "importance": (b * kept).unflatten(-1, inputs.grid),
            "kept": kept.unflatten(-1, inputs.grid),
        }


class CausalChoice(NamedTuple):
    """The keys that each query keeps: its own key, and the earlier keys whose rank is at most the query's
    limit.

    The list of the query's block contains all of these keys.
    """

    lists: Tensor
    """int32 (B, H, blocks, 64 + w - 1), first the keys of the block itself, then earlier ones;
    -1 = none."""
    rank: Tensor
    """int32 (B, H, N), the rank of each key; the key with the largest b has rank 0."""
    limit: Tensor
    """int32 (B, H, N), the limit of each query."""

    def by_query(self, window: int) -> Tensor:
        """Return the keys that each query keeps, int32 (B, H, N, w); -1 = none."""
        n = self.rank.shape[2]
        query = torch.arange(n, device=self.rank.device)[:, None]
        keys = self.lists.repeat_interleave(BLOCK, 2)[:, :, :n]
        rank = self.rank[:, :, None].expand(-1, -1, n, -1).gather(3, keys.clamp_min(0).long())
        kept = (keys == query) | ((keys < query) & (rank <= self.limit[..., None]))
        return keys.masked_fill(~kept, -1).sort(3, descending=True).values[..., :window]


@torch.no_grad()
def causal_choice(b: Tensor, window: int) -> CausalChoice:
    """Choose ``window`` keys for each query from b (B, H, N): its own key and the best earlier ones.

    Of the keys before a block of queries, only the w - 1 best can be kept. To find these keys, consecutive
    blocks are grouped into runs, and the search covers only the best keys before the block's run and the
    keys within the run. No step therefore stores more numbers than the largest of N^1.5 / 8, N (w + 64) /
    64 and 128 N.
    """
    n, others = b.shape[2], min(window - 1, b.shape[2])
    count = -(-n // BLOCK)
    run = math.isqrt(count - 1) + 1  # blocks per run
    runs = -(-count // run)
    order = b.argsort(dim=2, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        2, order, torch.arange(n, device=b.device).expand_as(order)
    )
    places = torch.arange(runs * run * BLOCK, device=b.device)
    padded = F.pad(rank, (0, len(places) - n), value=n)  # no key has rank n
    start = places[:: run * BLOCK, None]
    before = padded[:, :, None].masked_fill(places >= start, n)
    before = before.topk(others, largest=False).values  # (B, H, runs, w - 1)
    near = padded.view(*b.shape[:2], runs, 1, -1).expand(-1, -1, -1, run, -1)
    block = places[:run, None]
    near = near.masked_fill(places[: run * BLOCK] >= block * BLOCK, n)
    before = torch.cat([before[:, :, :, None].expand(-1, -1, -1, run, -1), near], 4)
    before = before.topk(others, largest=False).values.flatten(2, 3)[:, :, :count]
    own = padded.unflatten(2, (-1, BLOCK))[:, :, :count]
    keys = F.pad(order, (0, 1), value=-1).gather(2, before.flatten(2)).view(before.shape)
    token = places.view(-1, BLOCK)[:count]
    token = token.masked_fill(token >= n, -1).expand_as(own)
    # The limit is the rank up to which there are as many earlier keys as a query keeps in addition to its
    # own. Keys of the block displace at most 63 of the keys before it, so the limit is the rank of one of
    # the last 64 of those keys or of a key of the block.
    last = before[..., max(0, others - BLOCK) :]
    ranks, at = torch.cat([last, own], 3).sort(3)
    time = (
        at - last.shape[3]
    )  # position of the key in the block; negative for keys before the block
    earlier = time[:, :, :, None] < places[:BLOCK, None]
    place = (earlier.cumsum(4, dtype=torch.uint8) < last.shape[3]).sum(4)
    limit = ranks.gather(3, place).flatten(2)[:, :, :n] if others else rank.new_full(rank.shape, -1)
    return CausalChoice(torch.cat([token, keys], 3).int(), rank.int(), limit.int())
