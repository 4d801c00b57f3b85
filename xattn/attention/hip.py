"""Hierarchically pruned attention: each block of queries reads the blocks that a search in a tree finds.

    A_i = softmax over the keys of the blocks in J(block of i),   |J| = keep / block

A round of the search scores pooled keys, keeps the best and goes on with their parts, so that no query
is scored with every key: N keep log(N / keep) D at most. Tokens of a grid stand in Z-order, where the
nodes of the tree are squares. The blocks at hand and prefix tokens are always read. With as many tokens
as a query reads it is dense attention. Lists can serve several calls. Lee et al., arXiv 2406.09827.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.base import Kept, Mechanism, register_attention, whole
from xattn.attention.inputs import Inputs
from xattn.attention.operator import Operator, SoftmaxOperator
from xattn.attention.order import Order, blocks_to_tokens, z_order
from xattn.attention.patterns import Pattern, pattern_operator
from xattn.attention.recall import Choice
from xattn.attention.segments import Blocks, Rule, visible_blocks
from xattn.attention.tree_search import Found, Tokens, by_halves, by_quarters
from xattn.kernels.backend import own_precision
from xattn.kernels.block_sparse.box import causal as causal_rule
from xattn.kernels.block_sparse.box import permuted


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
            :mod:`xattn.attention.tree_search`.
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
    """Of the tree by quarters, see :func:`~xattn.attention.tree_search.by_quarters`."""
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
