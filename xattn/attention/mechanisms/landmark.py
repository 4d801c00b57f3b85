"""Landmark attention: a query weights each block of tokens by its landmark, and then the tokens within it.

    g_i = softmax over the local tokens and the landmarks of the other blocks
    o_i = sum_{j local} g_ij v_j + sum_c g_ic sum_{j in c} w_ij v_j,    w_i. = softmax within block c

The local tokens are the prefix tokens and the tokens of the query's own block. In causal calls, the local
tokens end with the query, and only blocks that end before the query count as other blocks. In each row of
A, the weight of a token outside the query's own block is the weight of its block times its weight within
the block. Rows can be restricted to the blocks whose landmarks get the most weight. On a grid, a block is a
tile. The method is from Mohtashami and Jaggi, arXiv 2305.16300.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.base import Mechanism, check_whole, register_attention
from xattn.attention.inputs import Inputs
from xattn.attention.operators.algebra import PoolOperator
from xattn.attention.operators.base import Operator
from xattn.attention.operators.patterns import prefix_piece
from xattn.attention.operators.pooled_blocks import PooledBlocks, pooled_blocks
from xattn.attention.operators.segments import Ordered, Piece, SegmentsOperator
from xattn.attention.plans import cache_plan
from xattn.attention.recall import Choice
from xattn.attention.selection import Blocks, Rule, Segment, select
from xattn.kernels.block_sparse.box import causal as causal_rule
from xattn.kernels.softmax.reference import widen

LANDMARKS = ("mean", "token", "last")


@register_attention(
    "landmark",
    paper="arXiv 2305.16300",
    complexity="N^2 D, or N (k l + N / l) D for k blocks",
    grid=(0, 1, 2),
    causal=True,
    training_free=True,
    cases=(
        {"block": 3},
        {"block": 2, "selected": 3, "landmark": "token"},
        {"block": 2, "selected": 4, "backend": "cpu"},
    ),
    bench=({"block": 8, "selected": 9},),
    studies={"attention-maps": {"options": {"block": 4, "selected": 9}}},
)
class Landmark(Mechanism):
    """Landmark attention, on a grid or in a row of tokens; causal only in a row.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        block: l, the number of tokens per block in a row, or along each side of a tile on a grid.
        selected: k, the number of blocks that are read, including the query's own. The queries of a block
            together choose the blocks whose landmarks they weight most; in causal calls, each query chooses
            for itself. None reads all blocks.
        landmark: what the key of a block's landmark is. "mean": the mean of the block's keys, which counts
            once per token in the block. "token": what a token, learned for each head, reads from the
            block's keys by softmax; at first this is their mean. "last", only for tokens in a row: the key
            of the block's last token, so every l-th token of the layer is a landmark, as in the paper. The
            value of such a token is not read.

    Raises:
        ValueError: if ``landmark`` is unknown, ``selected`` is 1, or "last" is used with blocks of one
            token. Calling the mechanism also raises a ``ValueError`` if "last" does not suit the tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        block: int = 8,
        selected: int | None = None,
        landmark: str = "mean",
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        self.block, self.landmark = check_whole("block", block), landmark
        self.selected = None if selected is None else check_whole("selected", selected)
        if selected == 1:
            raise ValueError(
                "selected: got 1; give at least 2, because the query's own block counts as one"
            )
        if landmark not in LANDMARKS:
            raise ValueError(f"landmark: got {landmark!r}; choose one of {', '.join(LANDMARKS)}")
        if landmark == "last" and block < 2:
            raise ValueError("block: got 1; give at least 2, because one token is the landmark")
        if landmark == "token":
            self.token = nn.Parameter(torch.zeros(num_heads, dim // num_heads))

    def operator(self, inputs: Inputs) -> Operator:
        layout, prefix = self._layout(inputs), inputs.prefix
        order = layout.blocks.order
        q, k, marks = self._tokens(inputs, layout)
        weight = None if self.landmark == "last" else layout.counts.to(q.dtype)
        bias = None if layout.hidden is None else layout.hidden.to(q.dtype)[None, None]
        gated = Segment(k, bias=bias, marks=marks, weight=weight)
        lists = self._lists(inputs, layout, q, marks)
        at_hand = [Segment(k, None, layout.own, layout.rule, bias)]
        if lists is not None:
            at_hand.append(replace(gated, blocks=lists))
        columns = [layout.columns(prefix)] * len(at_hand)
        pieces = []
        if prefix:
            at_hand.append(Segment(inputs.k[:, :, :prefix]))
            columns.append(range(prefix))
            pieces.append(self._prefix_piece(inputs, layout, gated))
        pieces.append(Piece(q, tuple(at_hand), tuple(columns)))
        operator = SegmentsOperator(
            pieces,
            order,
            inputs.k.shape[2],
            inputs.scale,
            self.backend,
            causal=inputs.causal,
        )
        operator.context = lists if self.selected is not None else None
        if operator.context is not None:
            operator.selection = q.shape[2] * marks.shape[2] / 2
        return operator

    def choice(self, inputs: Inputs) -> Choice | None:
        """Choose blocks by the weight of their landmarks; return None if all blocks are read."""
        if self.selected is None:
            return None
        layout = self._layout(inputs)
        q, _, marks = self._tokens(inputs, layout)
        chosen = self._choose(inputs, layout, q, marks)
        return Choice(chosen, layout.blocks.order, layout.blocks.forced[..., :1])

    def _tokens(self, inputs: Inputs, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries and keys after the prefix, in block order, and the keys of the landmarks."""
        q, k, order = (
            inputs.q[:, :, inputs.prefix :],
            inputs.k[:, :, inputs.prefix :],
            layout.blocks.order,
        )
        if order is not None:
            q, k = order.apply(q), order.apply(k)
        return q, k, self.marks(inputs, layout, k)

    def marks(self, inputs: Inputs, layout: Layout, k: Tensor) -> Tensor:
        """Compute the keys of the landmarks, (B, H, M, D), from keys ``k`` in block order."""
        block, count = layout.blocks.k_block, layout.blocks.count
        if self.landmark == "mean":
            pooling = layout.blocks.pooling
            return PoolOperator(inputs.k, block, order=pooling, prefix=inputs.prefix).matvec(
                inputs.k
            )
        cells = F.pad(k, (0, 0, 0, count * block - k.shape[2])).unflatten(2, (count, block))
        if self.landmark == "last":
            return cells[:, :, :, -1]
        scores = inputs.scale * (widen(cells) @ widen(self.token)[:, None, :, None])[..., 0]
        share = scores.masked_fill(~layout.is_token, -torch.inf).softmax(-1)
        return (share[..., None].to(k.dtype) * cells).sum(3)

    def _lists(self, inputs: Inputs, layout: Layout, q: Tensor, marks: Tensor) -> Blocks | None:
        """Return the other blocks that each block of queries reads; None if there are none."""
        if layout.others is None or self.selected is None:
            return layout.others
        chosen = self._choose(inputs, layout, q, marks)
        # The first block is the query's own, which is not one of the others.
        return Blocks(chosen.index[..., 1:].contiguous(), chosen.q_block, chosen.k_block)

    def _choose(self, inputs: Inputs, layout: Layout, q: Tensor, marks: Tensor) -> Blocks:
        """Return the blocks whose landmarks have the largest weights, with the query's own block first."""
        assert self.selected is not None
        blocks = layout.blocks
        s = min(self.selected, blocks.count)
        own = blocks.forced[..., :1].contiguous()
        chosen, _ = select(
            q, marks, s, q_block=blocks.q_block, k_block=blocks.k_block, softmax=True, forced=own,
            visible=blocks.visible, scale=inputs.scale, backend=self.backend,
        )  # fmt: skip
        return chosen

    def _prefix_piece(self, inputs: Inputs, layout: Layout, gated: Segment) -> Piece:
        """Return the rows of the prefix tokens. These tokens see one another directly, and weight all
        blocks; in a causal call, they see no block."""
        if inputs.causal:
            return prefix_piece(inputs)
        q, prefix = inputs.q[:, :, : inputs.prefix], inputs.prefix
        every = torch.arange(layout.blocks.count, dtype=torch.int32, device=q.device)
        lists = Blocks(every[None, None, None], prefix, layout.blocks.k_block)
        seen = Segment(inputs.k[:, :, :prefix]), replace(gated, blocks=lists)
        return Piece(q, seen, (range(prefix), layout.columns(prefix)))

    def _layout(self, inputs: Inputs) -> Layout:
        q, grid = inputs.q, inputs.grid
        if grid is None or inputs.causal:
            grid = (q.shape[2] - inputs.prefix,)
        return layout(grid, self.block, self.landmark == "last", inputs.causal, device=q.device)

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``tokens``, the attention of the first prefix token, or of the mean patch if there is
        none, to each patch; and ``tiles``, the sum of ``tokens`` over each tile, which is the weight of the
        tile's landmark. Both are per head. With ``selected``, also return ``retrieved``, the share of all
        query blocks that read the tile, where reading one's own tile does not count."""
        grid, prefix = inputs.grid, inputs.prefix
        if grid is None or len(grid) != 2:
            return {}
        n = operator.shape[2]
        r = torch.full((operator.shape[0], 1, n), 1 / n, device=inputs.q.device)
        if prefix:
            r = torch.zeros_like(r).index_fill(
                2, torch.zeros(1, dtype=torch.long, device=r.device), 1.0
            )
        tokens = operator.vecmat(r)[:, :, 0, prefix:]
        blocks = self._layout(inputs).blocks
        order, size = blocks.order, blocks.k_block
        cells = tokens if order is None else order.apply(tokens, -1)
        cells = F.pad(cells, (0, -cells.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)
        found = {"tokens": tokens, "tiles": blocks.on_tokens(cells)}
        if operator.context is not None:
            found["retrieved"] = blocks.on_tokens(blocks.frequency(operator.context))
        return {name: x.unflatten(-1, grid) for name, x in found.items()}


@dataclass(frozen=True, eq=False)
class Layout:
    """How the tokens after the prefix are arranged in M blocks."""

    blocks: PooledBlocks
    own: Blocks
    others: Blocks | None
    """For each block, all other blocks or, if causal, those before it. None if there is only one block."""
    counts: Tensor
    """(M,), the number of tokens in each block."""
    is_token: Tensor
    """bool (M, l), True for places that hold a token."""
    hidden: Tensor | None
    """float (places,), -inf for keys that are not read; None if all are read."""
    rule: Rule | None = None
    """In causal calls, the rule for which tokens a query sees."""

    def columns(self, prefix: int) -> range | Ordered:
        """Return which token is at each place; token numbers start at ``prefix``."""
        order = self.blocks.order
        if order is not None:
            return Ordered(order, prefix)
        return range(prefix, prefix + len(self.blocks.pooling.inverse))


@cache_plan
def layout(grid: tuple[int, ...], block: int, last: bool, causal: bool) -> Layout:
    """Arrange a grid or a row of tokens in blocks. The result is cached.

    Args:
        last: whether each block ends with its landmark.

    Raises:
        ValueError: if ``last`` is used on a grid or, in a bidirectional call, with a number of tokens that
            is not a multiple of ``block``.
    """
    blocks = pooled_blocks(grid, block, block, block, 0, causal)
    size, count, order = blocks.k_block, blocks.count, blocks.order
    n = len(blocks.pooling.inverse)
    if last and (len(grid) > 1 or (not causal and n % block)):
        what = f"a grid of {grid}" if len(grid) > 1 else f"{n} tokens in a row"
        raise ValueError(
            f"landmark: got 'last' for {what}; give a multiple of block={block} tokens in a row, or "
            f"'mean' or 'token'"
        )
    token = torch.arange(n) if order is None else order.index
    real = F.pad(token, (0, count * size - len(token)), value=-1).view(count, size) >= 0
    seen = real.clone()
    if last:
        seen[real.all(1), -1] = False
    seen = seen.flatten()[: len(token)]
    hidden = torch.zeros(len(token)).masked_fill(~seen, -torch.inf)
    number = torch.arange(count, dtype=torch.int32)
    others = number[: count - 1].expand(count, -1)
    others = (
        others.masked_fill(others >= number[:, None], -1) if causal
        else others + (others >= number[:, None]).int()
    )  # fmt: skip
    return Layout(
        blocks, Blocks(number[None, None, :, None], size, size),
        Blocks(others.contiguous()[None, None], size, size) if count > 1 else None,
        real.sum(1), real, None if seen.all() else hidden,
        causal_rule(n) if causal else None,
    )  # fmt: skip
