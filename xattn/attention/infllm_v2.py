"""InfLLM v2: queries score overlapping windows of keys, and read all tokens of the best blocks.

    A = softmax over the tokens of the chosen blocks of (q k^T / sqrt(D))
    r_c = sum_i softmax_c(q_i . m_c / sqrt(D)),   score of a block = max of r_c over windows c in it

m_c is the mean key of a window, ``kernel`` tokens long and one every ``stride`` tokens; the queries i
are those of a block, or one query in a causal call, in all heads of a key head. The blocks around the
query's own are always read. There is one softmax and nothing is learned, so short inputs can be dense:
below ``dense_below`` patches A is softmax attention, to the bit. Prefix tokens are read by all and see
all. The choice has no gradient. MiniCPM4, arXiv 2506.07900; InfLLM-V2, arXiv 2509.24663.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.attention.base import Kept, Mechanism, Size, register_attention, whole
from xattn.attention.inputs import Inputs
from xattn.attention.key_windows import KeyWindows, key_windows
from xattn.attention.operator import Operator, SoftmaxOperator
from xattn.attention.patterns import Pattern, pattern_operator
from xattn.attention.recall import Choice
from xattn.attention.segments import Blocks, select

SMALL = {"block": 2, "stride": 1, "dense_below": 0}


@register_attention(
    "infllm_v2",
    paper="arXiv 2509.24663",
    complexity="N (N / stride + k block) D",
    grid=(0, 1, 2),
    causal=True,
    grouped=True,
    training_free=True,
    cases=(
        {**SMALL, "selected": 1, "local": 0},
        {**SMALL, "selected": 2, "kernel": 3, "normaliser": "coarse", "backend": "cpu"},
        {},
    ),
    bench=({},),
    size=Size(
        "selected", "Chosen blocks", "Blocks beside the near ones", (1, 2, 4, 8, 16), 4,
        options={**SMALL},
    ),
)  # fmt: skip
class InfLLMv2(Mechanism):
    """Blocks chosen by overlapping windows, on a grid or in a row of tokens; causal over tokens in order.

    Lengths are tokens in a row, or along each side of a tile of the grid; longer than the row or side,
    they take all of it.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        selected: k, how many blocks are read beside those that always are.
        block: of a block; 64 in a row, 8 on a grid by default.
        stride: from one window to the next; a quarter of the block in a row, half on a grid.
        kernel: of a window; twice the stride.
        local: how many blocks on each side of the query's own are always read; causal, before it.
        first: how many blocks at the start are always read in a causal call.
        dense_below: with fewer tokens behind the prefix, attention is dense.
        normaliser: "exact", or "coarse" for the log-sum-exp over windows four times as long and as far
            apart (on a grid, twice along each side): scores are no probabilities then. A query before
            the end of the first of these is not normalised.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        selected: int = 8,
        block: int | None = None,
        stride: int | None = None,
        kernel: int | None = None,
        local: int = 1,
        first: int = 1,
        dense_below: int = 2048,
        normaliser: str = "exact",
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        lengths = {"block": block, "stride": stride, "kernel": kernel}
        self.lengths = tuple(x if x is None else whole(name, x) for name, x in lengths.items())
        self.selected = whole("selected", selected)
        counts = {"local": local, "first": first, "dense_below": dense_below}
        for name, value in counts.items():
            if value < 0:
                raise ValueError(f"{name}: got {value}; give 0 or more")
        self.always, self.dense_below = (local, first), dense_below
        if normaliser not in ("exact", "coarse"):
            raise ValueError(f"normaliser: got {normaliser!r}; give 'exact' or 'coarse'")
        self.normaliser = normaliser
        # Equal layers share them by the cache below; kept here so that torch.compile sees them.
        self._kept = Kept()

    def operator(self, inputs: Inputs) -> Operator:
        if self._is_dense(inputs):
            return SoftmaxOperator(
                inputs.q, inputs.k, inputs.scale, backend=self.backend, causal=inputs.causal
            )
        windows = self._windows(inputs)
        blocks, work = self._choose(inputs, windows)
        pattern = Pattern(blocks, windows.order, windows.rule)
        operator = pattern_operator(inputs, pattern, backend=self.backend)
        operator.context, operator.selection = blocks, work
        return operator

    def choice(self, inputs: Inputs) -> Choice | None:
        if self._is_dense(inputs):
            return None
        windows = self._windows(inputs)
        return Choice(self._choose(inputs, windows)[0], windows.order, windows.forced)

    def _is_dense(self, inputs: Inputs) -> bool:
        return inputs.q.shape[2] - inputs.prefix < max(self.dense_below, 1)

    def _choose(self, inputs: Inputs, windows: KeyWindows) -> tuple[Blocks, float]:
        """The blocks that are read, and the work of choosing them."""
        patches = inputs.q[:, :, inputs.prefix :].detach()
        patches = patches if windows.order is None else windows.order.apply(patches)
        keys = windows.means(inputs)
        count, forced = len(windows.table), windows.forced
        s = min(self.selected + forced.shape[3], count)
        lse, cost = None, keys.shape[2] / 2
        if self.normaliser == "coarse":
            lse, length = windows.coarse_lse(patches, inputs, self.backend)
            cost += length
        blocks, _ = select(
            patches,
            keys,
            s,
            q_block=windows.q_block,
            k_block=windows.k_block,
            softmax=True,
            spread=(windows.table, "max"),
            forced=forced,
            visible=windows.visible,
            lse=lse,
            scale=inputs.scale,
            backend=self.backend,
        )
        return blocks, patches.shape[2] * cost

    def _windows(self, inputs: Inputs) -> KeyWindows:
        q, grid = inputs.q, inputs.grid
        if grid is None or inputs.causal:
            grid = (q.shape[2] - inputs.prefix,)
        key = grid, inputs.causal, q.device
        if key not in self._kept:
            block, stride, kernel = self.lengths
            block = block or (64 if len(grid) == 1 else 8)
            stride = stride or max(1, block // 2 ** (3 - len(grid)))
            kernel = kernel or 2 * stride
            if kernel < stride:
                raise ValueError(f"kernel: got {kernel}; give at least the stride's {stride}")
            self._kept[key] = key_windows(grid, block, stride, kernel, *self.always, *key[1:])
        return self._kept[key]

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """``importance``: the windows' softmax, mean over heads and patches, for each patch the mean of
        the windows that hold it; ``class_importance``, the same of the first prefix token; ``selected``:
        share of the query blocks that read each block, for each key head."""
        grid, prefix = inputs.grid, inputs.prefix
        if grid is None or len(grid) != 2:
            return {}
        found, windows = {}, self._windows(inputs)
        if not inputs.causal:
            read = SoftmaxOperator(inputs.q, windows.means(inputs), inputs.scale)
            patches = inputs.q.shape[2] - prefix
            r = torch.zeros(len(inputs.q), 2, prefix + patches, device=inputs.q.device)
            r[:, 0, prefix:], r[:, 1, 0] = 1 / patches, 1.0
            mass = windows.on_tokens(read.vecmat(r, "mean"))
            found["importance"] = mass[:, :1]
            if prefix:
                found["class_importance"] = mass[:, 1:]
        if operator.context is not None:
            found["selected"] = windows.frequency(operator.context).unflatten(-1, grid)
        return found
