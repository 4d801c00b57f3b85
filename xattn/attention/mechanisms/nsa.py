"""Native sparse attention sums three branches, weighted by gates that are computed from each token.

    A = diag(g_1) softmax(q K^T / sqrt(D)) P  +  diag(g_2) A_selected  +  diag(g_3) A_near
    g = sigmoid(W x + b),   K = P k,   P = means over blocks, learned sums, or network outputs

The first branch reads every block as one pooled key, the second reads the tokens of the n blocks that get
the most attention in the first, and the third reads nearby tokens. On a grid, a block is a tile, and the
queries of a tile choose together; in a row of tokens, bidirectional or causal, blocks may overlap. The
heads that share a key head choose together. By default, no gradient flows through the choice; optionally,
it has the gradient of the importance. Every branch reads the prefix tokens. As queries, prefix tokens have
the gates (0, 1, 0) and see all tokens. The method is from Yuan et al., arXiv 2502.11089. In the paper, a
network computes a pooled value from a block's values; here, it computes weights from the block's keys, so
that A V is linear in V.

With ``pooling="mlp"``, a small network reads the tokens of a block and their positions in it:

    net(x) = W_2 gelu(W_1 flatten(x + e) + b_1) + b_2,    x (l, D), e (l, D) the position embeddings

W_2 and b_2 start at zero. The network is built for a square of tokens; in a row, or on a grid that is
narrower than the square, it reads only the positions that exist, as if the others were zero. All heads
share one network.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.base import Mechanism, check_whole, register_attention
from xattn.attention.inputs import Inputs
from xattn.attention.mechanisms import gna
from xattn.attention.operators.algebra import GatedOperator, ProductOperator, SumOperator
from xattn.attention.operators.base import Operator
from xattn.attention.operators.patterns import pattern_operator
from xattn.attention.operators.pooled_blocks import PooledBlocks, pooled_blocks
from xattn.attention.recall import Choice
from xattn.attention.selection import Blocks


class BlockNetwork(nn.Module):
    """A network that maps blocks (..., l, D) to (..., out).

    Args:
        side: the side of the square.
        width: D, which is also the width of the hidden layer.
        out: the number of outputs; None gives one number per position, (..., l).
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
        """Apply the network to C blocks.

        Args:
            x: (..., C, l, D), the tokens of the blocks.
            tile: the sides of a block; in a row, there is only one.
            real: bool (C, l), True for places that hold a token.
        """
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
        """Select from x (side, side, ...) the positions of a tile, (l, ...); in a row, these are positions
        of the first row of the square."""
        return x[0, : tile[0]] if len(tile) == 1 else x[: tile[0], : tile[1]].flatten(0, 1)


class CompressedOperator(ProductOperator):
    """The operator of the first branch. Its product with the layer's own values may be computed in advance
    and stored until it is requested."""

    known: tuple[Tensor, Tensor] | None = None
    """X and A X; dropped as soon as they have been used."""

    def matvec(self, x: Tensor) -> Tensor:
        known, self.known = self.known, None
        return known[1] if known is not None and known[0] is x else super().matvec(x)

    def matvec_and_keep(self, x: Tensor) -> Tensor:
        return super().matvec_and_keep(x) if self.known is None else self.matvec(x)


BRANCHES = ("compressed", "selected", "near")
START = (-2.0, -2.0, 2.0)  # initial gate biases: at first, nearby tokens have the most weight


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
    """Native sparse attention, on a grid or in a row of tokens; causal in token order.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        block: l, the number of tokens per pooled block in a row, or along each side of a tile on a grid.
        selected: n, the number of blocks that a query reads token by token, including those that are always
            chosen. In a causal call, it must be at least 3 unless ``forced`` is False.
        window: the number of tokens that the third branch reads along each side of the grid or row; if
            causal, these are the last ones up to the query. Where a window is longer than the grid, it
            covers the full length.
        stride: the distance between the starts of pooled blocks, only in a row; ``block`` by default.
        select_block: l', the number of tokens in each block that can be chosen, only in a row; ``block`` by
            default.
        pooling: how tokens are pooled. "mean": the mean over the block. "conv": the mean after each token
            has been multiplied by a factor, which is learned for each head and position in a block and
            starts at 1. For tokens in a row, only the factors of the tile's first line are used; positions
            of a tile beyond the grid count as zeros. "mlp": the mean, corrected by two networks that read
            the block's keys and their positions. The output of one is added to the pooled key, and the
            output of the other scales the values.
        forced: whether a query's own block is always chosen; if causal, the first and the previous block
            are also always chosen.
        differentiable: whether a gradient flows through the choice (straight-through estimator). Each
            chosen block gets a factor whose value is 1 and whose gradient is that of the block's
            importance.

    Raises:
        ValueError: if a length or count is invalid, or ``stride`` is larger than ``block``. A causal call
            of the mechanism also raises a ``ValueError`` if ``selected`` is too small.
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
        self.selected, self.pooling, self.forced = (
            check_whole("selected", selected),
            pooling,
            forced,
        )
        stride = check_whole("stride", block if stride is None else stride)
        chosen = check_whole("select_block", block if select_block is None else select_block)
        self.blocks, self.window = (
            (check_whole("block", block), stride, chosen),
            check_whole("window", window),
        )
        if stride > block:
            raise ValueError(f"stride: got {stride}; give at most {block}, the length of a block")
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
        # With prefix tokens, the choice uses a separate softmax.
        if inputs.causal and not inputs.prefix:
            output, lse = read.attend(values.matvec(inputs.v))  # type: ignore[attr-defined]
            compressed.known = inputs.v, output
        chosen = self._choose(inputs, blocks, pooled, lse)
        share = None
        if self.differentiable:
            if lse is None:
                lse = read.attend(keys)[1][:, :, inputs.prefix :]  # type: ignore[attr-defined]
            importance = blocks.importance(inputs, pooled, lse, chosen)
            # The logarithm of the factor: its value is 0, and it has the gradient of the importance.
            share = (importance - importance.detach()).to(inputs.q.dtype)
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
        """Return the blocks that the second branch chooses."""
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
        """Compute the gates g of the three branches, (3, B, H, N) in [0, 1]; for prefix tokens, they are
        (0, 1, 0)."""
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
                f"selected: got {self.selected}; a causal call of nsa always reads 3 blocks, so give at "
                f"least 3, or forced=False"
            )
        if grid is None or inputs.causal:
            grid = (q.shape[2] - inputs.prefix,)
        return pooled_blocks(grid, *self.blocks, inputs.prefix, inputs.causal, device=q.device)

    def _pooled(self, inputs: Inputs, blocks: PooledBlocks) -> tuple[Tensor, Operator]:
        """Return the pooled keys (B, Hk, R + C, D), with the R prefix tokens first, and the operator that
        pools values."""
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
        """Return the weights of the tokens in a block, (Hk, tokens), for keys (0) or values (1); None for a
        plain mean."""
        if self.pooling == "mean":
            return None
        row, *column = blocks.tile
        weight = self.weight[which, :, 0, :row]
        if column:
            weight = self.weight[which, :, :row, : column[0]].flatten(1)
        weight = weight.unflatten(0, (inputs.k.shape[1], -1)).mean(1)
        return weight / weight.shape[1]

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``importance``, the attention that the compressed branch gives to each block, averaged
        over heads and patches; ``selected``, the share of the query blocks that chose it, per key head; and
        ``gate_compressed``, ``gate_selected`` and ``gate_near``, the gates g of the patches, per head."""
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
