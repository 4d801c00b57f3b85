"""The same image in other poses, mirrored and moved by half a cell, and maps of them brought back.

    x' [i] = x[i - p],    p = round(H / 2 h) pixels of H,  h cells of the coarsest tap
    S  [j] = S'[j + d],   d = p n / H cells of a map of n;  unknown where j + d lies outside of S'

Both axes are moved alike; what comes in from beyond the edge repeats it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xattn.heads.fusion import resize


class Pose(NamedTuple):
    """How an image is shown: moved by ``shift`` half cells down and to the right, then mirrored."""

    mirrored: bool = False
    shift: int = 0


# The two shifts go opposite ways, so that no border of the image is lost in more than one pass of four.
POSES = (Pose(), Pose(mirrored=True), Pose(shift=1), Pose(mirrored=True, shift=-1))


@dataclass(frozen=True)
class Poser:
    """Puts images of ``size`` (H, W) into poses, and maps back.

    Args:
        cells: (h, w) of the coarsest tap.
        moves: whether any pose has a shift; else maps keep their size.
    """

    size: tuple[int, int]
    cells: tuple[int, int]
    moves: bool

    def posed(self, images: Tensor, pose: Pose) -> Tensor:
        """``images`` (B, 3, H, W) in a pose, of the same size."""
        for axis, pixels in zip((2, 3), self._pixels, strict=True):
            images = _moved(images, pose.shift * pixels, axis)
        return images.flip(3) if pose.mirrored else images

    def aligned(self, maps: Tensor, pose: Pose) -> tuple[Tensor, Tensor]:
        """Maps (B, M, n, m) of images in a pose, as maps (B, M, n', m') of the images as they were, and
        (n', m') where they are known, 1 or 0.

        n' is n if the image was moved by whole cells of the map, or else the next multiple of 2 h.
        """
        if pose.mirrored:
            maps = maps.flip(3)
        known = maps.new_ones(())
        if self.moves:
            grid = tuple(map(_fine, maps.shape[2:], self.cells, self._pixels, self.size))
            maps = resize(maps, grid)
            known = maps.new_ones(grid)
            for axis, pixels, side in zip((2, 3), self._pixels, self.size, strict=True):
                count = maps.shape[axis]
                back = pose.shift * pixels * count / side
                maps = _moved(maps, -back, axis)
                places = torch.arange(count, device=maps.device) + back
                inside = (places >= 0) & (places <= count - 1)
                known = known * (inside[:, None] if axis == 2 else inside)
        return maps, known

    @property
    def _pixels(self) -> tuple[int, int]:
        """Half a cell, by axis."""
        height, width = (
            max(1, round(side / (2 * count)))
            for side, count in zip(self.size, self.cells, strict=True)
        )
        return height, width


def _fine(count: int, cells: int, pixels: int, side: int) -> int:
    """The smallest size from ``count`` on in which ``pixels`` of ``side`` are usually whole cells."""
    if pixels * count % side == 0:
        return count
    return math.ceil(count / (2 * cells)) * 2 * cells


def _moved(x: Tensor, by: float, axis: int) -> Tensor:
    """``x`` moved by so many places towards larger indices, linear between places, its edge repeated."""
    whole = math.ceil(by)
    count = x.shape[axis]
    places = torch.arange(count, device=x.device) - whole
    lower = x.index_select(axis, places.clamp(0, count - 1))
    if whole == by:
        return lower
    upper = x.index_select(axis, (places + 1).clamp(0, count - 1))
    return lower + (whole - by) * (upper - lower)
