"""NiNformer's block: a token mixer whose output is gated by a linear layer
(github.com/Abdullah-88/NiNformer).

    M(n) = m + FF(LN(m)),   m = n + W_2 GELU(W_1 LN(n)),    n = LN(x)
    x <- x + (n W + b) o M(n),                              x <- x + FF(LN(x))

W_1 (t, N) and W_2 (N, t) mix the N positions of one grid; o multiplies elementwise. There is no attention.
The Jacobian of the token MLP, W_2 diag(GELU') W_1, takes the role of A; the gate has its own map.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from typing_extensions import Self

from xattn.attention.base import check_whole
from xattn.attention.operators.algebra import LowRankOperator
from xattn.attention.operators.base import Operator
from xattn.blocks.base import Block, register_block


@register_block(
    "ninformer",
    paper="github.com/Abdullah-88/NiNformer",
    complexity="2 N t C + 9 N C^2",
    grid=(1, 2, 3),
    cases=(
        {"grid": (5, 6), "token_hidden": 8},
        {"grid": (5, 6), "token_hidden": 7, "hidden": 16, "gate": False, "shared_norm": False},
    ),
)
class NinformerBlock(Block):
    """Token mixing by an MLP over the positions of a grid, and a gate. Prefix tokens have no position: the
    token MLP neither reads nor writes them, and they go through the other parts like any token.

    ``gating`` is the module whose output is (n W + b) o M(n): ``hirescam`` of that layer multiplies the
    gate by the gradient, so its map depends on the class.

    Args:
        grid: the only grid that the block supports; :meth:`at_grid` creates a block for another.
        token_hidden: t, hidden width of the token MLP.
        hidden: hidden width of both channel MLPs; 2 C by default.
        gate: whether n W + b multiplies M(n).
        shared_norm: whether the block uses one norm in both places, as in the authors' program.
        dropout: dropout probability in the MLPs, in training.
    """

    def __init__(
        self,
        dim: int,
        grid: Sequence[int],
        token_hidden: int = 64,
        hidden: int | None = None,
        gate: bool = True,
        shared_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim)
        self.grid = tuple(check_whole("grid", side) for side in grid)
        if not 1 <= len(self.grid) <= 3:
            raise ValueError(f"grid: got {self.grid}; give 1 to 3 sides, such as (8, 8)")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout}; give a probability below 1")
        places, wide = (
            math.prod(self.grid),
            2 * dim if hidden is None else check_whole("hidden", hidden),
        )
        self.norm = nn.LayerNorm(dim)
        self.second_norm = None if shared_norm else nn.LayerNorm(dim)
        self.token_norm, self.channel_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.token_in = nn.Linear(places, check_whole("token_hidden", token_hidden))
        self.token_out = nn.Linear(token_hidden, places)
        self.channel_mlp, self.mlp = (Mlp(dim, wide, drop=dropout) for _ in range(2))
        self.gate = nn.Linear(dim, dim) if gate else None
        # A named module for the gated output, so that explainers can read it as a layer.
        self.gating = nn.Identity()
        self.drop = nn.Dropout(dropout)

    def check(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> None:
        super().check(x, grid, prefix)
        if grid != self.grid:
            raise ValueError(
                f"grid: got {grid}; the token MLP has weights for {self.grid}, give that grid or "
                f"the block of at_grid({grid})"
            )

    def run(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> Tensor:
        n = self.norm(x)
        x = x + self.gated(n, prefix)
        second = self.norm if self.second_norm is None else self.second_norm
        return x + self.mlp(second(x))

    def gated(self, n: Tensor, prefix: int = 0) -> Tensor:
        """(n W + b) o M(n) of normalised tokens n (B, N, C)."""
        mixed = self.mixed(n, prefix)
        return self.gating(mixed if self.gate is None else self.gate(n) * mixed)

    def mixed(self, n: Tensor, prefix: int = 0) -> Tensor:
        """M(n), the mixer's output."""
        places = self.token_norm(n[:, prefix:])
        # (t, N) times (N, C): no transposed copy of the tokens
        inner = self.token_in.weight @ places + self.token_in.bias[:, None]
        moved = self.token_out.weight @ self.drop(F.gelu(inner)) + self.token_out.bias[:, None]
        m = n + F.pad(moved, (0, 0, prefix, 0))
        return m + self.channel_mlp(self.channel_norm(m))

    def operator(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> Operator:
        """W_2 diag(g) W_1, the token MLP's Jacobian, with g the mean of GELU' over the channels; rows and
        columns of prefix tokens are 0. The norm before it is held constant."""
        places = self.token_norm(self.norm(x)[:, prefix:])
        inner = self.token_in.weight @ places + self.token_in.bias[:, None]
        slope = _gelu_slope(inner).mean(-1)
        left = F.pad(self.token_out.weight * slope[:, None], (0, 0, prefix, 0))
        right = F.pad(self.token_in.weight, (prefix, 0)).expand(len(x), -1, -1)
        return LowRankOperator(left[:, None], right[:, None])

    @torch.no_grad()
    def maps(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> dict[str, Tensor]:
        """``gate``: the mean over channels of |(n W + b) o M(n)|, (B, 1, h, w)."""
        size = self.gated(self.norm(x), prefix).abs().mean(-1)[:, None, prefix:]
        return {"gate": size.unflatten(-1, self.grid)}

    def at_grid(self, grid: Sequence[int], mode: str = "bilinear") -> Self:
        """A copy for another grid: the token MLP's weights are resampled over the positions.

        W_1 is divided by the factor by which the number of positions grows, so that its outputs keep their
        scale. The copy was not trained for this grid, and a warning says so once.

        Args:
            grid: the new grid, which must have the same number of sides as the trained grid.
            mode: "bilinear" (linear in each side), or "nearest", which repeats weights.

        Raises:
            ValueError: the wrong number of sides, or an unknown mode.
        """
        sides = tuple(check_whole("grid", side) for side in grid)
        if len(sides) != len(self.grid):
            raise ValueError(f"grid: got {sides}; give {len(self.grid)} sides, as {self.grid}")
        if mode not in ("bilinear", "nearest"):
            raise ValueError(f"mode: got {mode!r}; choose bilinear or nearest")
        if sides == self.grid:
            return self._copy(
                sides, self.token_in.weight, self.token_out.weight, self.token_out.bias
            )
        warnings.warn(
            f"grid: the token MLP was trained on {self.grid}, its weights for {sides} are interpolated "
            f"({mode}) and untuned; accuracy falls, train it there",
            stacklevel=2,
        )
        linear = ("linear", "bilinear", "trilinear")[len(sides) - 1]
        how = (
            {"mode": linear, "align_corners": False} if mode == "bilinear" else {"mode": "nearest"}
        )

        def over(rows: Tensor) -> Tensor:  # (t, N) -> (t, N')
            planes = rows.unflatten(-1, self.grid)[:, None]
            return F.interpolate(planes, size=sides, **how).flatten(1)  # type: ignore[arg-type]

        growth = math.prod(sides) / math.prod(self.grid)
        return self._copy(
            sides,
            over(self.token_in.weight.detach()) / growth,
            over(self.token_out.weight.detach().t()).t(),
            over(self.token_out.bias.detach()[None])[0],
        )

    def _copy(self, grid: tuple[int, ...], reads: Tensor, writes: Tensor, bias: Tensor) -> Self:
        made = copy.deepcopy(self)
        made.grid = grid
        for layer, weight in ((made.token_in, reads), (made.token_out, writes)):
            layer.weight = nn.Parameter(weight.detach().clone())
            layer.out_features, layer.in_features = weight.shape
        made.token_out.bias = nn.Parameter(bias.detach().clone())
        return made


def _gelu_slope(x: Tensor) -> Tensor:
    """GELU'(x) = Phi(x) + x phi(x)."""
    phi = (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * phi
