"""Hierarchically pruned attention: each block of queries reads the key blocks selected by a tree search.

    A_i = softmax over the keys of the blocks in J(block of i),   |J| = keep / block

Each round of the search scores groups of keys, keeps the best groups and continues with their parts. No
query is therefore scored against every key, and the search takes at most N keep log(N / keep) D operations.
The tokens of a grid are arranged in Z-order. A query always reads its own block and the prefix tokens. If a
query may read as many tokens as there are, attention is dense. Several calls can share the result of one
search. The method is from Lee et al., arXiv 2406.09827.

The search selects the best key blocks for every query block without scoring all of them. A node is a run of
neighbouring key blocks. Each round scores the children of the nodes that the previous round kept, and keeps
the s best of them, until the nodes are single blocks. For M blocks, this takes log(M / s) rounds. The
search relies on neighbouring keys having similar scores. There are two kinds of tree:

    by quarters   runs of 4^l blocks; score = mean query of the block . mean key of the node
    by halves     s runs at first, each then split in two; score = the largest q . k between every second
                  query of the block and the keys of the node's first block

The search by halves is that of the paper. In Z-order, the nodes of the tree by quarters are squares. No
gradient flows through either search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.base import Mechanism, check_whole, register_attention
from xattn.attention.inputs import Inputs, on_cpu
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.operators.patterns import Pattern, pattern_operator
from xattn.attention.order import Order, blocks_to_tokens, take_rows, z_order
from xattn.attention.plans import cache_plan
from xattn.attention.recall import Choice
from xattn.attention.selection import Blocks, Rule, visible_blocks
from xattn.kernels.backend import without_autocast
from xattn.kernels.block_sparse.box import causal as causal_rule
from xattn.kernels.block_sparse.box import permute
from xattn.kernels.softmax.reference import widen

GATHERED = 2**22  # bytes of keys that the search by halves gathers at once


class PaddedTokens(NamedTuple):
    """Queries and keys (B, H, N, D) in an order in which each block's tokens are consecutive, padded with
    zeros."""

    q: Tensor
    k: Tensor
    is_token: Tensor
    """bool (M, block), True for places that hold a token."""

    def in_blocks(self, x: Tensor) -> Tensor:
        """Reshape x (B, H, N, D) to (B, H, M, block, D), with zeros as padding."""
        missing = self.is_token.numel() - x.shape[2]
        x = F.pad(x, (0, 0, 0, missing)) if missing else x
        return x.unflatten(2, tuple(self.is_token.shape))


class BlockRuns(NamedTuple):
    """Runs of blocks, int64: the first block of each run, and the block after its last one. If the two are
    equal, the run is empty."""

    start: Tensor
    end: Tensor


@dataclass(frozen=True, eq=False)
class Tree:
    """The nodes of all levels, from the coarsest to the finest, and one more node, "nothing", which
    represents all nodes that do not exist or hold no block."""

    sizes: tuple[int, ...]
    """The number of nodes on each level."""
    runs: BlockRuns
    """The blocks of each node, including "nothing". In a causal tree, M more runs follow for each level
    except the last. There is one for each query block: it begins with the node that contains the query
    block, and ends before the query block."""
    tokens: Tensor
    """float64, the number of tokens in each of these runs; empty runs count as 1."""
    children: Tensor
    """LongTensor (nodes, 4), the children of each node."""
    hidden: Tensor
    """bool (M, nodes of the first level), True for nodes that a query block may not choose."""
    limit: Tensor
    """LongTensor (levels, M, 1): the first node that a query block does not see."""
    own: Tensor
    """LongTensor (levels, M, 1): the node that contains a query block."""

    @classmethod
    def of(cls, edges: Tensor, s: int, counts: Tensor, causal: bool) -> Tree:
        """Create the tree over a row of places. Place c holds the blocks from ``edges[c]`` up to, but not
        including, ``edges[c + 1]``, that is, one block or none.

        Args:
            edges: LongTensor (places + 1,), the first block of each place, and the end of the last place.
            s: the number of nodes that a round keeps. The coarsest level is the finest one that has at most
                4 ``s`` nodes.
            counts: (M,), number of tokens in each block.
            causal: whether a query block sees only earlier blocks.
        """
        levels = [edges]
        while len(levels[0]) - 1 > 4 * s:
            levels.insert(0, torch.cat([levels[0][:-1:4], edges[-1:]]))
        sizes = [len(level) - 1 for level in levels]
        first = [sum(sizes[:i]) for i in range(len(sizes))]
        nothing, blocks = sum(sizes), torch.arange(len(counts))
        start, end = (
            torch.cat([*(x[part] for x in levels), torch.zeros(1, dtype=torch.long)])
            for part in (slice(-1), slice(1, None))
        )
        empty, children = start == end, torch.full((nothing + 1, 4), nothing)
        for i, size in enumerate(sizes[:-1]):
            below = torch.arange(4 * size).view(size, 4)
            known = torch.where(below < sizes[i + 1], below + first[i + 1], nothing)
            children[first[i] : first[i] + size] = known
        children = children.masked_fill(empty[children], nothing)
        own = torch.stack([torch.searchsorted(x, blocks, right=True) - 1 for x in levels])
        own = own + torch.tensor(first)[:, None]
        limit = torch.full_like(own, nothing)
        if causal:
            limit = torch.stack([
                torch.searchsorted(x[:-1].contiguous(), blocks) + begin
                for x, begin in zip(levels, first, strict=True)
            ])  # fmt: skip
            before = blocks.repeat(len(levels) - 1)
            start = torch.cat([start, start[own[:-1].flatten()]])
            end = torch.cat([end, before])
        hidden = (torch.arange(sizes[0]) >= limit[0][:, None]) | empty[: sizes[0]]
        until = F.pad(counts.double().cumsum(0), (1, 0))
        return cls(
            tuple(sizes), BlockRuns(start, end), (until[end] - until[start]).clamp(min=1), children, hidden,
            limit[..., None], own[..., None],
        )  # fmt: skip

    def means(self, tokens: PaddedTokens) -> Tensor:
        """Compute the mean keys of all runs, (B, H, runs, D); they are 0 for an empty run."""
        k = widen(tokens.k)
        sums = F.pad(tokens.in_blocks(k).sum(3).double().cumsum(2), (0, 0, 1, 0))
        total = sums.index_select(2, self.runs.end) - sums.index_select(2, self.runs.start)
        return (total / self.tokens[:, None]).to(k.dtype)

    def before_own(self, level: int, means: Tensor) -> Tensor:
        """For each query block, select from the ``means`` of a causal tree the mean key of the blocks that
        precede it in its own node, (B, H, M, D)."""
        count = self.own.shape[1]
        first = len(self.children) + level * count
        return means[:, :, first : first + count]


class SearchResult(NamedTuple):
    """The result of a search."""

    lists: Tensor
    """int32 (B, H, M, s), the selected blocks, starting with the forced ones; -1 = nothing."""
    rounds: tuple[BlockRuns | Tensor, ...]
    """What each round kept, (B, H, M, s): nodes of the tree in a search by quarters, which leaves out the
    last round, or runs in a search by halves."""
    scores: float
    """Number of query-key products that the search computed, per image and head."""


@torch.no_grad()
def search_quarters(
    tokens: PaddedTokens, s: int, tree: Tree, forced: Tensor, causal: bool = False
) -> SearchResult:
    """Search by quarters, that is, in runs of 4^l blocks.

    Args:
        tokens: the queries and keys.
        s: the length of the lists.
        tree: the tree of the blocks.
        forced: int32 (1, 1, M, f), blocks that are always selected, without repeats; -1 = none.
        causal: whether a query block sees only earlier blocks, in addition to the forced ones. If True, a
            query block is represented by its first query, so that no query's choice depends on later
            tokens.
    """
    queries, means = _mean_queries(tokens, causal), tree.means(tokens)
    nodes, rounds, count = torch.arange(tree.sizes[0], device=means.device), [], 0.0
    last = len(tree.sizes) - 1
    for level, size in enumerate(tree.sizes):
        if level == 0:
            scores, hidden = queries @ means[:, :, :size].transpose(-2, -1), tree.hidden
            nodes = nodes.expand(scores.shape)
        else:
            nodes = tree.children[nodes].flatten(3)
            near = take_rows(means, nodes.flatten(2)).view(*nodes.shape, -1)
            scores, hidden = (near @ queries[..., None])[..., 0], nodes >= tree.limit[level]
        if causal and level < last:
            # The node that contains the query block may extend beyond the blocks that this block may
            # see; only the blocks before the query block count.
            part = (queries * tree.before_own(level, means)).sum(-1, keepdim=True)
            scores = torch.where(nodes == tree.own[level], part, scores)
        scores = scores.masked_fill(hidden, -torch.inf)
        count += scores.shape[2] * scores.shape[3]
        if level < last:
            scores, order = scores.topk(min(s, scores.shape[3]), -1)
            nodes = nodes.gather(-1, order)
            nodes = nodes.masked_fill(scores.isneginf(), len(tree.children) - 1)
            rounds.append(nodes)
    return SearchResult(_best(scores, tree.runs.start[nodes], forced, s), tuple(rounds), count)


@torch.no_grad()
def search_halves(
    tokens: PaddedTokens, s: int, forced: Tensor, causal: bool = False
) -> SearchResult:
    """Search by halves, starting from ``s`` runs of nearly equal length.

    The arguments are those of :func:`search_quarters`. A list contains fewer than ``s`` blocks if the
    search itself selects some of the forced ones.
    """
    q = _sampled_queries(tokens, causal)
    batch, heads, m = q.shape[:3]
    device = q.device
    own = torch.arange(m, device=device)
    limit = own if causal else torch.full_like(own, m)  # number of blocks that may be selected
    edges = torch.arange(s + 1, device=device) * limit[:, None] // s
    edges = edges.expand(batch, heads, -1, -1)
    runs, rounds, count = BlockRuns(edges[..., :-1], edges[..., 1:]), [], 0.0
    scores = runs.start.to(q.dtype)
    for _ in range((-(-m // s) - 1).bit_length()):
        middle = runs.start + (runs.end - runs.start) // 2
        start = torch.cat([runs.start, middle], -1)
        end = torch.cat([middle, runs.end], -1)
        scores = _largest(q, tokens, start.clamp(max=m - 1)).masked_fill(start == end, -torch.inf)
        count += m * q.shape[3] * start.shape[3] * tokens.is_token.shape[1]
        scores, order = scores.topk(s, -1)
        end = torch.where(scores.isneginf(), start.gather(-1, order), end.gather(-1, order))
        runs = BlockRuns(start.gather(-1, order), end)
        rounds.append(runs)
    return SearchResult(_best(scores, runs.start, forced, s), tuple(rounds), count)


def _mean_queries(tokens: PaddedTokens, causal: bool) -> Tensor:
    """Compute the mean query of each block, (B, H, M, D); if causal, return its first query instead."""
    q = tokens.in_blocks(widen(tokens.q))
    if causal:
        return q[:, :, :, 0]
    return q.sum(3) / tokens.is_token.sum(1).clamp(min=1).to(q.dtype)[:, None]


def _sampled_queries(tokens: PaddedTokens, causal: bool) -> Tensor:
    """Return every second query of each block or, if causal, only its first: (B, H, M, rows, D). Padding is
    replaced by the mean query."""
    q = tokens.in_blocks(widen(tokens.q))
    if causal:
        return q[:, :, :, :1]
    mean = _mean_queries(tokens, causal)[:, :, :, None]
    q = torch.where(tokens.is_token[..., None], q, mean)
    return q[:, :, :, min(1, tokens.is_token.shape[1] - 1) :: 2]


def _largest(q: Tensor, tokens: PaddedTokens, blocks: Tensor) -> Tensor:
    """Compute the largest q . k between the queries of each query block, ``q`` (B, H, M, rows, D), and the
    keys of each of its ``blocks`` (B, H, M, C). Only a few query blocks are processed at a time."""
    real, flat = tokens.is_token, tokens.in_blocks(widen(tokens.k)).flatten(3)
    gathered = GATHERED if on_cpu(q) else 2**8 * GATHERED
    each = blocks.shape[0] * blocks.shape[1] * blocks.shape[3] * flat.shape[3] * flat.itemsize
    found = []
    for part in torch.arange(q.shape[2], device=q.device).split(max(1, gathered // each)):
        at = blocks[:, :, part]
        near = take_rows(flat, at.flatten(2)).view(*at.shape[:3], -1, q.shape[-1])
        top = (near @ q[:, :, part].transpose(-2, -1)).amax(-1).view(*at.shape, -1)
        found.append(top.masked_fill(~real[at], -torch.inf).amax(-1))
    return torch.cat(found, 2)


def _best(scores: Tensor, blocks: Tensor, forced: Tensor, s: int) -> Tensor:
    """Return lists of ``s`` blocks each: the forced ones and the best others. If there are fewer, -1 fills
    the rest."""
    again = (blocks[..., None] == forced[:, :, :, None]).any(-1)
    forced = forced.long().expand(*scores.shape[:3], -1)
    certain = torch.where(forced < 0, -torch.inf, torch.inf).to(scores.dtype)
    scores = torch.cat([certain, scores.masked_fill(again, -torch.inf)], -1)
    scores, order = scores.topk(min(s, scores.shape[3]), -1)
    index = torch.cat([forced, blocks], -1).gather(-1, order)
    index = index.masked_fill(scores.isneginf(), -1).int()
    return F.pad(index, (0, s - index.shape[-1]), value=-1) if index.shape[-1] < s else index


class EntryCache(dict[Any, Any]):
    """A dict that keeps only the last few entries added to it; copies and pickles of it are empty."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        if len(self) > KEPT:
            del self[next(iter(self))]

    def __reduce__(self) -> Any:
        return EntryCache, ()


