"""The Based model alternates Taylor linear attention with softmax attention in small windows.

    A_ij = phi(q'_i) . phi(k'_j) / sum_m phi(q'_i) . phi(k'_m)        in layers 0, 2, 4, ...
    phi(x) . phi(y) = 1 + z + z^2 / 2,   z = x . y / sqrt(f)
    A_i = softmax over a window of i                                  in layers 1, 3, 5, ...

q' = q W_q and k' = k W_k have f = ``width`` channels. phi consists of 1, x / f^(1/4) and the products x_a
x_b. Each pair is used once, with a factor of 1 / sqrt(2 f) for a = b and 1 / sqrt(f) for a < b. This takes
1 + f + f (f + 1) / 2 features instead of 1 + f + f^2, and gives the same dot products. A is never negative,
because 1 + z + z^2 / 2 is at least 1/2.

In causal calls, the sums include only the tokens up to the query, and are computed in chunks. If the number
of keys does not exceed the number of features, the weights are computed directly. Taylor layers treat
prefix tokens like other tokens; in window layers, prefix tokens see all tokens and are seen by all. The
method is from Arora et al. 2024, arXiv 2402.18668.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from xattn.attention.base import Mechanism, check_whole, register_attention
from xattn.attention.inputs import Inputs
from xattn.attention.mechanisms.gna import window_pattern
from xattn.attention.operators.algebra import LowRankOperator
from xattn.attention.operators.base import Operator
from xattn.attention.operators.causal_low_rank import CausalLowRankOperator
from xattn.attention.operators.patterns import pattern_operator
from xattn.attention.operators.taylor import TaylorOperator
from xattn.kernels.backend import without_autocast
from xattn.kernels.causal_product import causal_product
from xattn.kernels.softmax.reference import widen


@register_attention(
    "based",
    paper="arXiv 2402.18668",
    complexity="N f^2 D, or N w D",
    grid=(0, 1, 2, 3),
    causal=True,
    cases=(
        {"width": 4},
        {"form": "taylor", "width": None},
        {"layer": 1, "window": 9},
        {"layer": 1, "window": 5, "backend": "cpu"},
    ),
    bench=({"form": "taylor"}, {"form": "window"}),
)
class Based(Mechanism):
    """Taylor linear attention in even layers, windows of softmax attention in odd ones.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        width: f, the number of channels of q' and k'. W_q and W_k of each head are initialised with the
            first f columns of the identity. With None, q and k are used unchanged.
        window: the number of tokens in a window. On a 2-D or 3-D grid, a window is a square or cube with at
            most this number of tokens, whose side is rounded down. Where a window is longer than the grid,
            it covers the full length.
        form: "taylor" or "window" uses this form in all layers; "alternate" chooses it from the layer
            number.
        layer: the number of the layer, counted from 0; ``convert`` and the mixers of heads set it.

    Raises:
        ValueError: if ``layer`` is negative.

    Features are computed in float32 or wider.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        width: int | None = 16,
        window: int = 64,
        form: Literal["alternate", "taylor", "window"] = "alternate",
        layer: int = 0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        if layer < 0:
            raise ValueError(f"layer: got {layer}; give 0 or a larger number")
        self.window = check_whole("window", window)
        self.form = ("taylor", "window")[layer % 2] if form == "alternate" else form
        self.q_map = self.k_map = None
        if width is not None and self.form == "taylor":
            head = dim // num_heads
            start = torch.eye(head, check_whole("width", width))
            self.q_map = nn.Parameter(start.repeat(num_heads, 1, 1))
            self.k_map = nn.Parameter(start.repeat(num_heads, 1, 1))

    def operator(self, inputs: Inputs) -> Operator:
        if self.form == "window":
            grid = inputs.grid
            sides = 1 if grid is None or inputs.causal else len(grid)
            side = int(self.window ** (1 / sides) + 1e-9)
            near = window_pattern(inputs, side, "window")
            return pattern_operator(inputs, near, backend=self.backend)
        q, k = self.map_features(inputs)
        if k.shape[2] <= features(q.shape[3]):
            return TaylorOperator(q, k, causal=inputs.causal)
        with without_autocast(inputs.q):
            left, right = taylor_features(q), taylor_features(k)
        if inputs.causal:
            ones, backend = torch.ones_like(left[..., :1]), self.backend
            left = left / causal_product(left, right, ones, backend=backend)
            return CausalLowRankOperator(
                left, right.transpose(-2, -1), stochastic=True, signed=False, backend=backend
            )
        with without_autocast(inputs.q):
            total = left @ right.sum(-2)[..., None]
        return LowRankOperator(left / total, right.transpose(-2, -1), stochastic=True, signed=False)

    def map_features(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Compute q' (B, H, N, f) and k' (B, H, S, f)."""
        assert inputs.scale is not None
        own = inputs.scale * inputs.q.shape[-1] ** 0.5  # 1 unless the model has its own scale
        with without_autocast(inputs.q):
            q, k = widen(inputs.q) * own, widen(inputs.k)
            if self.q_map is not None and self.k_map is not None:
                q, k = q @ widen(self.q_map), k @ widen(self.k_map)
        return q, k

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``received``, for layers of both forms: the attention that each patch gets from all
        tokens, averaged over heads."""
        return received_map(operator, inputs)


def received_map(operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
    """Compute one map, ``received`` (B, 1, h, w): the attention that each patch gets from all tokens,
    averaged over heads. The result is empty if there is no two-dimensional grid."""
    if inputs.grid is None or len(inputs.grid) != 2:
        return {}
    ones = inputs.q.new_ones(operator.shape[0], 1, operator.shape[2])
    received = operator.vecmat(ones, "mean")[..., inputs.prefix :]
    return {"received": received.unflatten(-1, inputs.grid)}


def features(width: int) -> int:
    """Return the number of features that phi computes from ``width`` channels."""
    return 1 + width + width * (width + 1) // 2


def taylor_features(x: Tensor) -> Tensor:
    """Compute phi of x (..., f), which is (..., 1 + f + f (f + 1) / 2). For these features, phi(x) . phi(y)
    = 1 + z + z^2 / 2 with z = x . y / sqrt(f)."""
    width = x.shape[-1]
    x = x * width**-0.25
    first, second = torch.triu_indices(width, width, device=x.device)  # all pairs a <= b
    weight = torch.where(first == second, math.sqrt(0.5), 1.0).to(x.dtype)
    products = x[..., first] * x[..., second] * weight
    return torch.cat([torch.ones_like(x[..., :1]), x, products], -1)
