"""The photos to explain, and the id of each in a pack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from xattn.photos.arrays import ArrayImage, array_images, is_array, is_stream, iterate_images
from xattn.photos.base import StoredPhoto
from xattn.photos.image_names import unique_id
from xattn.photos.sources import is_listed, open_photos
from xattn.runtime.stores import StorePath, resolve_place

KINDS = "paths, PIL images, tensors, arrays, or a loader of them"
Picture = Path | StorePath | Image.Image | StoredPhoto
Source = Picture | ArrayImage


def named_photos(images: Any, channels: int = 3) -> list[tuple[str, Source]]:
    """(image_id, photo) pairs of images in memory or on disk; see :func:`each_photo`.

    Raises:
        ValueError: there is no image, or an item is not an image. FileNotFoundError: a path does not exist.
    """
    pairs = list(each_photo(images, channels))
    if not pairs:
        raise ValueError("images: got an empty list; give at least one image")
    return pairs


def each_photo(images: Any, channels: int = 3) -> Iterator[tuple[str, Source]]:
    """(image_id, photo) pairs, one by one, of everything that :mod:`xattn.photos.arrays` lists.

    The ids of files are those of :func:`~xattn.photos.image_names.photo_ids`; in a list that does not
    consist of files alone, a file's id is its name. "image 0" is the id of the first image if it is a
    tensor, an array, or a PIL image without a name.
    """
    if is_listed(images):
        photos = open_photos(images)
        yield from ((photos.id(i), photos.source(i)) for i in range(len(photos)))
        return
    if is_array(images):
        items: Iterable[Any] = [images]
    else:
        several = isinstance(images, Sequence) or is_stream(images)
        items = iterate_images(images if several else [images])
    yield from with_ids(_each(items, channels))


def _each(items: Iterable[Any], channels: int) -> Iterator[Source]:
    for item in items:
        for source in array_images(item, channels) if is_array(item) else [item]:
            check_kind(source)
            yield source


def with_ids(sources: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Each of ``sources``, photos or single tensors, with its id; texts become paths."""
    taken: set[str] = set()
    for number, source in enumerate(sources):
        source = resolve_place(source, "images") if isinstance(source, str) else source
        name = source.id if isinstance(source, StoredPhoto) else file_name_of(source)
        yield unique_id(name or f"image {number}", taken), source


def check_kind(image: Any) -> None:
    """Raise a ``ValueError`` unless ``image`` is a photo in one of the accepted forms."""
    if not isinstance(image, str | Source):
        raise ValueError(f"images: got a {type(image).__name__}; give {KINDS}")


def file_name_of(source: Any) -> str:
    """The file name of a photo; empty if it has none."""
    if isinstance(source, StoredPhoto | Path | StorePath):
        return source.name
    path = getattr(source, "filename", "")
    return Path(path).name if path else ""
