"""Lists of masks that depend only on the photo's size and a seed, not on any map.

A mask removes a square, or a set of cells of a c x c grid whose borders are at floor(i H / c).
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskList(ABC):
    """Masks of one kind. For the same photo, equal lists give equal masks, which all maps and metrics
    share.

    ``size`` is (h, w) in pixels, or in patches if patches are dropped. If ``by_area`` is True and the masks
    of the list differ in area, sums and drops are divided by the area of each mask.
    """

    by_area: ClassVar[bool] = True

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of masks."""

    @abstractmethod
    def removed(self, size: tuple[int, int], seed: int) -> Tensor:
        """Return what each mask removes, (count, h, w) bool."""

    @abstractmethod
    def sums(self, values: Tensor, seed: int) -> Tensor:
        """Compute the sum of ``values`` (h, w) over what each mask removes, (count,) float64."""

    def _generator(self, seed: int) -> torch.Generator:
        """Return a random generator for this list, independent of the generators of other lists."""
        return torch.Generator().manual_seed(random.Random(f"{self!r} {seed}").getrandbits(63))


def _check_size(cells: int, size: tuple[int, int]) -> None:
    if min(size) < cells:
        raise ValueError(
            f"cells: got {cells}; the photo has {size[0]} x {size[1]} pixels; give fewer cells"
        )


def _cumulative(values: Tensor) -> Tensor:
    """Compute the sums of all values above and to the left, (h, w) -> (h + 1, w + 1) float64."""
    return torch.nn.functional.pad(values.double().cumsum(0).cumsum(1), (1, 0, 1, 0))


def cell_sums(values: Tensor, cells: tuple[int, int]) -> Tensor:
    """Sum values (h, w) over the cells of a grid; return a tensor of shape ``cells``, float64.

    The borders of the cells are at floor(i h / rows).

    >>> cell_sums(torch.ones(5, 4), (2, 2))
    tensor([[4., 4.],
            [6., 6.]], dtype=torch.float64)
    """
    _check_size(max(cells), (values.shape[0], values.shape[1]))
    y, x = (
        torch.arange(n + 1, device="cpu") * side // n
        for n, side in zip(cells, values.shape, strict=True)
    )
    return _cumulative(values)[y][:, x].diff(dim=0).diff(dim=1)


@dataclass(frozen=True)
class Squares(MaskList):
    """``n_masks`` squares inside the photo, with sides of ``side`` times its shorter side. In
    pixels, they are the same squares as in infidelity."""

    n_masks: int = 50
    side: float = 0.25

    @property
    def count(self) -> int:
        return self.n_masks

    def removed(self, size: tuple[int, int], seed: int) -> Tensor:
        corners, side = corners_of(self, size, seed)
        y, x = (
            (place >= start[:, None]) & (place < start[:, None] + side)
            for place, start in zip(
                (torch.arange(n, device="cpu") for n in size), corners.unbind(1), strict=True
            )
        )
        return y[:, :, None] & x[:, None, :]

    def sums(self, values: Tensor, seed: int) -> Tensor:
        corners, side = corners_of(self, (values.shape[0], values.shape[1]), seed)
        total, (y, x) = _cumulative(values), corners.unbind(1)
        return total[y + side, x + side] - total[y, x + side] - total[y + side, x] + total[y, x]


@lru_cache(maxsize=64)  # all methods need the same corners
def corners_of(squares: Squares, size: tuple[int, int], seed: int) -> tuple[Tensor, int]:
    """Return the top-left corners (n_masks, 2) of squares, and the length of their sides."""
    generator = torch.Generator().manual_seed(seed)
    side = max(1, round(squares.side * min(size)))
    drawn = [
        [int(torch.randint(n - side + 1, (), generator=generator, device="cpu")) for n in size]
        for _ in range(squares.n_masks)
    ]
    return torch.tensor(drawn, device="cpu"), side


