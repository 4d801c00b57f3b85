"""Hierarchically pruned attention: each block of queries reads the blocks that a search in a tree finds.

    A_i = softmax over the keys of the blocks in J(block of i),   |J| = keep / block

A round of the search scores pooled keys, keeps the best and goes on with their parts, so that no query
is scored with every key: N keep log(N / keep) D at most. Tokens of a grid stand in Z-order, where the
nodes of the tree are squares. The blocks at hand and prefix tokens are always read. With as many tokens
as a query reads it is dense attention. Lists can serve several calls. Lee et al., arXiv 2406.09827.

The best key blocks of every query block by search in a tree, without scoring every block.

A node is a run of neighbouring key blocks. Each round scores the children of the nodes that the last
one kept, and keeps the s best, until nodes are single blocks: log(M / s) rounds for M blocks. It rests
on neighbours having similar scores. Two trees:

    by quarters   runs of 4^l blocks; score = mean query of the block . mean key of the node
    by halves     s runs at first, each then split in two; score = the largest q . k of every second
                  query of the block and the keys of the node's first block

The second is the search of HiP attention (Lee et al., arXiv 2406.09827). Along a Z-order the nodes of
the first are squares. Nothing here has a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.base import Kept, Mechanism, register_attention, whole
from xattn.attention.inputs import Inputs
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.operators.patterns import Pattern, pattern_operator
from xattn.attention.order import Order, blocks_to_tokens, take_rows, z_order
from xattn.attention.recall import Choice
from xattn.attention.selection import Blocks, Rule, visible_blocks
from xattn.kernels.backend import own_precision
from xattn.kernels.block_sparse.box import causal as causal_rule
from xattn.kernels.block_sparse.box import permuted
from xattn.kernels.softmax.reference import widen

GATHERED = 2**22  # bytes of keys that the search by halves gathers at a time


class Tokens(NamedTuple):
    """Queries and keys (B, H, N, D) in an order in which blocks are runs, padding included."""

    q: Tensor
    k: Tensor
    block: int
    """Tokens in a block of queries, and in one of keys."""
    real: Tensor | None = None
    """bool (N,), which are no padding; None: all."""

    def in_blocks(self, x: Tensor) -> Tensor:
        """(B, H, N, D) to (B, H, M, block, D), zeros in padding."""
        if self.real is not None:
            x = x.masked_fill(~self.real[:, None], 0.0)
        missing = -x.shape[2] % self.block
        return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, (-1, self.block))

    def counts(self) -> Tensor:
        """(M,), the tokens of each block that are no padding, in float64."""
        ones = self.k.new_ones(1, 1, self.k.shape[2], 1, dtype=torch.float64)
        return self.in_blocks(ones).sum((0, 1, 3, 4))


class Runs(NamedTuple):
    """From which to before which block a run goes, int64; an empty one holds none."""

    start: Tensor
    end: Tensor


class Found(NamedTuple):
    """What a search returns."""

    lists: Tensor
    """int32 (B, H, M, s), forced blocks first; -1 = nothing."""
    rounds: tuple[Runs, ...]
    """What each round kept, (B, H, M, s)."""
    scores: float
    """How many products of a query and a key it took, for an image and head."""


@torch.no_grad()
def by_quarters(
    tokens: Tokens, s: int, edges: Tensor, forced: Tensor, causal: bool = False
) -> Found:
    """Search in runs of 4^l blocks, from the finest level with at most 4 s of them.

    Args:
        s: length of the lists.
        edges: LongTensor (places + 1,): the tree divides places, of which number c holds the blocks
            from ``edges[c]`` to before ``edges[c + 1]``, one or none.
        forced: int32 (1, 1, M, f), blocks that are always taken, each once; -1 = none.
        causal: whether a query block sees only blocks before it, beside the forced ones. It is then
            stood for by its first query, so that no query's choice depends on later tokens.
    """
    queries, means = _mean_queries(tokens, causal), _Means(tokens)
    levels = [edges]
    while len(levels[-1]) - 1 > 4 * s:
        levels.append(torch.cat([levels[-1][:-1:4], edges[-1:]]))
    children, own = (torch.arange(n, device=edges.device) for n in (4, queries.shape[2]))
    nodes, rounds, count = None, [], 0.0
    for level in reversed(levels):
        if nodes is not None:
            nodes = (4 * nodes[..., None] + children).flatten(3)
            nodes = nodes.masked_fill((nodes < 0) | (nodes >= len(level) - 1), -1)
        scores = _scores_of_nodes(queries, means, level, nodes, causal)
        count += scores.shape[2] * scores.shape[3]
        if nodes is None:
            nodes = torch.arange(scores.shape[3], device=edges.device).expand(scores.shape)
        start = level[nodes.clamp(min=0)]
        hidden = (nodes < 0) | (start == level[nodes.clamp(min=0) + 1])
        if causal:
            hidden |= start >= own[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
        if level is edges:
            scores, nodes = _with_forced(scores, start, forced)
        scores, order = scores.topk(min(s, scores.shape[3]), -1)
        nodes = nodes.gather(-1, order).masked_fill(scores.isneginf(), -1)
        at = nodes.clamp(min=0)
        end = at + 1 if level is edges else level[at + 1]
        at = at if level is edges else level[at]
        rounds.append(Runs(at, torch.where(nodes < 0, at, end)))
    assert nodes is not None
    return Found(_index(scores, nodes, s), tuple(rounds), count)


@torch.no_grad()
def by_halves(tokens: Tokens, s: int, forced: Tensor, causal: bool = False) -> Found:
    """Search by halves, from ``s`` runs of nearly equal length; arguments as in :func:`by_quarters`.

    Where it finds forced blocks itself, lists are shorter.
    """
    q = _sampled_queries(tokens, causal)
    batch, heads, m = q.shape[:3]
    device = q.device
    own = torch.arange(m, device=device)
    limit = own if causal else torch.full_like(own, m)  # how many blocks a query block may find
    edges = torch.arange(s + 1, device=device) * limit[:, None] // s
    edges = edges.expand(batch, heads, -1, -1)
    runs, rounds, count = Runs(edges[..., :-1], edges[..., 1:]), [], 0.0
    scores = runs.start.to(q.dtype)
    for _ in range((-(-m // s) - 1).bit_length()):
        middle = runs.start + (runs.end - runs.start) // 2
        start = torch.cat([runs.start, middle], -1)
        end = torch.cat([middle, runs.end], -1)
        scores = _largest(q, tokens, start.clamp(max=m - 1)).masked_fill(start == end, -torch.inf)
        count += m * q.shape[3] * start.shape[3] * tokens.block
        scores, order = scores.topk(s, -1)
        end = torch.where(scores.isneginf(), start.gather(-1, order), end.gather(-1, order))
        runs = Runs(start.gather(-1, order), end)
        rounds.append(runs)
    scores, blocks = _with_forced(scores, runs.start, forced)
    scores, order = scores.topk(s, -1)
    return Found(_index(scores, blocks.gather(-1, order), s), tuple(rounds), count)


class _Means:
    """Mean keys of runs of blocks, from sums over all blocks before each."""

    def __init__(self, tokens: Tokens) -> None:
        sums = tokens.in_blocks(widen(tokens.k)).sum(3).double().cumsum(2)
        self.dtype = widen(tokens.k.new_empty(0)).dtype
        self.sums = F.pad(sums, (0, 0, 1, 0))
        self.counts = F.pad(tokens.counts().cumsum(0), (1, 0))

    def of(self, start: Tensor, end: Tensor) -> Tensor:
        """(B, H, runs, D) for LongTensors (runs,); 0 for an empty run."""
        total = self.sums.index_select(2, end) - self.sums.index_select(2, start)
        return (total / (self.counts[end] - self.counts[start]).clamp(min=1)[:, None]).to(
            self.dtype
        )


def _scores_of_nodes(
    queries: Tensor, means: _Means, level: Tensor, nodes: Tensor | None, causal: bool
) -> Tensor:
    """Score of each node of a level with each query block, (B, H, M, C), for all of them or ``nodes``."""
    mean = means.of(level[:-1], level[1:])
    if nodes is None:
        scores = queries @ mean.transpose(-2, -1)
        nodes = torch.arange(len(level) - 1, device=level.device)
    else:
        near = take_rows(mean, nodes.clamp(min=0).flatten(2)).view(*nodes.shape, -1)
        scores = (near @ queries[..., None])[..., 0]
    if not causal:
        return scores
    # One node may reach beyond the blocks that a query block may see: it counts up to there.
    own = torch.arange(queries.shape[2], device=level.device)
    cut = torch.searchsorted(level, own, right=True) - 1
    part = (queries * means.of(level[cut], own)).sum(-1, keepdim=True)
    return torch.where(nodes == cut[:, None], part, scores)


def _mean_queries(tokens: Tokens, causal: bool) -> Tensor:
    """(B, H, M, D): the mean query of each block, or its first."""
    q = tokens.in_blocks(widen(tokens.q))
    if causal:
        return q[:, :, :, 0]
    return q.sum(3) / tokens.counts().clamp(min=1).to(q.dtype)[:, None]


def _sampled_queries(tokens: Tokens, causal: bool) -> Tensor:
    """(B, H, M, rows, D): every second query of each block, or its first; the mean for padding."""
    q = tokens.in_blocks(widen(tokens.q))
    if causal:
        return q[:, :, :, :1]
    mean = _mean_queries(tokens, causal)[:, :, :, None]
    real = tokens.in_blocks(torch.ones_like(tokens.q[..., :1], dtype=torch.bool))
    return torch.where(real, q, mean)[:, :, :, min(1, tokens.block - 1) :: 2]


def _largest(q: Tensor, tokens: Tokens, blocks: Tensor) -> Tensor:
    """The largest q . k of each query block's rows (B, H, M, rows, D) and each of the ``blocks``
    (B, H, M, C), a few query blocks at a time."""
    keys = tokens.in_blocks(widen(tokens.k))
    real = tokens.in_blocks(tokens.k.new_ones(1, 1, tokens.k.shape[2], 1, dtype=torch.bool))
    real, flat = real[0, 0, :, :, 0], keys.flatten(3)
    each = blocks.shape[0] * blocks.shape[1] * blocks.shape[3] * flat.shape[3] * flat.itemsize
    found = []
    for part in torch.arange(q.shape[2], device=q.device).split(max(1, GATHERED // each)):
        at = blocks[:, :, part]
        near = take_rows(flat, at.flatten(2)).view(*at.shape[:3], -1, q.shape[-1])
        top = (near @ q[:, :, part].transpose(-2, -1)).amax(-1).view(*at.shape, -1)
        found.append(top.masked_fill(~real[at], -torch.inf).amax(-1))
    return torch.cat(found, 2)


def _with_forced(scores: Tensor, blocks: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and numbers of blocks, and before them the forced ones, with score +inf."""
    again = (blocks[..., None] == forced[:, :, :, None]).any(-1)
    forced = forced.long().expand(*scores.shape[:3], -1)
    certain = torch.where(forced < 0, -torch.inf, torch.inf).to(scores.dtype)
    return (
        torch.cat([certain, scores.masked_fill(again, -torch.inf)], -1),
        torch.cat([forced, blocks], -1),
    )


