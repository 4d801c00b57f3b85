"""Photos by number, wherever they are stored."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from xattn.photos.images import MAX_PIXELS


@dataclass(frozen=True)
class StoredPhoto:
    """One photo of a :class:`Photos`, not read yet."""

    photos: Photos
    index: int

    @property
    def name(self) -> str:
        """Path, row number, or shard and position."""
        return self.photos.name(self.index)

    def load(self, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
        """8-bit RGB, upright; ValueError or OSError where the photo cannot be read."""
        return self.photos.load(self.index, max_pixels)


class Photos(Sequence[StoredPhoto]):
    """Photos with fixed numbers 0 .. len - 1; also a sequence of :class:`StoredPhoto`."""

    streamed = False
    """Whether the photos are read by streams, fast in :meth:`order` only."""
    open_shards = 1
    """How many shards a reader keeps open, each with a block of undecoded samples."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What the photo is called in lists; nothing is read for it."""

    @abstractmethod
    def load(self, index: int, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
        """8-bit RGB, upright; ValueError or OSError where the photo cannot be read.

        The message names the file or the shard and key. May be called from several threads.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Count and hash, to tell whether a resumed run sees the same photos."""

    def close(self) -> None:
        """Forget open files; processes must not share them."""

    def order(self, seed: int, epoch: int) -> list[int]:
        """The numbers in the order of training, a pure function of (seed, epoch)."""
        numbers = list(range(len(self)))
        random.Random(f"{seed}/{epoch}").shuffle(numbers)
        return numbers

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [StoredPhoto(self, i) for i in range(*index.indices(len(self)))]
        return StoredPhoto(self, range(len(self))[index])


Data: TypeAlias = str | Path | Sequence[str | Path] | Photos
