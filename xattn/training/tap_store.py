"""Taps of photos that are asked for again and again: computed once, and kept as far as memory goes."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from xattn.backbone import Backbone, Taps
from xattn.config import TrainConfig
from xattn.photos.base import Photos
from xattn.training.data import TrainImages, load_batches

BLOCK = 16  # photos a pass
KEPT_BYTES = 2 << 30

Place = tuple[int, int]  # (crop, number of the photo)


class TapStore:
    """``store.taps(places)`` for places (crop, photo); crop 0 is the model's own, others are random.

    The crops are those of :class:`~xattn.training.data.TrainImages` with the crop for the epoch. Blocks of
    16 photos go through the network together, so kept taps do not depend on what was asked before; those
    beyond ``limit`` bytes are computed each time.

    Args:
        numbers: the photos that may be asked for, in the order in which they are read.
    """

    def __init__(
        self,
        backbone: Backbone,
        photos: Photos,
        config: TrainConfig,
        numbers: Sequence[int],
        crops: int = 1,
        limit: int = KEPT_BYTES,
    ) -> None:
        self.backbone, self.photos, self.config, self.limit = backbone, photos, config, limit
        self.places = [(crop, photo) for crop in range(crops) for photo in numbers]
        self._kept: dict[Place, Taps] = {}
        self._filled = False

    def _fill(self) -> None:
        """Compute the taps that are kept, in blocks, from the first place on."""
        self._filled = True
        size = 0
        blocks = [self.places[i : i + BLOCK] for i in range(0, len(self.places), BLOCK)]
        with closing(self._computed(blocks)) as computed:
            for block, taps in zip(blocks, computed, strict=False):
                size += sum(t.numel() * t.element_size() for t in tensors(taps))
                if size > self.limit:
                    return
                self._kept.update((place, row(taps, i)) for i, place in enumerate(block))

    def all(self) -> Iterator[Taps]:
        """The taps of all places, in blocks."""
        for i in range(0, len(self.places), BLOCK):
            yield self.taps(self.places[i : i + BLOCK])

    def taps(self, places: Sequence[Place]) -> Taps:
        """Of ``places``, as one batch."""
        if not self._filled:
            self._fill()
        lost = [place for place in places if place not in self._kept]
        rows = {}
        if lost:
            [computed] = self._computed([lost])
            rows = {place: row(computed, i) for i, place in enumerate(lost)}
        return stack([self._kept.get(place) or rows[place] for place in places])

    def _computed(self, blocks: Sequence[Sequence[Place]]) -> Generator[Taps, None, None]:
        with closing(passes(self.backbone, self.photos, self.config, blocks)) as computed:
            for taps, unreadable in computed:
                if taps is None or unreadable:
                    reason = unreadable[0] if unreadable else "no photo"
                    raise OSError(
                        f"data: an image that could be read before no longer can ({reason}); bring it "
                        f"back, then go on"
                    )
                yield taps


@torch.no_grad()
def passes(
    backbone: Backbone, photos: Photos, config: TrainConfig, blocks: Sequence[Sequence[Place]]
) -> Generator[tuple[Taps | None, list[str]], None, None]:
    """Of each block the taps of the photos that can be read, None without any, and why others cannot."""
    reference = next(backbone.parameters(), torch.zeros((), device="cpu"))
    dtype = torch.float64 if reference.dtype == torch.float64 else torch.float32
    images = _Crops(photos, backbone.preprocessing, config.seed, max_pixels=config.max_pixels)
    keys = [list(block) for block in blocks]
    with closing(load_batches(images, keys, config.workers if len(keys) > 1 else 0)) as batches:
        for batch, unreadable in batches:
            taps = None if batch is None else backbone(batch.to(backbone.device, dtype))
            yield taps, [reason for _, reason in unreadable]


def first_taps(
    backbone: Backbone, photos: Photos, config: TrainConfig, count: int
) -> Iterator[Taps]:
    """Taps of the evaluation crops of the first ``count`` photos, without those that cannot be read."""
    places = [(0, photo) for photo in range(min(count, len(photos)))]
    blocks = [places[i : i + BLOCK] for i in range(0, len(places), BLOCK)]
    with closing(passes(backbone, photos, config, blocks)) as computed:
        yield from (taps for taps, _ in computed if taps is not None)


class _Crops(TrainImages):
    """The evaluation crop of each photo for "epoch" 0, and augmented ones for others."""

    def __getitem__(self, key: Place) -> Any:  # type: ignore[override]
        self.augment = key[0] > 0
        return super().__getitem__(key)


def tensors(taps: Taps) -> list[Tensor]:
    """All tensors of ``taps``."""
    rest = (taps.prefix, *taps.prefixes)
    return [taps.logits, *taps.maps, *(t for t in rest if t is not None)]


def row(taps: Taps, index: int) -> Taps:
    """One image's taps, without the axis of the batch."""
    return taps.each(lambda tensor: tensor[index].clone())


def stack(rows: Sequence[Taps]) -> Taps:
    """Taps of one image each -> those of the batch."""
    first = rows[0]
    return Taps(
        torch.stack([r.logits for r in rows]),
        tuple(torch.stack(maps) for maps in zip(*(r.maps for r in rows), strict=True)),
        None if first.prefix is None else torch.stack([r.prefix for r in rows]),  # type: ignore[misc]
        tuple(
            None if p[0] is None else torch.stack(p)  # type: ignore[arg-type]
            for p in zip(*(r.prefixes for r in rows), strict=True)
        ),
    )