def _index(scores: Tensor, blocks: Tensor, s: int) -> Tensor:
    """Lists of ``s`` blocks; -1 where their score is -inf."""
    index = blocks.masked_fill(scores.isneginf(), -1).int()
    return F.pad(index, (0, s - index.shape[-1]), value=-1)


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
    """Hierarchically pruned attention, on a grid or in a row of tokens; causal over tokens in a row.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        keep: k, how many tokens a query reads behind the prefix, in whole blocks. Up to so many, the
            layer is dense.
        block: tokens of a block, of queries and of keys alike; on a grid a power of 2. A power of 4
            makes squares.
        window: blocks with a token at most so many patches away from the block of the queries are
            always read; 0 leaves their own. They count among the ``keep``, which grows if it has to.
        search: "quarters", by the mean keys of squares, or "halves", the paper's, by single keys; see
            :mod:`xattn.attention.mechanisms.hip`.
        refresh: in evaluation, how many calls with inputs of one shape share their lists, for frames of
            a clip or steps of a sampler, until :meth:`forget`. In training mode each call searches.
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
        self.keep, self.block = whole("keep", keep), whole("block", block)
        self.window = whole("window", window) if window else 0
        self.refresh, self.search = whole("refresh", refresh), search
        if search not in ("quarters", "halves"):
            raise ValueError(f"search: got {search!r}; give 'quarters' or 'halves'")
        # Equal layers share them by the cache below; kept here so that torch.compile sees them.
        self._layouts, self._lists = Kept(), Kept()

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

    def _found(self, inputs: Inputs, layout: Layout, tokens: Tokens) -> tuple[Found, bool]:
        """The lists for a call, and whether it searched for them."""
        if self.refresh == 1 or self.training:
            return self._find(inputs, layout, tokens), True
        key = inputs.q.shape, inputs.grid, inputs.prefix, inputs.causal, inputs.q.device
        found, uses = self._lists.get(key, (None, 0))
        searched = found is None or uses == self.refresh
        if searched:
            found, uses = self._find(inputs, layout, tokens), 0
        self._lists[key] = found, uses + 1
        return found, searched

    def _find(self, inputs: Inputs, layout: Layout, tokens: Tokens) -> Found:
        with own_precision(inputs.q):
            if self.search == "halves":
                return by_halves(tokens, layout.s, layout.forced, inputs.causal)
            return by_quarters(tokens, layout.s, layout.edges, layout.forced, inputs.causal)

    def _tokens(self, inputs: Inputs, layout: Layout) -> Tokens:
        """Queries and keys behind the prefix, in order."""
        q, k, order = inputs.q[:, :, inputs.prefix :], inputs.k[:, :, inputs.prefix :], layout.order
        if order is not None:
            q, k = order.apply(q), order.apply(k)
        return Tokens(q, k, self.block, layout.real)

    def _layout(self, inputs: Inputs) -> Layout | None:
        """None: dense."""
        q, grid = inputs.q, inputs.grid
        if grid is None or inputs.causal:
            grid = (q.shape[2] - inputs.prefix,)
        key = grid, inputs.causal, q.device
        if key not in self._layouts:
            self._layouts[key] = layout(grid, self.keep, self.block, self.window, *key[1:])
        return self._layouts[key]

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """``received``: the attention that each patch gets from all tokens, mean over heads;
        ``survived``: for each round of the search, share of the query blocks that still kept it, mean
        over heads; ``selected``: share that read it, for each head. The last two where it searched."""
        grid, prefix = inputs.grid, inputs.prefix
        if grid is None or len(grid) != 2:
            return {}
        ones = operator.row_sums().new_ones(operator.shape[0], 1, operator.shape[2])
        found = {"received": operator.vecmat(ones, "mean")[..., prefix:]}
        layout = self._layout(inputs)
        if layout is not None:
            rounds = [runs_to_shares(*runs).mean(1) for runs in operator.context.rounds]
            found["survived"] = layout.on_tokens(torch.stack(rounds, 1), self.block)
            lists = Blocks(operator.context.lists, self.block, self.block)
            found["selected"] = layout.on_tokens(lists.shares(layout.count), self.block)
        return {name: x.unflatten(-1, grid) for name, x in found.items()}


def runs_to_shares(start: Tensor, end: Tensor) -> Tensor:
    """Share of the M lists of runs (B, H, M, s) that hold each of M blocks, (B, H, M)."""
    steps = torch.zeros(*start.shape[:2], start.shape[2] + 1, device=start.device)
    for at, sign in ((start, 1.0), (end, -1.0)):
        at = at.flatten(2)
        steps.scatter_add_(2, at, steps.new_full((), sign).expand(at.shape))
    return steps.cumsum(2)[..., :-1] / start.shape[2]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens behind the prefix stand, in M blocks."""

    s: int
    """How many blocks are read."""
    count: int
    """M"""
    tokens: int
    """Their number."""
    edges: Tensor
    """Of the tree by quarters, see :func:`~xattn.attention.mechanisms.hip.by_quarters`."""
    forced: Tensor
    """int32 (1, 1, M, f), blocks that are always read; -1 = none."""
    order: Order | None = None
    """None: as they are."""
    rule: Rule | None = None
    """Causal: which tokens are seen."""

    @property
    def real(self) -> Tensor | None:
        return None if self.order is None or not self.order.is_padded else ~self.order.padding

    def on_tokens(self, x: Tensor, block: int) -> Tensor:
        """Values of blocks, (..., M), for each token behind the prefix."""
        return blocks_to_tokens(x, block, self.order, self.tokens)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # cached tensors may serve training later