KEPT = 8


@register_attention(
    "hip",
    paper="arXiv 2406.09827",
    complexity="N k log(N / k) D",
    grid=(0, 1, 2, 3),
    causal=True,
    training_free=True,
    cases=(
        {"keep": 12, "block": 4},
        {"keep": 12, "block": 4, "backend": "cpu"},
        {"keep": 12, "block": 4, "search": "halves"},
    ),
    bench=({"keep": 512},),
    studies={
        "swap": ({}, {"options": {"keep": 96, "block": 4}}),
        "attention-maps": {
            "options": {"keep": 96, "block": 4},
            "channels": {"survived": ("round",)},
        },
    },
)
class HiP(Mechanism):
    """Hierarchically pruned attention, on a grid or in a row of tokens; causal only in a row.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        keep: k, the number of tokens after the prefix that a query reads, rounded up to full blocks. If
            there are no more than k tokens, the layer is dense.
        block: the number of tokens per block, for queries and keys alike. On a grid it must be a power of
            2; a power of 4 makes the blocks of a 2-D grid squares.
        window: blocks that have a token within this many patches of the query block are always read; 0
            means only the query's own block. These blocks count towards ``keep``, which is increased if
            necessary.
        search: "quarters" compares mean keys of squares; "halves", the search of the paper, compares single
            keys. See :mod:`xattn.attention.mechanisms.hip`.
        refresh: in evaluation mode, the number of successive calls with inputs of the same shape that share
            one search, for example the frames of a clip or the steps of a sampler. :meth:`forget` drops the
            shared result. In training mode, every call searches.

    Raises:
        ValueError: if ``search`` is unknown. Calling the mechanism on a grid also raises a ``ValueError``
            if ``block`` is not a power of 2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        keep: int = 512,
        block: int = 64,
        window: int = 0,
        search: str = "quarters",
        refresh: int = 1,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        self.keep, self.block = check_whole("keep", keep), check_whole("block", block)
        self.window = check_whole("window", window) if window else 0
        self.refresh, self.search = check_whole("refresh", refresh), search
        if search not in ("quarters", "halves"):
            raise ValueError(f"search: got {search!r}; give 'quarters' or 'halves'")
        self._lists = EntryCache()

    def operator(self, inputs: Inputs) -> Operator:
        layout = self._layout(inputs)
        if layout is None:
            return SoftmaxOperator(
                inputs.q, inputs.k, inputs.scale, backend=self.backend, causal=inputs.causal
            )
        tokens = self._tokens(inputs, layout)
        found, searched = self._found(inputs, layout, tokens)
        blocks = Blocks(found.lists, self.block, self.block)
        operator = pattern_operator(
            inputs,
            Pattern(blocks, layout.order, layout.rule),
            backend=self.backend,
            ordered=(tokens.q, tokens.k),
        )
        operator.context, operator.selection = found, found.scores / 2 if searched else 0.0
        return operator

    def choice(self, inputs: Inputs) -> Choice | None:
        layout = self._layout(inputs)
        if layout is None:
            return None
        lists = self._find(inputs, layout, self._tokens(inputs, layout)).lists
        return Choice(Blocks(lists, self.block, self.block), layout.order, layout.forced)

    def forget(self) -> None:
        self._lists.clear()

    def _found(
        self, inputs: Inputs, layout: Layout, tokens: PaddedTokens
    ) -> tuple[SearchResult, bool]:
        """Return the result of the search for a call, and whether this call searched."""
        if self.refresh == 1 or self.training:
            return self._find(inputs, layout, tokens), True
        key = inputs.q.shape, inputs.grid, inputs.prefix, inputs.causal, inputs.q.device
        found, uses = self._lists.get(key, (None, 0))
        searched = found is None or uses == self.refresh
        if searched:
            found, uses = self._find(inputs, layout, tokens), 0
        self._lists[key] = found, uses + 1
        return found, searched

    def _find(self, inputs: Inputs, layout: Layout, tokens: PaddedTokens) -> SearchResult:
        with without_autocast(inputs.q):
            if self.search == "halves":
                return search_halves(tokens, layout.s, layout.forced, inputs.causal)
            return search_quarters(tokens, layout.s, layout.tree, layout.forced, inputs.causal)

    def _tokens(self, inputs: Inputs, layout: Layout) -> PaddedTokens:
        """Return the queries and keys after the prefix, in the order of the layout."""
        q, k, order = inputs.q[:, :, inputs.prefix :], inputs.k[:, :, inputs.prefix :], layout.order
        if order is not None:
            q, k = order.apply(q), order.apply(k)
        return PaddedTokens(q, k, layout.is_token)

    def _layout(self, inputs: Inputs) -> Layout | None:
        """Return the layout for a call; None if its attention is dense."""
        q, grid = inputs.q, inputs.grid
        if grid is None or inputs.causal:
            grid = (q.shape[2] - inputs.prefix,)
        lengths = self.keep, self.block, self.window
        return layout(grid, *lengths, inputs.causal, device=q.device)

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``received``, the attention that each patch gets from all tokens, averaged over heads.
        After a search, also return ``survived``, which is, for each round of the search, the share of query
        blocks that still kept a patch, averaged over heads; and ``selected``, the share of query blocks
        that read the patch, per head."""
        grid, prefix = inputs.grid, inputs.prefix
        if grid is None or len(grid) != 2:
            return {}
        ones = operator.row_sums().new_ones(operator.shape[0], 1, operator.shape[2])
        found = {"received": operator.vecmat(ones, "mean")[..., prefix:]}
        layout = self._layout(inputs)
        if layout is not None:
            rounds = [layout.runs(x) for x in operator.context.rounds]
            if self.search == "quarters":
                last = operator.context.lists.long()
                rounds.append(BlockRuns(last.clamp(min=0), last + 1))
            shares = [runs_to_shares(*runs).mean(1) for runs in rounds]
            found["survived"] = layout.on_tokens(torch.stack(shares, 1), self.block)
            lists = Blocks(operator.context.lists, self.block, self.block)
            found["selected"] = layout.on_tokens(lists.shares(layout.count), self.block)
        return {name: x.unflatten(-1, grid) for name, x in found.items()}


