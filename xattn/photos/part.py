"""Some of the photos of a data set, numbered anew."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from PIL import Image

from xattn.photos.base import Photos
from xattn.photos.images import MAX_PIXELS


class PartOfPhotos(Photos):
    """The photos ``numbers`` of ``whole``, which is read at random, not streamed."""

    def __init__(self, whole: Photos, numbers: Sequence[int]) -> None:
        self.whole, self.numbers = whole, list(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        return self.whole.name(self.numbers[index])

    def load(self, index: int, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
        return self.whole.load(self.numbers[index], max_pixels)

    def describe(self) -> dict[str, Any]:
        text = ",".join(map(str, self.numbers))
        part = {"count": len(self), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        return {**self.whole.describe(), "part": part}

    def close(self) -> None:
        self.whole.close()


def every_nth(photos: Photos, n: int) -> tuple[Photos, Photos]:
    """All photos but every ``n``-th, and these; the same photos each time.

    Raises:
        ValueError: fewer than ``n`` photos, or streamed ones.
    """
    if photos.streamed:
        raise ValueError(
            "validation: shards cannot be split; name the photos to measure on (--validation)"
        )
    if len(photos) < n:
        raise ValueError(
            f"data: got {len(photos)} photos, one of {n} is kept to measure on; give more, or name "
            f"other photos to measure on (--validation)"
        )
    numbers = range(len(photos))
    kept = set(numbers[n - 1 :: n])
    rest = [i for i in numbers if i not in kept]
    return PartOfPhotos(photos, rest), PartOfPhotos(photos, sorted(kept))
