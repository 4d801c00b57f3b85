"""The maps with which contrasts compare a map: maps of another class, photo or network, and of mosaics.

By construction, a contrast is 0 for a map that ignores the photo, the class or the network. The contrast is
exactly 0 only if both maps come from passes of the same shape. Like the method's own maps, the maps of this
module are therefore computed for a chunk of photos at a time. Each map is computed once, and only if it is
needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.eval import functional
from xattn.eval.metrics.board.table import OutcomeTable

Maps = list[Tensor | None]
"""The raw maps (1, h, w) of some photos; None for a photo without a map."""


class Mosaic(NamedTuple):
    """n x n photos side by side, row by row, with their ``classes``, the ``table`` of the whole mosaic and
    the index of the first photo in its chunk."""

    n: int
    classes: tuple[int, ...]
    table: OutcomeTable
    first: int = 0


class ChunkPhotos:
    """The photos of a chunk, for metrics that compare them.

    Args:
        tables: the table of outcomes of each photo.
        targets: the explained class of each photo.
    """

    def __init__(self, tables: Sequence[OutcomeTable], targets: Sequence[int]) -> None:
        self.tables, self.targets = tables, targets
        self._mosaics: dict[tuple[int, float, bool], dict[int, Mosaic]] = {}

    def next_photo(self, i: int) -> int | None:
        """Return the next photo with a different predicted class. After the last photo, the search
        continues with the first. Return None if there is no such photo."""
        predicted = [int(table.clean.argmax()) for table in self.tables]
        order = [*range(i + 1, len(predicted)), *range(i)]
        return next((j for j in order if predicted[j] != predicted[i]), None)

    def mosaic(self, i: int, n: int, confidence: float, halved: bool) -> Mosaic | None:
        """Return the mosaic whose first photo is ``i``, or None. Each photo is in at most one mosaic.

        Args:
            confidence: photos whose explained class has a lower probability are left out.
            halved: whether photos are shrunk by n, so that the mosaic has the size of a photo.
        """
        key = n, confidence, halved
        if key not in self._mosaics:
            self._mosaics[key] = dict(self._composed(*key))
        return self._mosaics[key].get(i)

    def _composed(self, n: int, confidence: float, halved: bool) -> list[tuple[int, Mosaic]]:
        left = [
            i
            for i, (table, k) in enumerate(zip(self.tables, self.targets, strict=True))
            if float(table.scorer.backbone.probabilities(table.clean[None])[0, k]) >= confidence
        ]
        found = []
        while left:
            group: list[int] = []
            for i in left:
                if len(group) < n * n and self.targets[i] not in [self.targets[j] for j in group]:
                    group.append(i)
            if len(group) < n * n:
                break
            left = [i for i in left if i not in group]
            first = self.tables[group[0]]
            image = mosaic_of(torch.stack([self.tables[i].image for i in group]), n, halved)
            classes = tuple(self.targets[i] for i in group)
            table = OutcomeTable(first.scorer, image, first.seed, wanted=classes)
            found.append((group[0], Mosaic(n, classes, table, group[0])))
        return found


def mosaic_of(images: Tensor, n: int, halved: bool) -> Tensor:
    """Join n^2 photos (n^2, 3, H, W), row by row, to a mosaic (3, n H, n W), or (3, H, W) of shrunk
    photos."""
    height, width = images.shape[-2:]
    if halved:
        size = (height // n, width // n)
        images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
    rows = [torch.cat(list(row), 2) for row in images.split(n)]
    whole = torch.cat(rows, 1)
    rest = (0, width - whole.shape[2], 0, height - whole.shape[1]) if halved else (0, 0, 0, 0)
    return F.pad(whole[None], rest, mode="replicate")[0]


@dataclass(eq=False)
class Cohort:
    """The maps of one method for the photos of a chunk.

    Args:
        own: the raw maps of each photo's explained class.
        parts: which photos are explained together in one batch.
        explain: a function (places, targets (b,)) -> maps of the photos at these places for these classes,
            computed in the same way as ``own``.
        randomized: a function (places) -> maps of the photos' explained classes on a network with random
            weights; None if there are no such maps for the method.
        alone: a function (images (b, 3, H, W), targets (b,)) -> raw maps (b, 1, h, w).
        resize: how maps are resized to the photo.
        keep: called with the place of a photo, a kind, and each raw map that is computed. A map is (1, h,
            w) for the kinds "class" and "network", and (n^2, h, w) for a "mosaic".
    """

    chunk_photos: ChunkPhotos
    own: Maps
    parts: Sequence[Sequence[int]]
    explain: Callable[[Sequence[int], Tensor], Maps]
    randomized: Callable[[Sequence[int]], Maps] | None
    alone: Callable[[Tensor, Tensor], Tensor]
    resize: str = "bilinear"
    keep: Callable[[int, str, Tensor], None] = lambda place, kind, values: None

    def __post_init__(self) -> None:
        self._made: dict[tuple[str, int], Tensor | None] = {}
        self._of_mosaics: dict[int, Tensor] = {}

    def of_next_photo(self, i: int) -> Tensor | None:
        """Return the map of the next photo, resized to this photo; None if there is no such map."""
        j = self.chunk_photos.next_photo(i)
        return None if j is None else self._sized(self.own[j], i)

    def second_class_map(self, i: int) -> Tensor | None:
        """Return the map of the most probable class other than the explained one."""
        return self._of("class", i)

    def on_random_weights(self, i: int) -> Tensor | None:
        """Return the map of the explained class on a network with random weights.

        Raises:
            ValueError: if there are no such maps for the method.
        """
        return self._of("network", i)

    def of_mosaic(self, mosaic: Mosaic) -> Tensor:
        """Return raw maps (n^2, 1, h, w) of the mosaic, one for each of its classes."""
        if id(mosaic) not in self._of_mosaics:
            targets = torch.tensor(mosaic.classes, device=mosaic.table.image.device)
            images = mosaic.table.image.expand(len(targets), -1, -1, -1).contiguous()
            made = self._of_mosaics[id(mosaic)] = self.alone(images, targets).detach()
            self.keep(mosaic.first, "mosaic", made[:, 0])
        return self._of_mosaics[id(mosaic)]

    def _of(self, kind: str, i: int) -> Tensor | None:
        if (kind, i) not in self._made:
            part = next(part for part in self.parts if i in part)
            if kind == "class":
                seconds = [
                    self.chunk_photos.tables[j].second(self.chunk_photos.targets[j]) for j in part
                ]
                maps = self.explain(part, torch.tensor(seconds, device="cpu"))
            elif self.randomized is None:
                raise ValueError(
                    "explain_randomized: None; this metric explains a network with random weights; give a "
                    "function for it, such as Cascade(backbone).method('gradcam')"
                )
            else:
                maps = self.randomized(part)
            for j, values in zip(part, maps, strict=True):
                self._made[kind, j] = self._sized(values, j)
                if values is not None:
                    self.keep(j, kind, values)
        return self._made[kind, i]

    def _sized(self, values: Tensor | None, i: int) -> Tensor | None:
        """Resize a map (1, h, w) to (1, H, W); return None if it is constant or not finite."""
        if values is None:
            return None
        image = self.chunk_photos.tables[i].image
        one = values[None].detach().to(image.device)
        if not bool(functional.minmax(one)[1]):
            return None
        return functional.upsample(one.float(), image.shape[-2:], self.resize)[0]
