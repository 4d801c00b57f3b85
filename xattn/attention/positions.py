"""Places of tokens on their grid, and rotations of queries and keys by them.

    layer = create_attention("softmax", dim=384, num_heads=6, rotate=AxialRotation(64))

A rotation multiplies q_i by R(p_i) and k_j by R(p_j), with R(0) = 1; where R(p)^T R(p') = R(p' - p),
scores depend on differences of positions alone.

    axial:  pair m of axis a turns by the angle p_a base^(-m / M), m = 0 .. M - 1, M = D / (2 n)

arXiv 2104.09864 (one axis, base 10000), arXiv 2403.13298 (axes of images, base 100).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def positions(grid: Sequence[int], prefix: int, like: Tensor) -> Tensor:
    """Coordinates (N, n) of the tokens on their grid, 0 at prefix tokens; at least float32, in which
    whole numbers are exact, on the device of ``like``."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    axes = [torch.arange(length, device=like.device, dtype=dtype) for length in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    return torch.cat([places.new_zeros(prefix, len(grid)), places])


def check_grid(
    name: str, fitting: Sequence[int], grid: tuple[int, ...] | None, prefix: int, tokens: int
) -> None:
    """Raise a ``ValueError`` unless ``prefix`` and ``grid`` lay out so many tokens for ``name``, which
    works on grids of the numbers of dimensions ``fitting``; 0 among them stands for no grid."""
    if isinstance(prefix, float) or not 0 <= prefix < tokens:
        raise ValueError(f"prefix: got {prefix} of {tokens} tokens; give 0 to {tokens - 1}")
    if grid is None:
        if 0 not in fitting:
            raise ValueError(f"grid: {name} needs the grid of the tokens, for example (14, 14)")
        return
    if any(isinstance(length, float) or length < 1 for length in grid):
        raise ValueError(f"grid: got {grid}; give whole lengths of at least 1")
    if math.prod(grid) != tokens - prefix:
        raise ValueError(
            f"grid: {grid} holds {math.prod(grid)} tokens; got {tokens} with {prefix} prefix tokens"
        )
    if 0 not in fitting and len(grid) not in fitting:
        raise ValueError(
            f"grid: got {len(grid)} dimensions; {name} works on {' or '.join(map(str, fitting))}"
        )


class Rotation(nn.Module, ABC):
    """What :class:`~xattn.attention.Attention` takes as ``rotate``; its parameters are trained with
    the layer. A token at position 0, such as a prefix token, is left as it is."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys, in their own shapes and dtypes.

        Args:
            q: (B, H, N, D); ``k``: (B, Hk, N, D).
            positions: (N, n), coordinates on the grid.
        """


class AxialRotation(Rotation):
    """Rotary embedding with a share of the channels for each axis of the grid.

    Args:
        width: D of a head; 2 n divides it.
        axes: n, dimensions of the grid.
        base: the slowest pair of channels turns by about 1 / base a token.
    """

    def __init__(self, width: int, axes: int = 2, base: float = 100.0) -> None:
        super().__init__()
        if axes < 1 or width < 1 or width % (2 * axes):
            raise ValueError(
                f"width, axes: got {width}, {axes}; twice the number of axes has to divide the width "
                f"of a head"
            )
        if not 1 <= base < float("inf"):
            raise ValueError(f"base: got {base}; give a number of at least 1, such as 100")
        self.width, self.axes, self.base = width, axes, base

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if positions.ndim != 2 or positions.shape[1] != self.axes:
            raise ValueError(
                f"positions: got shape {tuple(positions.shape)}; give (N, {self.axes}), or make the "
                f"rotation with axes={positions.shape[-1]}"
            )
        turn = self.angles(positions)
        return self._turned("q", q, turn), self._turned("k", k, turn)

    def angles(self, positions: Tensor) -> Tensor:
        """(N, D / 2) for positions (N, n): by which each pair of channels turns."""
        pairs = self.width // (2 * self.axes)
        exponent = torch.arange(pairs, device=positions.device, dtype=positions.dtype) / pairs
        return (positions[..., None] * self.base**-exponent).flatten(1)

    def _turned(self, name: str, x: Tensor, turn: Tensor) -> Tensor:
        if x.shape[-2:] != (len(turn), self.width):
            raise ValueError(
                f"{name}: got {x.shape[-2]} tokens of width {x.shape[-1]}; the rotation has "
                f"{len(turn)} positions and width {self.width}"
            )
        cos, sin = turn.cos(), turn.sin()
        even, odd = x.to(torch.promote_types(x.dtype, turn.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
        return turned.flatten(-2).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, axes={self.axes}, base={self.base:g}"