def runs_to_shares(start: Tensor, end: Tensor) -> Tensor:
    """Compute for each of M blocks the share of the M lists of runs (B, H, M, s) that contain it,
    (B, H, M)."""
    steps = torch.zeros(*start.shape[:2], start.shape[2] + 1, device=start.device)
    for at, sign in ((start, 1.0), (end, -1.0)):
        at = at.flatten(2)
        steps.scatter_add_(2, at, steps.new_full((), sign).expand(at.shape))
    return steps.cumsum(2)[..., :-1] / start.shape[2]


@dataclass(frozen=True, eq=False)
class Layout:
    """How the tokens after the prefix are arranged in M blocks."""

    s: int
    """The number of blocks that are read."""
    count: int
    """M, the number of blocks."""
    tokens: int
    """The number of tokens after the prefix."""
    tree: Tree
    """The tree of the search by quarters."""
    is_token: Tensor
    """bool (M, block), True for places that hold a token."""
    forced: Tensor
    """int32 (1, 1, M, f), blocks that are always read; -1 = none."""
    order: Order | None = None
    """The order that makes each block's tokens consecutive; None keeps the given order."""
    rule: Rule | None = None
    """In causal calls, the rule for which tokens a query sees."""

    def runs(self, kept: BlockRuns | Tensor) -> BlockRuns:
        """Return the runs of blocks that a round kept."""
        if isinstance(kept, BlockRuns):
            return kept
        return BlockRuns(self.tree.runs.start[kept], self.tree.runs.end[kept])

    def on_tokens(self, x: Tensor, block: int) -> Tensor:
        """Spread values of blocks, (..., M), over the tokens after the prefix, (..., N)."""
        return blocks_to_tokens(x, block, self.order, self.tokens)


