"""Numbered photos, wherever they are stored."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from xattn.photos.images import MAX_PIXELS
from xattn.runtime.stores import StorePath


@dataclass(frozen=True)
class StoredPhoto:
    """One photo of a :class:`Photos`, not read yet."""

    photos: Photos
    index: int

    @property
    def id(self) -> str:
        """The photo's name in packs and tables."""
        return self.photos.id(self.index)

    @property
    def name(self) -> str:
        """The photo's place in its source: its path, its row number, or its shard and position."""
        return self.photos.name(self.index)

    def load(self, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
        """The photo as upright 8-bit RGB; raises a ValueError or OSError if it cannot be read."""
        return self.photos.load(self.index, max_pixels)


class Photos(Sequence[StoredPhoto]):
    """Photos with fixed numbers 0 to len - 1; as a sequence, its items are :class:`StoredPhoto`."""

    streamed = False
    """Whether photos are streamed: reading is fast only in the order of :meth:`order`."""
    open_shards = 1
    """How many shards a reader keeps open, each with a block of undecoded samples."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The photo's name in lists, known without reading it."""

    def id(self, index: int) -> str:
        """The photo's unique name in packs, see :mod:`~xattn.photos.image_names`."""
        return self.name(index)

    def source(self, index: int) -> Path | StorePath | StoredPhoto:
        """The source of the photo's pixels: its file, if it has one."""
        return StoredPhoto(self, index)

    @abstractmethod
    def load(self, index: int, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
        """The photo as upright 8-bit RGB; raises a ValueError or OSError if it cannot be read.

        The message names the file, or the shard and key. It may be called from several threads.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The count and a hash of the photos, which show whether a resumed run sees the same photos."""

    def close(self) -> None:
        """Close all open files, because processes must not share them."""

    def order(self, seed: int, epoch: int) -> list[int]:
        """The numbers in training order, a pure function of (seed, epoch)."""
        numbers = list(range(len(self)))
        random.Random(f"{seed}/{epoch}").shuffle(numbers)
        return numbers

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [StoredPhoto(self, i) for i in range(*index.indices(len(self)))]
        return StoredPhoto(self, range(len(self))[index])


Data: TypeAlias = str | Path | StorePath | Sequence[str | Path | StorePath] | Photos