def layout(
    grid: tuple[int, ...],
    keep: int,
    block: int,
    window: int,
    causal: bool = False,
    device: torch.device | str = "cpu",
) -> Layout | None:
    """The blocks of a grid or of a row of tokens, cached; None if a query would read them all.

    Raises:
        ValueError: on a grid, a block that is no power of 2.
    """
    order, n = None, math.prod(grid)
    edges = torch.arange(-(-n // block) + 1, device="cpu")
    if len(grid) > 1:
        if block & (block - 1):
            raise ValueError(f"block: got {block} on a grid; give a power of 2")
        order, edges = _squares(grid, block)
    position = torch.cartesian_prod(*(torch.arange(length, device="cpu") for length in grid))
    position = position.view(n, -1).int()
    rule = Rule(position - window, position + window, position, (1,) * len(grid))
    rule = rule if order is None else permuted(rule, order.index)
    forced = visible_blocks(rule, block, block).index
    count = forced.shape[2]
    if causal:
        own = torch.arange(count, dtype=torch.int32, device="cpu")[:, None]
        forced = forced.masked_fill(forced > own, -1)
    s = max(-(-keep // block), forced.shape[3])
    if count <= s or n <= keep:
        return None
    return Layout(
        s, count, n, edges.to(device), forced.to(device), None if order is None else order.to(device),
        causal_rule(n).to(device) if causal else None,
    )  # fmt: skip


def _squares(grid: tuple[int, ...], block: int) -> tuple[Order, Tensor]:
    """Z-order without the blocks that hold padding alone, and how many others are before each place."""
    index = z_order(grid).index
    index = F.pad(index, (0, -len(index) % block), value=-1).view(-1, block)
    some = (index >= 0).any(1)
    index = index[some].flatten()
    places = (index >= 0).nonzero()[:, 0]
    inverse = torch.empty_like(places)
    inverse[index[places]] = places
    return Order(index, inverse), F.pad(some.cumsum(0), (1, 0))
