"""Reads images from any kind of source as a stream of tensors; unreadable images are skipped and listed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn.explaining.naming import check_kind, each_photo, with_ids
from xattn.photos.arrays import input_batch, is_stream, single_images
from xattn.photos.clip import FALLBACK_FPS
from xattn.photos.images import MAX_PIXELS, load_image, read_ahead
from xattn.photos.sources import is_listed, limit_photos
from xattn.photos.view import View, prepare_source
from xattn.photos.whole_clips import read_clip
from xattn.runtime.files import printable
from xattn.runtime.stores import StoreError


class Item(NamedTuple):
    """One readable image (3, H, W) and its ``position`` among all images, including unreadable ones.

    ``source`` is the photo's path, and ``view`` is the part of the photo that the model sees; both are None
    for tensors.
    """

    id: str
    position: int
    image: Tensor
    source: Any = None
    view: View | None = None


class Skipped(NamedTuple):
    id: str
    reason: str


class ImageStream:
    """The images of a file, folder, list file or dataset (:mod:`xattn.photos.sources`); of a list of paths,
    PIL images, tensors or arrays; or of a loader.

    With a ``limit``, :func:`~xattn.photos.sources.sample_photos` draws a sample from the files or the items
    of a dataset; from other sources, the first ``limit`` images are taken. Tensors must be float (3, H, W)
    or (B, 3, H, W), or clips (3, T, H, W) or (B, 3, T, H, W), in [0, 1] at the model's input size; they are
    used without preprocessing. Photos, arrays (H, W, 3) or (B, H, W, 3), and, for a backbone that reads
    clips, video files are preprocessed for the backbone.

    Attributes:
        tensors: whether the images were given as tensors.
        length: the number of images given, or None if it is not known in advance.
        skipped: the photos that could not be read, by position; they are added during iteration.
    """

    def __init__(
        self,
        images: Any,
        preprocessing: Any,
        view: str = "crop",
        max_pixels: int | None = MAX_PIXELS,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        self.preprocessing, self.view, self.max_pixels = preprocessing, view, max_pixels
        self.skipped: dict[int, Skipped] = {}
        sides = getattr(preprocessing, "places", preprocessing.input_size)
        self._channels, self._axes = len(preprocessing.mean), len(sides)
        images, limit = limit_photos(images, limit, seed, self._axes == 3)
        if not is_listed(images):
            images = self._flattened(images, limit)
        self.length: int | None = len(images) if hasattr(images, "__len__") else None
        items = each_photo(images) if is_listed(images) else with_ids(images)
        first = next(items, None)
        if first is None:
            raise ValueError("images: got none; give a photo, a folder, a list file or tensors")
        self.tensors = isinstance(first[1], Tensor)
        if self._axes == 3 and not (self.tensors or isinstance(first[1], Path)):
            raise ValueError(
                f"images: the network reads clips; give a folder or files, or a tensor (B, "
                f"{self._channels}, T, H, W) in [0, 1]"
            )
        self._items: Iterator[tuple[str, Any]] = chain([first], items)

    def _flattened(self, images: Any, limit: int | None) -> Any:
        """At most ``limit`` single images, as a tensor, a list or an iterator over a loader."""
        if isinstance(images, Tensor):
            return input_batch(images, self._channels, "images", self._axes)[:limit]
        if is_stream(images):
            return islice(single_images(images, self._channels), limit)
        given = images if isinstance(images, Sequence) else [images]
        return list(islice(single_images(given, self._channels), limit))

    def blocks(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[list[Item]]:
        """Yield the readable images of every ``ranks``-th block of ``size`` positions, starting at block
        ``rank``.

        The images that a block contains do not depend on ``ranks`` or on whether other images are readable.
        """
        owned = (
            (position, *item)
            for position, item in enumerate(self._items)
            if position // size % ranks == rank
        )
        read: Iterator[tuple[int, Item | None]]
        if self.tensors:
            read = ((photo[0], self._read(*photo)) for photo in owned)
        else:  # decode photos while the caller computes
            ahead = read_ahead(lambda photo: self._read(*photo), owned, size)
            read = ((photo[0], future.result()) for photo, future in ahead)
        for _, block in groupby(read, lambda pair: pair[0] // size):
            yield [item for _, item in block if item is not None]

    def _read(self, position: int, name: str, item: Any) -> Item | None:
        if isinstance(item, Tensor) != self.tensors:
            raise ValueError("images: got a mixture of tensors and photos; give only one kind")
        if self.tensors:
            image = input_batch(item, self._channels, f"images[{position}]", self._axes)
            return Item(name, position, image[0].to(torch.float32))
        check_kind(item)
        try:
            if self._axes == 3:
                clip = read_clip(item, self.preprocessing, self.view, self.max_pixels, FALLBACK_FPS)
                return Item(name, position, clip.pixels, item, clip.view)
            photo = load_image(item, self.max_pixels)
        except StoreError:
            raise
        except (ValueError, OSError) as error:
            self.skipped[position] = Skipped(name, printable(str(error)))
            return None
        pixels, view = prepare_source(item, photo, self.preprocessing, self.view)
        return Item(name, position, pixels, item, view)
