"""The photos to explain, and the id of each in a pack."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from xattn.photos.arrays import ArrayImage, array_images, flattened, is_array, is_stream
from xattn.photos.base import StoredPhoto
from xattn.photos.images import list_images
from xattn.photos.sources import is_stored, open_photos
from xattn.photos.volumes import is_volume
from xattn.runtime.stores import StorePath, place_of

KINDS = "paths, PIL images, tensors, arrays, or a loader of them"
Picture = Path | StorePath | Image.Image | StoredPhoto
Source = Picture | ArrayImage


def named_photos(images: Any, channels: int = 3) -> list[tuple[str, Source]]:
    """(image_id, photo) pairs of what is at hand; see :func:`each_photo`.

    Raises:
        ValueError: no image, or something that is none. FileNotFoundError: a missing path.
    """
    pairs = list(each_photo(images, channels))
    if not pairs:
        raise ValueError("images: got an empty list; give at least one image")
    return pairs


def each_photo(images: Any, channels: int = 3) -> Iterator[tuple[str, Source]]:
    """(image_id, photo) pairs, one by one, of all that :mod:`xattn.photos.arrays` lists.

    Ids are relative paths without suffix, made unique; "image 0" for the first image if it is in a tensor
    or an array; "image-1" if it is a PIL image without a name.
    """
    root: Path | StorePath | None = None
    items: Iterable[Any]
    if is_array(images):
        items = [images]
    elif is_stored(images) or is_volume(images):
        items = open_photos(images)
    elif isinstance(images, str | Path | StorePath):
        root, items = place_of(images, "images"), list_images(images)
        root = root if is_folder_of(root, items) else root.parent
    elif isinstance(images, Sequence) or is_stream(images):
        items = flattened(images)
    else:
        items = flattened([images])
    taken: set[str] = set()
    number = 0
    for item in items:
        for source in array_images(item, channels) if is_array(item) else [item]:
            yield _named(source, number, root, taken)
            number += 1


def check_kind(image: Any) -> None:
    """Raise a ``ValueError`` unless ``image`` is a photo in one of the forms that are taken."""
    if not isinstance(image, str | Source):
        raise ValueError(f"images: got a {type(image).__name__}; give {KINDS}")


def is_folder_of(place: Path | StorePath, listed: Sequence[Path | StorePath]) -> bool:
    """Whether ``place``, which stands for the photos ``listed``, is their folder; no store is asked."""
    if isinstance(place, Path):
        return place.is_dir()
    return place.suffix.lower() != ".txt" and place not in listed


def relative_name(file: Path | StorePath, root: Path | StorePath | None) -> str | None:
    """The name of a photo below ``root``; None if it lies elsewhere."""
    if isinstance(file, StorePath):
        return file.below(root) if isinstance(root, StorePath) else None
    if not isinstance(root, Path) or not file.is_relative_to(root):
        return None
    return str(file.relative_to(root))


def _named(
    item: Any, number: int, root: Path | StorePath | None, taken: set[str]
) -> tuple[str, Source]:
    check_kind(item)
    source = place_of(item, "images") if isinstance(item, str) else item
    if isinstance(source, ArrayImage):
        return f"image {number}", source
    if isinstance(source, StoredPhoto):
        name = source.name
    elif isinstance(source, Image.Image):
        name = Path(file_name_of(source)).stem or f"image-{number + 1}"
    else:
        path = Path(relative_name(source, root) or source.name)
        name = path.with_suffix("").as_posix()
    return unique_id(name, taken), source


def unique_id(name: str, taken: set[str]) -> str:
    """``name`` as part of a file name, different from all in ``taken`` even if case is ignored."""
    slug = re.sub(r"[^\w.+-]+", "_", name.replace("/", "__")).strip(".") or "image"
    if len(slug.encode()) > 120:  # file names may have 255 bytes
        start = slug.encode()[:96].decode(errors="ignore")
        slug = f"{start}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    candidate, count = slug, 1
    while candidate.casefold() in taken:
        count += 1
        candidate = f"{slug}-{count}"
    taken.add(candidate.casefold())
    return candidate


def file_name_of(source: Source) -> str:
    if isinstance(source, StoredPhoto):
        return source.name
    if isinstance(source, Path | StorePath):
        return source.name
    path = getattr(source, "filename", "")
    return Path(path).name if path else ""
