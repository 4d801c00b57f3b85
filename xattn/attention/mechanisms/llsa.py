"""Log-linear sparse attention: queries read the tokens of a few blocks, and coarser means of all the rest.

    A = softmax of q_i . k_c / sqrt(D) + log n_c    over tokens c and means c of B, B^2, ..., B^L tokens
    I_l(m) = the K means c with the largest q_m^l . k_c^l among the children of I_{l+1}(m div B),
             and at level L among all means

k_c and v_c are means of n_c tokens, and q_m^l is a mean of B^l queries. Query i reads the tokens of the K
blocks (of B tokens each) that its block chose at level 1, the means of each level l < L inside the blocks
chosen at level l + 1, and all means of level L. A token that is read at several levels counts several
times, as in the paper. No gradient flows through the choice of blocks, but the means of keys and values do
have gradients. Prefix tokens see all tokens and are read by all. The method is from arXiv 2512.16615.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xattn.attention.base import Mechanism, check_whole, register_attention
from xattn.attention.inputs import Inputs
from xattn.attention.operators.base import Operator
from xattn.attention.operators.patterns import prefix_piece
from xattn.attention.operators.pyramid import Pyramid, PyramidAttention, PyramidOperator, pyramid
from xattn.attention.operators.segments import Piece, SegmentsOperator
from xattn.attention.recall import Choice
from xattn.attention.selection import Blocks, Segment, select

TOP = 64  # default limit for the number of means on the top level


@register_attention(
    "llsa",
    paper="arXiv 2512.16615",
    complexity="N K B log(N) D",
    grid=(0, 1, 2),
    causal=True,
    training_free=True,
    cases=(
        {"block": 2, "selected": 2, "levels": 2},
        {"block": 2, "selected": 1, "levels": 3, "backend": "cpu"},
        {"selected": 1},
    ),
    bench=({}, {"levels": 3}),
    studies={"attention-maps": {"options": {"block": 2, "levels": 2}}},
)
class LLSA(Mechanism):
    """Log-linear sparse attention on a grid or in a row of tokens; causal in token order.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        selected: K, the number of blocks chosen at each level. In a causal call, this includes the query's
            own block. If a level has fewer blocks, all of them are chosen.
        block: on a grid, the number of tokens along each side of a tile, by default 4; in a row, the number
            of tokens per block, by default 16. B is the number of tokens in a tile or block.
        levels: L; by default the smallest number that leaves at most 64 means at the top. A level with a
            single mean is always the last one.
        enrich: whether queries read means at all; if False, they read only tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        selected: int = 8,
        block: int | None = None,
        levels: int | None = None,
        enrich: bool = True,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        self.selected, self.enrich = check_whole("selected", selected), enrich
        self.block = block if block is None else check_whole("block", block)
        if block == 1:
            raise ValueError("block: got 1; give at least 2 tokens")
        self.levels = levels if levels is None else check_whole("levels", levels)

    def operator(self, inputs: Inputs) -> Operator:
        made, prefix = self._pyramid(inputs), inputs.prefix
        values = PyramidOperator(inputs.k, made, prefix)
        keys, queries = made.means(inputs.k, prefix), made.order.apply(inputs.q[:, :, prefix:])
        lists = self.choose(made, inputs, queries, [x.detach() for x in keys])
        fine = Blocks(lists[1], made.block, made.block)
        rules = made.rules or (None,) * (made.levels + 1)
        segments = [Segment(keys[0], None, fine, rules[0], made.bias(0, keys[0]))]
        columns = [values.columns(0)]
        for level in range(1, made.levels + 1 if self.enrich else 1):
            blocks = made.top
            if level < made.levels:
                blocks = Blocks(lists[level + 1], made.block ** (level + 1), made.block)
            bias, shift = made.bias(level, keys[level]), made.shift(level)
            segments.append(Segment(keys[level], None, blocks, rules[level], bias, shift=shift))
            columns.append(values.columns(level))
        pieces = self._pieces(inputs, made, keys[0], queries, segments, columns)
        read = SegmentsOperator(pieces, made.order, values.shape[2], inputs.scale, self.backend)
        operator = PyramidAttention(read, values, causal=inputs.causal)
        operator.hides = not self.enrich
        operator.context = lists
        candidates = [
            len(made.counts[-1]),
            *(min(self.selected * made.block, len(c)) for c in made.counts[-2:0:-1]),
        ]
        rows = [len(c) for c in made.counts[:0:-1]]
        operator.selection = sum(a * b for a, b in zip(rows, candidates, strict=True)) / 2
        return operator

    def choice(self, inputs: Inputs) -> Choice:
        """Return the blocks chosen at level 1."""
        made, prefix = self._pyramid(inputs), inputs.prefix
        keys, queries = made.means(inputs.k, prefix), made.order.apply(inputs.q[:, :, prefix:])
        lists = self.choose(made, inputs, queries, keys)[1]
        forced = None
        if inputs.causal:
            forced = torch.arange(lists.shape[2], dtype=torch.int32, device=lists.device)
            forced = forced[None, None, :, None]
        return Choice(Blocks(lists, made.block, made.block), made.order, forced)

    def _pieces(
        self, inputs: Inputs, made: Pyramid, keys: Tensor, queries: Tensor,
        segments: list[Segment], columns: list[range],
    ) -> list[Piece]:  # fmt: skip
        """Return the rows of A in pieces: the prefix tokens, if there are any, and the other tokens, which
        also read the prefix tokens."""
        prefix = inputs.prefix
        if not prefix:
            return [Piece(queries, tuple(segments), tuple(columns))]
        own, places = Segment(inputs.k[:, :, :prefix]), range(prefix)
        if inputs.causal:
            first = prefix_piece(inputs)
        else:
            every = Segment(keys, bias=segments[0].bias)
            first = Piece(inputs.q[:, :, :prefix], (every, own), (columns[0], places))
        return [first, Piece(queries, (*segments, own), (*columns, places))]

    @torch.no_grad()
    def choose(
        self, made: Pyramid, inputs: Inputs, queries: Tensor, keys: list[Tensor]
    ) -> dict[int, Tensor]:
        """Compute I_l for each level l: int32 (B, H, M / B^l, K).

        In a causal call, the first query of a block chooses for the whole block: always the block itself,
        and the best of the earlier ones.
        """
        means = [queries.detach()]
        if inputs.causal:
            means += [means[0][:, :, :: made.block**level] for level in range(1, made.levels + 1)]
        else:
            for _ in range(made.levels):
                means.append(means[-1].unflatten(2, (-1, made.block)).mean(3))
        lists: dict[int, Tensor] = {}
        for level in range(made.levels, 0, -1):
            q, k, count = means[level], keys[level], len(made.counts[level])
            if made.padded:  # a mean of no tokens gets the lowest score
                empty = (made.counts[level] == 0).to(k.dtype) * (torch.finfo(k.dtype).min / 2)
                k = torch.cat([k, empty[:, None].expand(*k.shape[:3], 1)], -1)
                q = torch.cat([q, q.new_ones(*q.shape[:3], 1)], -1)
            own = torch.arange(count, dtype=torch.int32, device=q.device)
            parents = lists.get(level + 1)
            lists[level] = select(
                q,
                k,
                min(self.selected, count),
                q_block=1,
                k_block=1,
                within=parents,
                children=None if parents is None else made.block,
                forced=own[None, None, :, None] if inputs.causal else None,
                visible=own if inputs.causal else None,
                scale=1.0,
                backend=self.backend,
            )[0].index
        return lists

    def _pyramid(self, inputs: Inputs) -> Pyramid:
        grid = inputs.grid
        if grid is None or inputs.causal:
            grid = (inputs.q.shape[2] - inputs.prefix,)
        block, levels = self.block or (16 if len(grid) == 1 else 4), self.levels
        if levels is None:
            levels, sides = 1, [-(-n // block) for n in grid]
            while math.prod(sides) > TOP:
                levels, sides = levels + 1, [-(-n // block) for n in sides]
        return pyramid(grid, block, levels, inputs.causal, device=inputs.q.device)

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``level_1``, ``level_2``, ...: the share of the query blocks that chose each patch's block
        at that level, per head. Together, these maps form an image pyramid that shows what is read in
        detail."""
        grid = inputs.grid
        if grid is None or len(grid) != 2:
            return {}
        made, found = self._pyramid(inputs), {}
        for level, index in operator.context.items():
            lists = Blocks(index[:, :, made.is_token[level]], made.block, made.block)
            share = lists.shares(len(made.counts[level]))
            found[f"level_{level}"] = made.on_tokens(share, level).unflatten(-1, grid)
        return dict(sorted(found.items()))
