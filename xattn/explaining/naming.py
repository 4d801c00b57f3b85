"""The photos to explain, and the id of each in a pack."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from xattn.photos.base import StoredPhoto
from xattn.photos.images import list_images
from xattn.photos.sources import is_stored, open_photos
from xattn.photos.volumes import is_volume

Source = Path | Image.Image | StoredPhoto


def named_photos(
    images: str | Path | Image.Image | Sequence[str | Path | Image.Image],
) -> list[tuple[str, Source]]:
    """(image_id, photo) pairs; ids are relative paths without suffix, made unique."""
    root: Path | None = None
    items: Sequence[str | Path | Image.Image | StoredPhoto]
    if isinstance(images, Image.Image):
        items = [images]
    elif is_stored(images) or is_volume(images):
        items = open_photos(images)  # type: ignore[arg-type]
    elif isinstance(images, str | Path):
        items = list_images(images)
        root = Path(images) if Path(images).is_dir() else Path(images).parent
    else:
        items = list(images)
        if not items:
            raise ValueError("images: got an empty list; give at least one image")
    taken: set[str] = set()
    pairs = []
    for number, item in enumerate(items, start=1):
        source = Path(item) if isinstance(item, str) else item
        if isinstance(source, StoredPhoto):
            name = source.name
        elif isinstance(source, Image.Image):
            name = Path(file_name_of(source)).stem or f"image-{number}"
        elif isinstance(source, Path):
            inside = root is not None and source.is_relative_to(root)
            name = (source.relative_to(root) if inside else Path(source.name)).with_suffix("")  # type: ignore[arg-type,assignment]
        else:
            raise ValueError(f"images: got a {type(item).__name__}; give paths or PIL images")
        pairs.append((unique_id(name if isinstance(name, str) else name.as_posix(), taken), source))
    return pairs


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
    path = source if isinstance(source, Path) else getattr(source, "filename", "")
    return Path(path).name if path else ""
