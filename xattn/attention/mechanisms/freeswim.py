"""FreeSwim runs a vision transformer at a higher resolution than in training, without any more training.

    A_i = softmax over the window of i        for a patch i; a window has as many patches as in training
    A_r = softmax over all N tokens, scale sqrt(ln N / ln N_0 / D)       for a prefix token r

The windows are those of neighborhood attention. At the border they are shifted inwards, so every patch sees
``kernel`` x ``kernel`` = N_0 patches, the number of patches in a training image. Prefix tokens have no
window: the class token reads the whole image, with a scale that keeps the entropy of its attention as it
was for N_0 patches. This full branch is computed in every ``refresh``-th layer, and its rows of A are
reused in the layers between. On the training grid, A is dense attention.

The method is from Wu et al., arXiv 2511.14712. There, the full branch is cross-attention to text instead of
the attention of prefix tokens, and its results are reused between denoising steps instead of layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xattn.attention.base import Mechanism, Size, check_whole, register_attention
from xattn.attention.inputs import Inputs
from xattn.attention.mechanisms.gna import window_pattern
from xattn.attention.operators.algebra import GatedOperator, LowRankOperator, SumOperator
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.operators.patterns import Pattern, pattern_operator
from xattn.kernels.softmax import softmax_attention


@register_attention(
    "freeswim",
    paper="arXiv 2511.14712",
    complexity="N k^2 D",
    grid=(1, 2, 3),
    causal=True,
    training_free=True,
    cases=(
        {"kernel": 3},
        {"kernel": 2, "refresh": 2},
        {"kernel": (2, 4), "log_scale": False, "backend": "cpu"},
    ),
    bench=({"kernel": 14},),
    size=Size(
        "kernel",
        "Windows of the training size",
        "Window, patches a side",
        (7, 10, 14, 16, 20, 24, 28),
        14,
        "patches a side",
    ),
    studies={"swap": ({"positions": "tile"},), "attention-maps": {"positions": "tile"}},
)
class FreeSwim(Mechanism):
    """Windows of the training grid's size for patches, and all tokens for prefix tokens.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        kernel: the side lengths of the training grid in patches, as one number or one per dimension. On a
            three-dimensional grid, a single number applies to height and width only; time, the first
            dimension, is not restricted. On a one-dimensional grid and in a causal call, ``kernel`` is a
            number of tokens; in a causal call, these are the last tokens up to the query. Where a window is
            longer than the grid, it covers the full length.
        log_scale: whether the scores of prefix tokens are scaled to suit the number of patches that they
            see.
        refresh: in a converted model, the rows of the prefix tokens are computed in every ``refresh``-th
            layer and reused in the layers between.
        layer: the number of the layer, counted from 0; ``convert`` sets it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel: int | tuple[int, ...] = 14,
        log_scale: bool = True,
        refresh: int = 1,
        layer: int = 0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        kernel = tuple(kernel) if isinstance(kernel, list | tuple) else kernel
        for side in kernel if isinstance(kernel, tuple) else (kernel,):
            check_whole("kernel", side)
        self.kernel, self.log_scale = kernel, log_scale
        self.refresh, self.layer = check_whole("refresh", refresh), layer

    def operator(self, inputs: Inputs) -> Operator:
        pattern, prefix = self._pattern(inputs), inputs.prefix
        if not prefix or inputs.causal:
            return pattern_operator(inputs, pattern, backend=self.backend)
        if self.refresh == 1:
            factor = self.prefix_scale(inputs)
            q = inputs.q
            if factor != 1:
                q = torch.cat([factor * q[:, :, :prefix], q[:, :, prefix:]], 2)
            return pattern_operator(inputs.replace(q=q), pattern, backend=self.backend)
        rows = self._rows(inputs)
        near = pattern_operator(inputs, pattern, backend=self.backend)
        first = torch.eye(inputs.q.shape[2], prefix, dtype=rows.dtype, device=rows.device)
        left = first.expand(*rows.shape[:2], -1, -1)
        gate = (1 - left.sum(-1)).to(inputs.q.dtype)
        override = LowRankOperator(left, rows, signed=False)
        terms = [GatedOperator(near, gate, signed=False), override]
        return SumOperator(terms, stochastic=True, hides=True)

    def prefix_scale(self, inputs: Inputs) -> float:
        """Return the factor for the scores of prefix tokens: sqrt(ln N / ln N_0), at least 1."""
        grid = inputs.grid
        assert grid is not None
        seen, trained = math.prod(grid), math.prod(self._sides(grid))
        if not self.log_scale or trained < 2 or seen <= trained:
            return 1.0
        return math.sqrt(math.log(seen) / math.log(trained))

    def _rows(self, inputs: Inputs) -> Tensor:
        """Return A of the R prefix tokens, (B, H, R, N), computed here or reused from an earlier layer."""
        q, prefix, carried = inputs.q, inputs.prefix, inputs.carried
        source = self.layer - self.layer % self.refresh
        key = "freeswim", source, inputs.k.shape[:3], prefix
        found = None if carried is None or source == self.layer else carried.get(key)
        if found is not None:
            return found
        full = SoftmaxOperator(
            self.prefix_scale(inputs) * q[:, :, :prefix], inputs.k, inputs.scale,
            backend=self.backend,
        )  # fmt: skip
        rows = full.rows(torch.arange(prefix, device=q.device))
        if carried is not None:
            carried[key] = rows
        return rows

    def _sides(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        if not isinstance(self.kernel, int):
            return self.kernel
        sides = (self.kernel,) * len(grid)
        return (grid[0], *sides[1:]) if len(grid) == 3 else sides

    def _pattern(self, inputs: Inputs) -> Pattern:
        window = self.kernel
        if inputs.grid is not None and not inputs.causal:
            window = self._sides(inputs.grid)
        return window_pattern(inputs, window, "kernel")

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``outside``, for each head the share of a patch's dense attention that falls outside its
        window, and ``full``, the attention of each prefix token to the patches, averaged over heads.
        ``outside`` shows where the whole image matters."""
        grid, prefix = inputs.grid, inputs.prefix
        if grid is None or len(grid) != 2 or inputs.causal:
            return {}
        inside = pattern_operator(inputs, self._pattern(inputs), backend=self.backend)
        k = inputs.k
        every = softmax_attention(inputs.q, k, k, scale=inputs.scale, backend=self.backend)[1]
        share = 1 - (inside.attend(k)[1] - every).exp()  # type: ignore[attr-defined]
        found = {"outside": share[..., prefix:].clamp(0, 1)}
        if prefix:
            found["full"] = operator.rows(torch.arange(prefix, device=k.device)).mean(1)[
                ..., prefix:
            ]
        return {name: x.unflatten(-1, grid) for name, x in found.items()}