@cache_plan
def layout(
    grid: tuple[int, ...],
    keep: int,
    block: int,
    window: int,
    causal: bool = False,
) -> Layout | None:
    """Arrange a grid or a row of tokens in blocks; return None if a query would read all of them.

    The result is cached.

    Raises:
        ValueError: if the block size on a grid is not a power of 2.
    """
    order, n = None, math.prod(grid)
    edges = torch.arange(-(-n // block) + 1)
    if len(grid) > 1:
        if block & (block - 1):
            raise ValueError(f"block: got {block} on a grid; give a power of 2")
        order, edges = _squares(grid, block)
    position = torch.cartesian_prod(*(torch.arange(length) for length in grid))
    position = position.view(n, -1).int()
    rule = Rule(position - window, position + window, position, (1,) * len(grid))
    rule = rule if order is None else permute(rule, order.index)
    forced = visible_blocks(rule, block, block).index
    count = forced.shape[2]
    if causal:
        own = torch.arange(count, dtype=torch.int32)[:, None]
        forced = forced.masked_fill(forced > own, -1)
    s = max(-(-keep // block), forced.shape[3])
    if count <= s or n <= keep:
        return None
    token = torch.arange(n) if order is None else order.index
    real = F.pad(token, (0, -len(token) % block), value=-1).view(count, block) >= 0
    tree = Tree.of(edges, s, real.sum(1), causal)
    return Layout(s, count, n, tree, real, forced, order, causal_rule(n) if causal else None)


def _squares(grid: tuple[int, ...], block: int) -> tuple[Order, Tensor]:
    """Return the Z-order without the blocks that consist only of padding, and for each place the number of
    remaining blocks before it."""
    index = z_order(grid).index
    index = F.pad(index, (0, -len(index) % block), value=-1).view(-1, block)
    some = (index >= 0).any(1)
    index = index[some].flatten()
    places = (index >= 0).nonzero()[:, 0]
    inverse = torch.empty_like(places)
    inverse[index[places]] = places
    return Order(index, inverse), F.pad(some.cumsum(0), (1, 0))