@dataclass(frozen=True)
class _OfCells(MaskList):
    """Sets of cells of a ``cells`` x ``cells`` grid."""

    cells: int = 14

    @abstractmethod
    def chosen(self, seed: int) -> Tensor:
        """Return the cells that each mask removes, (count, cells^2) bool."""

    def removed(self, size: tuple[int, int], seed: int) -> Tensor:
        _check_size(self.cells, size)
        grid = self.chosen(seed).view(-1, self.cells, self.cells)
        y, x = (
            torch.searchsorted(
                torch.arange(1, self.cells + 1, device="cpu") * n // self.cells,
                torch.arange(n, device="cpu"),
                right=True,
            )
            for n in size
        )
        return grid[:, y][:, :, x]

    def sums(self, values: Tensor, seed: int) -> Tensor:
        of_cells = cell_sums(values, (self.cells, self.cells)).flatten()
        return self.chosen(seed).to(of_cells.dtype) @ of_cells


@dataclass(frozen=True)
class EachCell(_OfCells):
    """Masks that each remove a single cell. If ``equal``, all cells have floor(H / c) rows, and the rest of
    the photo belongs to no cell."""

    equal: bool = False

    @property
    def count(self) -> int:
        return self.cells**2

    def removed(self, size: tuple[int, int], seed: int) -> Tensor:
        if not self.equal:
            return super().removed(size, seed)
        height, width = (n - n % self.cells for n in size)
        found = torch.zeros(self.count, *size, dtype=torch.bool, device="cpu")
        found[:, :height, :width] = super().removed((height, width), seed)
        return found

    def sums(self, values: Tensor, seed: int) -> Tensor:
        height, width = (n - n % self.cells * self.equal for n in values.shape)
        return super().sums(values[:height, :width], seed)

    def chosen(self, seed: int) -> Tensor:
        return torch.eye(self.count, dtype=torch.bool, device="cpu")


@dataclass(frozen=True)
class Subsets(_OfCells):
    """``n_masks`` random sets of ``removes`` cells. All sets of that size are equally likely."""

    removes: int = 59
    n_masks: int = 24

    @property
    def count(self) -> int:
        return self.n_masks

    def chosen(self, seed: int) -> Tensor:
        drawn = torch.rand(
            self.n_masks, self.cells**2, generator=self._generator(seed), device="cpu"
        )
        return drawn.argsort(1).argsort(1) < self.removes


@dataclass(frozen=True)
class IndependentCells(_OfCells):
    """``n_masks`` random sets that include each cell with probability ``share``. As published, sums are not
    divided by area."""

    by_area: ClassVar[bool] = False
    share: float = 0.2
    n_masks: int = 200

    @property
    def count(self) -> int:
        return self.n_masks

    def chosen(self, seed: int) -> Tensor:
        drawn = torch.rand(
            self.n_masks, self.cells**2, generator=self._generator(seed), device="cpu"
        )
        return drawn < self.share


def split_cells(x: Tensor, n: int) -> Tensor:
    """Split images (B, C, n h, n w) into their cells, row by row, (B n^2, C, h, w).

    >>> split_cells(torch.arange(4.0).view(1, 1, 2, 2), 2).flatten()
    tensor([0., 1., 2., 3.])

    Raises:
        ValueError: if the sides are not multiples of ``n``.
    """
    if x.ndim != 4 or x.shape[2] % n or x.shape[3] % n:
        raise ValueError(
            f"x: got {tuple(x.shape)}; give (B, C, H, W) whose sides are multiples of {n}"
        )
    b, c, height, width = x.shape
    cells = x.reshape(b, c, n, height // n, n, width // n).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(b * n * n, c, height // n, width // n)


def join_cells(cells: Tensor, n: int) -> Tensor:
    """Invert :func:`split_cells`."""
    count, c, h, w = cells.shape
    whole = cells.reshape(count // n**2, n, n, c, h, w).permute(0, 3, 1, 4, 2, 5)
    return whole.reshape(count // n**2, c, n * h, n * w)
