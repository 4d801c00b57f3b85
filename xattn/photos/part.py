"""Some of the photos of a data set, numbered anew."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

from PIL import Image

from xattn.photos.base import Photos
from xattn.photos.image_files import Files
from xattn.photos.images import MAX_PIXELS
from xattn.photos.sources import is_listed, open_photos


class PartOfPhotos(Photos):
    """The photos ``numbers`` of ``whole``, which is read at random, not streamed."""

    def __init__(self, whole: Photos, numbers: Sequence[int]) -> None:
        self.whole, self.numbers = whole, list(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        return self.whole.name(self.numbers[index])

    def id(self, index: int) -> str:
        return self.whole.id(self.numbers[index])

    def source(self, index: int) -> Any:
        return self.whole.source(self.numbers[index])

    def load(self, index: int, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
        return self.whole.load(self.numbers[index], max_pixels)

    def describe(self) -> dict[str, Any]:
        text = ",".join(map(str, self.numbers))
        part = {"count": len(self), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        return {**self.whole.describe(), "part": part}

    def close(self) -> None:
        self.whole.close()


def some_of(photos: Photos, limit: int, seed: int = 0) -> Photos:
    """``limit`` of the photos, spread over their folders by ``seed``: one of each folder in turn, in an
    order of the folders and within each that the seed draws. A smaller limit has the first of them.

    Of photos without folders it is a random sample, and of streamed ones the first ``limit``.
    """
    numbers: Sequence[int] = range(len(photos))
    if not photos.streamed:
        folders: dict[str, list[int]] = {}
        for i in numbers:
            folders.setdefault(photos.id(i).rpartition("/")[0], []).append(i)
        for name, members in folders.items():
            random.Random(f"{seed}/{name}").shuffle(members)
        names = sorted(folders)
        random.Random(seed).shuffle(names)
        rounds = chain.from_iterable(zip_longest(*(folders[name] for name in names)))
        numbers = [i for i in rounds if i is not None]
    numbers = numbers[:limit]
    return photos.part(numbers) if isinstance(photos, Files) else PartOfPhotos(photos, numbers)


def limited(images: Any, limit: int | None, seed: int = 0) -> tuple[Any, int | None]:
    """:func:`some_of` what ``images`` names, and the limit that is left to heed: of pixels and loaders,
    which stay as they are, the first ``limit`` are taken.

    Raises:
        ValueError, OSError: as :func:`~xattn.photos.sources.open_photos`; or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}; give at least 1")
    if not is_listed(images):
        return images, limit
    photos = open_photos(images)
    return (photos if limit is None else some_of(photos, limit, seed)), None


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
