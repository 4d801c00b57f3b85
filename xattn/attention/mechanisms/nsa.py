"""Native sparse attention: three branches, weighed token by token by gates that read the tokens.

    A = diag(g_1) softmax(q K^T / sqrt(D)) P  +  diag(g_2) A_selected  +  diag(g_3) A_near
    g = sigmoid(W x + b),   K = P k,   P = means over blocks, learned sums, or a network's

The first branch reads every block as one pooled key, the second reads the tokens of the n blocks to
which the first gives most, the third those close by. On a grid a block is a tile and the queries of a
tile choose together; in a row of tokens, bidirectional or causal, blocks may overlap. The heads of a
key head choose together; the choice has no gradient, or that of the importance. Prefix tokens are read
in every branch, and see all tokens, with the gates (0, 1, 0). Yuan et al., arXiv 2502.11089. There a
network makes a pooled value of a block's values; here one makes weights of its keys, so that A V is
linear in V.

A small network that reads the tokens of a block and their places in it.

    net(x) = W_2 gelu(W_1 flatten(x + e) + b_1) + b_2,    x (l, D), e (l, D) the embedding of the places

W_2 and b_2 start at zero. The network is made for a square of tokens; in a row, or where a grid is
narrower, it reads the places that there are, as if the others were zero. Heads share it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.base import Mechanism, register_attention, whole
from xattn.attention.inputs import Inputs
from xattn.attention.mechanisms import gna
from xattn.attention.operators.algebra import GatedOperator, ProductOperator, SumOperator
from xattn.attention.operators.base import Operator
from xattn.attention.operators.patterns import pattern_operator
from xattn.attention.operators.pooled_blocks import PooledBlocks, pooled_blocks
from xattn.attention.recall import Choice
from xattn.attention.selection import Blocks


class BlockNetwork(nn.Module):
    """(..., l, D) -> (..., out); with ``out=None`` a number for each place, (..., l).

    Args:
        side: of the square. ``width``: D, also of the hidden layer.
    """

    def __init__(self, side: int, width: int, out: int | None = None) -> None:
        super().__init__()
        self.side, self.each_place = side, out is None
        self.place = nn.Parameter(0.02 * torch.randn(side, side, width))
        self.inner = nn.Linear(side * side * width, width)
        self.outer = nn.Linear(width, side * side if out is None else out)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor, tile: tuple[int, ...], real: Tensor) -> Tensor:
        """Args: ``x`` (..., C, l, D); ``tile``, the sides of a block, in a row one; ``real``, bool (C, l),
        which places hold a token."""
        place = self._in_tile(self.place, tile)
        hidden = self.inner.weight.shape[0]
        inner = self.inner.weight.view(hidden, self.side, self.side, -1).permute(1, 2, 0, 3)
        inner = self._in_tile(inner, tile).transpose(0, 1).flatten(1)
        x = (x + place).masked_fill(~real[..., None], 0.0).flatten(-2)
        x = F.gelu(F.linear(x, inner, self.inner.bias))
        weight: Tensor = self.outer.weight
        bias: Tensor = self.outer.bias
        if self.each_place:
            weight = self._in_tile(weight.unflatten(0, (self.side, self.side)), tile)
            bias = self._in_tile(bias.unflatten(0, (self.side, self.side)), tile)
        return F.linear(x, weight, bias)

    def _in_tile(self, x: Tensor, tile: tuple[int, ...]) -> Tensor:
        """(side, side, ...) -> (l, ...): the places of a tile, or in a row those of the first row."""
        return x[0, : tile[0]] if len(tile) == 1 else x[: tile[0], : tile[1]].flatten(0, 1)


class CompressedOperator(ProductOperator):
    """The first branch. What it gives for the layer's own values may be known before it is asked."""

    known: tuple[Tensor, Tensor] | None = None
    """X and A X, forgotten when they were asked for."""

    def matvec(self, x: Tensor) -> Tensor:
        known, self.known = self.known, None
        return known[1] if known is not None and known[0] is x else super().matvec(x)

    def matvec_and_keep(self, x: Tensor) -> Tensor:
        return super().matvec_and_keep(x) if self.known is None else self.matvec(x)


BRANCHES = ("compressed", "selected", "near")
START = (-2.0, -2.0, 2.0)  # of the gates' biases: training begins with what is near


