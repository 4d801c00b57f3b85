"""A small network that reads the tokens of a block and their places in it.

    net(x) = W_2 gelu(W_1 flatten(x + e) + b_1) + b_2,    x (l, D), e (l, D) the embedding of the places

W_2 and b_2 start at zero. The network is made for a square of tokens; in a row, or where a grid is
narrower, it reads the places that there are, as if the others were zero. Heads share it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
