"""GridPG: in a mosaic of n x n photos, how much of a class's positive map is in its own photo?

    mean_i (sum_{u in cell i} phi_i(u)^+ / sum_u phi_i(u)^+),    phi_i of the class of cell i

Boehle et al. 2021, arXiv 2104.00032; Rao et al. 2022, arXiv 2205.10435. A map that ignores the class scores
exactly 1 / n^2, because the shares of a map add up to 1.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from xattn.backbone import Backbone
from xattn.eval import functional
from xattn.eval.metrics.base import (
    Column,
    Finish,
    MetricGroup,
    MetricInfo,
    PerturbationMetric,
    Request,
    Sample,
)
from xattn.eval.metrics.board.cohort import ChunkPhotos, Mosaic
from xattn.eval.metrics.board.masks import cell_sums
from xattn.eval.metrics.curves import check_count

NOTHING = 1e-7  # a smaller positive part counts as 0, as in the authors' code


def positive_shares(maps: Tensor, n: int) -> Tensor:
    """Compute the share of the positive part of maps (B, 1, H, W) in each cell, (B, n^2) float64.

    The shares are 0 if a map has no positive part. If two photos of a mosaic show the class, the sum over
    both cells is the Focus of Arias-Duart et al. 2022 (arXiv 2109.15035).
    """
    functional.check_maps(maps)
    parts = torch.stack([cell_sums(m[0].clamp_min(0).cpu(), (n, n)).flatten() for m in maps])
    total = parts.sum(1, keepdim=True)
    return torch.where(total < NOTHING, 0.0, parts / total.clamp_min(NOTHING))


def gridpg_values(maps: Tensor) -> Tensor:
    """Compute GridPG from maps (B, n^2, 1, H, W), one for the class of each cell, row by row.

    Returns (B,) float64 in [0, 1], NaN if a map is not finite.

    >>> gridpg_values(torch.ones(1, 4, 1, 6, 6))
    tensor([0.2500], dtype=torch.float64)

    Raises:
        ValueError: if the shape is wrong, or the number of classes is not a square number.
    """
    n = round(maps.shape[1] ** 0.5) if maps.ndim == 5 else 0
    if n < 1 or n * n != maps.shape[1]:
        raise ValueError(f"maps: got {tuple(maps.shape)}; give (B, n^2, 1, H, W)")
    own = [torch.diagonal(positive_shares(of_mosaic, n)).mean() for of_mosaic in maps]
    values = torch.stack(own)
    return torch.where(maps.flatten(1).isfinite().all(1).cpu(), values, torch.nan)


@dataclass(frozen=True, kw_only=True)
class MosaicOptions(PerturbationMetric):
    """Options of metrics on mosaics.

    Mosaics are composed of the photos of a chunk, and each photo is in at most one mosaic. The value
    belongs to the first photo of a mosaic; the other photos have no value.

    Args:
        n: the number of photos per side.
        confidence: only photos whose explained class has at least this probability are used.
        halved: whether photos are shrunk by n, so that a mosaic has the size of a photo. With None, they
            are shrunk only for networks with a fixed grid of patches, which accept inputs of only one size.
    """

    n: int = 2
    confidence: float = 0.9
    halved: bool | None = None

    def __post_init__(self) -> None:
        parent = super()
        if hasattr(parent, "__post_init__"):
            parent.__post_init__()
        check_count("n", self.n)
        if self.n < 2 or not 0 <= self.confidence <= 1:
            raise ValueError(
                f"n, confidence: got {self.n} and {self.confidence}; give n of at least "
                f"2, and a probability"
            )

    def for_network(self, network: Any) -> Self:
        made = super().for_network(network)
        if self.halved is None:
            fixed = isinstance(network, Backbone) and network.has_grid
            made = replace(made, halved=fixed)  # type: ignore[type-var]
        return made  # type: ignore[return-value]

    def mosaic(self, chunk_photos: ChunkPhotos, place: int) -> Mosaic | None:
        """Return the mosaic whose first photo is the one at ``place``, or None."""
        return chunk_photos.mosaic(place, self.n, self.confidence, bool(self.halved))

    def can_compare(self, chunk_photos: ChunkPhotos, place: int) -> bool:
        return self.mosaic(chunk_photos, place) is not None

    @property
    def photos_needed(self) -> str:
        return (
            f"{self.n**2} photos of different explained classes, each with a probability of "
            f"at least {self.confidence:g}"
        )

    def mosaic_of(self, sample: Sample) -> Mosaic:
        """Return the mosaic whose first photo is this one. Raise a ValueError if there is none."""
        found = self.mosaic(sample.cohort.chunk_photos, sample.place)
        if found is None:
            raise ValueError("mosaic: this photo is not the first photo of a mosaic")
        return found


@dataclass(frozen=True)
class GridPGMetric(MosaicOptions):
    """GridPG, averaged over all classes of a mosaic, each of which is explained. The papers use n = 3."""

    compares: ClassVar[str] = "mosaic"
    explains_again: ClassVar[bool] = True

    def chance(self, column: Column) -> float | None:
        return 1 / self.n**2

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        yield from ()
        mosaic = self.mosaic_of(sample)
        size = mosaic.table.image.shape[-2:]
        maps = sample.cohort.of_mosaic(mosaic).float()
        value = float(gridpg_values(functional.upsample(maps, size, sample.resize)[None]))
        return lambda scores: {self.columns[0]: value}


GROUP = MetricGroup.single(
    GridPGMetric,
    "gridpg",
    MetricInfo(
        "share of the positive map of a class in its own photo of a mosaic",
        True,
        kind="localisation",
    ),
    "Grid pointing game",
    "How much of the map of a class lies in its own photo, in a mosaic of photos",
    cases=({"confidence": 0.2},),
    by_name=True,
)