@register_attention(
    "nsa",
    paper="arXiv 2502.11089",
    complexity="N (N / l + n l + w) D",
    grid=(0, 1, 2),
    causal=True,
    grouped=True,
    cases=(
        {"block": 2, "selected": 3, "window": 3},
        {"block": 4, "selected": 3, "window": 3, "pooling": "conv", "backend": "cpu"},
        {"block": 4, "selected": 4, "window": 3, "pooling": "mlp"},
    ),
    bench=({"block": 8, "selected": 8, "window": 7},),
    studies={"attention-maps": {"options": {"block": 4}}},
)
class NSA(Mechanism):
    """Native sparse attention, on a grid or in a row of tokens; causal over tokens in their order.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        block: l, tokens of a pooled block: in a row, or along each side of a tile of the grid.
        selected: n, how many blocks a query reads token by token, those that are always chosen among
            them; at least 3 where a call is causal.
        window: tokens of the third branch: along each side of the grid or row; causal, the last ones
            up to the query. Longer than the grid, it holds all.
        stride: from one pooled block to the next, in a row only; ``block`` by default.
        select_block: l', tokens of a block that is chosen, in a row only; ``block`` by default.
        pooling: "mean"; "conv" for the mean of tokens times a factor that is learned for each head
            and place in a block (in a row, those of a tile's first row) and starts at 1, where places
            of a tile beyond the grid count as zeros; or "mlp" for the mean and what networks make of
            the block's keys and their places: added to its key, and as factors of its values.
        forced: whether a query's own block is always chosen; causal, also the first and the one before.
        differentiable: whether the choice has a gradient, by a factor for each chosen block that is 1
            and has the gradient of the block's importance (straight through).
    """

    reads = ("tokens",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        block: int = 8,
        selected: int = 8,
        window: int = 7,
        stride: int | None = None,
        select_block: int | None = None,
        pooling: Literal["mean", "conv", "mlp"] = "mean",
        forced: bool = True,
        differentiable: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        self.selected, self.pooling, self.forced = whole("selected", selected), pooling, forced
        stride = whole("stride", block if stride is None else stride)
        chosen = whole("select_block", block if select_block is None else select_block)
        self.blocks, self.window = (whole("block", block), stride, chosen), whole("window", window)
        if stride > block:
            raise ValueError(f"stride: got {stride}; give at most the block's {block}")
        self.differentiable = differentiable
        self.gate = nn.Linear(dim, 3 * num_heads)
        nn.init.zeros_(self.gate.weight)
        self.gate.bias.data = torch.tensor(START).repeat_interleave(num_heads)
        if pooling == "conv":
            self.weight = nn.Parameter(torch.ones(2, num_heads, block, block))  # keys, values
        if pooling == "mlp":
            self.key_network = BlockNetwork(block, dim // num_heads, dim // num_heads)
            self.value_network = BlockNetwork(block, dim // num_heads)

    def operator(self, inputs: Inputs) -> Operator:
        blocks = self._blocks(inputs)
        near = gna.window_pattern(inputs, self.window, "window")
        keys, values = self._pooled(inputs, blocks)
        read = blocks.read(inputs, keys, backend=self.backend)
        compressed = CompressedOperator([read, values], causal=inputs.causal)
        pooled, lse = keys[:, :, inputs.prefix :], None
        # With prefix tokens the choice has a softmax of its own.
        if inputs.causal and not inputs.prefix:
            output, lse = read.attend(values.matvec(inputs.v))  # type: ignore[attr-defined]
            compressed.known = inputs.v, output
        chosen = self._choose(inputs, blocks, pooled, lse)
        share = None
        if self.differentiable:
            if lse is None:
                lse = read.attend(keys)[1][:, :, inputs.prefix :]  # type: ignore[attr-defined]
            importance = blocks.importance(inputs, pooled, lse, chosen)
            share = (importance - importance.detach()).to(inputs.q.dtype)  # log of 1 + I - I
        selected = pattern_operator(
            inputs,
            blocks.pattern(chosen, share),
            backend=self.backend,
            every_row=self.forced or inputs.prefix > 0 or not inputs.causal,
        )
        branches = [compressed, selected, pattern_operator(inputs, near, backend=self.backend)]
        gates = self.gates(inputs)
        operator = SumOperator(
            [GatedOperator(a, g, signed=False) for a, g in zip(branches, gates, strict=True)]
        )
        operator.context = chosen
        return operator

    def choice(self, inputs: Inputs) -> Choice:
        """Of the second branch."""
        blocks = self._blocks(inputs)
        pooled = self._pooled(inputs, blocks)[0][:, :, inputs.prefix :]
        chosen = self._choose(inputs, blocks, pooled)
        forced = blocks.forced[..., : chosen.index.shape[3]] if self.forced else None
        return Choice(chosen, blocks.order, forced)

    def _choose(
        self, inputs: Inputs, blocks: PooledBlocks, pooled: Tensor, lse: Tensor | None = None
    ) -> Blocks:
        return blocks.choose(
            inputs, pooled, self.selected, forced=self.forced, lse=lse, backend=self.backend
        )

    def gates(self, inputs: Inputs) -> Tensor:
        """g of the three branches, (3, B, H, N) in [0, 1]; (0, 1, 0) at prefix tokens."""
        assert inputs.x is not None
        g = torch.sigmoid(self.gate(inputs.x[:, inputs.prefix :]))
        g = g.unflatten(2, (3, self.num_heads)).permute(2, 0, 3, 1)
        if not inputs.prefix:
            return g
        first = F.pad(g.new_ones(1), (1, 1)).view(3, 1, 1, 1).expand(*g.shape[:3], inputs.prefix)
        return torch.cat([first, g], 3)

    def _blocks(self, inputs: Inputs) -> PooledBlocks:
        q, grid = inputs.q, inputs.grid
        if inputs.causal and self.forced and self.selected < 3:
            raise ValueError(
                f"selected: got {self.selected}; a causal call of nsa always takes 3 blocks, give at "
                f"least 3, or forced=False"
            )
        if grid is None or inputs.causal:
            grid = (q.shape[2] - inputs.prefix,)
        return pooled_blocks(grid, *self.blocks, inputs.prefix, inputs.causal, device=q.device)

    def _pooled(self, inputs: Inputs, blocks: PooledBlocks) -> tuple[Tensor, Operator]:
        """Pooled keys (B, Hk, R + C, D), the prefix tokens' own in front, and what pools values."""
        prefix, k = inputs.prefix, inputs.k
        if self.pooling == "mlp":
            runs, real = blocks.runs(k[:, :, prefix:])
            added = F.pad(self.key_network(runs, blocks.tile, real), (0, 0, prefix, 0))
            share = real.to(k.dtype) / real.sum(-1, keepdim=True).clamp_min(1)
            weight = (1 + self.value_network(runs, blocks.tile, real)) * share
            keys = blocks.pool(k, prefix).matvec(k) + added
            return keys, blocks.pool(inputs.q, prefix, weight)
        pool = blocks.pool(k, prefix, self._weight(inputs, blocks, 0))
        return pool.matvec(k), blocks.pool(inputs.q, prefix, self._weight(inputs, blocks, 1))

    def _weight(self, inputs: Inputs, blocks: PooledBlocks, which: int) -> Tensor | None:
        """Weights of the tokens in a block, (Hk, tokens), for keys (0) or values (1)."""
        if self.pooling == "mean":
            return None
        row, *column = blocks.tile
        weight = self.weight[which, :, 0, :row]
        if column:
            weight = self.weight[which, :, :row, : column[0]].flatten(1)
        weight = weight.unflatten(0, (inputs.k.shape[1], -1)).mean(1)
        return weight / weight.shape[1]

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """``importance``: what the compressed branch gives to each block, mean over heads and
        patches; ``selected``: share of the query blocks that chose it, for each key head;
        ``gate_compressed``, ``gate_selected``, ``gate_near``: g of the patches, for each head."""
        grid, prefix, gated = inputs.grid, inputs.prefix, operator.terms  # type: ignore[attr-defined]
        if grid is None or len(grid) != 2:
            return {}
        blocks = self._blocks(inputs)
        count = inputs.q.shape[2] - prefix
        r = F.pad(inputs.q.new_full((len(inputs.q), 1, count), 1 / count), (prefix, 0))
        mass = gated[0].operator.factors[0].vecmat(r, "mean")[..., prefix:]
        if blocks.overlap is not None:
            mass = mass @ blocks.overlap.to(mass.dtype)
        found = {
            "importance": blocks.on_tokens(mass),
            "selected": blocks.on_tokens(blocks.frequency(operator.context)),
        }
        for name, term in zip(BRANCHES, gated, strict=True):
            found[f"gate_{name}"] = term.factor[..., prefix:]
        return {name: x.unflatten(-1, grid) for name, x in found.items()}
