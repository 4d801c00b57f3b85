"""Which files are photos, clips and volumes, judging by their names, and the ids of photos.

The id of a photo is its path below the given folder, with ``/`` between the parts. Every command and
function uses this id (``explain``, ``compare``, ``evaluate``, packs, tables), and a subset of the photos
keeps the ids of the whole, so that results computed separately can be joined. Neither numpy nor Pillow is
needed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from xattn.runtime.files import printable
from xattn.runtime.names import visible
from xattn.runtime.stores import StorePath, resolve_place

SUFFIXES = frozenset(
    ".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif .tga".split()
)
CLIPS = frozenset(
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .ogv .ts .mts .m2ts .3gp .mjpeg".split()
)
VOLUMES = (".nii", ".nii.gz")
CLIP_FILES = (*sorted(CLIPS), *VOLUMES, ".npy")  # for networks that read clips whole


def is_video(path: str | Path) -> bool:
    """Whether ``path`` has a clip's suffix: ``.mp4``, ``.mov``, ``.avi``, ``.mkv``, ``.webm``, ..."""
    return Path(path).suffix.lower() in CLIPS


def is_volume(data: Any) -> bool:
    """Whether ``data`` names a NIfTI file."""
    return isinstance(data, str | Path) and str(data).lower().endswith(VOLUMES)


def check_images(path: str | Path | StorePath, clips: bool = False) -> None:
    """Raise the errors of ``list_images`` for a path that does not exist and a folder without images, but
    stop searching at the first image or, with ``clips``, at the first clip. In a store, only check that
    something exists."""
    path = resolve_place(path, "images")
    if isinstance(path, Path) and path.is_dir() and not _holds_any(path, clips):
        raise ValueError(
            f"images: no image in folder {path}; image files end in .jpg, .png, .webp, .tif, ..."
        )
    if not path.exists():
        raise FileNotFoundError(
            f"images: no file or folder {path}; give an image, a folder or a .txt list"
        )


def _holds_any(folder: Path, clips: bool) -> bool:
    endings = (*SUFFIXES, *(CLIP_FILES if clips else ()))
    return next(walk(folder, endings), None) is not None


def walk(folder: Path, endings: Sequence[str] = tuple(SUFFIXES)) -> Iterator[Path]:
    """Image files below ``folder``, or files with other ``endings``; each linked folder is followed only
    once, so that loops of links end."""
    endings = tuple(endings)
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in files:
            if name.lower().endswith(endings) and not name.startswith("."):
                yield Path(root, name)


# ---------------------------------------------------------------------- ids

LONGEST = 240  # characters in an id
STEM_BYTES = 180  # bytes in a file's stem; names may have 255


def photo_ids(
    files: Sequence[Path | StorePath], folder: Path | StorePath | None = None
) -> list[str]:
    """The ids of files: their paths below ``folder`` or, if there is none or a file is outside it, below
    the deepest folder that contains them all; for a single file its name.

    >>> photo_ids([Path("photos/fish/x.jpg"), Path("photos/dog/x.jpg")])
    ['fish/x.jpg', 'dog/x.jpg']
    >>> photo_ids([Path("photos/fish/x.jpg")])
    ['x.jpg']
    >>> photo_ids([Path("photos/fish/x.jpg")], Path("photos"))
    ['fish/x.jpg']
    """
    parts = [_parts(file) for file in files]
    above = [] if folder is None else _parts(folder)
    if not above or any(p[: len(above)] != above for p in parts):
        folders = [p[:-1] for p in parts]
        ends = zip(min(folders), max(folders), strict=False)  # shared by these: shared by all
        above = [low for low, _ in takewhile(lambda pair: pair[0] == pair[1], ends)]
    taken: set[str] = set()
    return [unique_id("/".join(p[len(above) :]), taken) for p in parts]


def unique_id(name: str, taken: set[str]) -> str:
    """Return an id made from ``name`` that is not yet in ``taken``, and add it to ``taken``.

    If a name has more than 240 characters, its end is replaced by a hash; bytes that are not text are
    escaped.

    >>> taken = set()
    >>> [unique_id("x.jpg", taken) for _ in range(2)]
    ['x.jpg', 'x.jpg-2']
    """
    name = visible(printable(name))
    if len(name) > LONGEST:
        name = f"{name[: LONGEST - 13]}-{_hash(name)}"
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}-{count}"
    taken.add(candidate)
    return candidate


def file_stem(id: str, taken: set[str]) -> str:
    """Return a file stem, valid on any system, for the id of a photo or a map. It differs from every stem
    in ``taken`` by more than upper and lower case, and is added to ``taken``.

    >>> taken = set()
    >>> [file_stem(id, taken) for id in ("fish/x.jpg@3.head", "my photo.jpg", "my_photo.jpg")]
    ['fish__x.jpg@3.head', 'my_photo.jpg', 'my_photo.jpg-c3b42380ffbe']
    """
    stem = re.sub(r"[^\w.+@-]+", "_", id.replace("/", "__")).strip(".") or "image"
    if len(stem.encode()) > STEM_BYTES or stem.casefold() in taken:
        stem = f"{stem.encode()[:STEM_BYTES].decode(errors='ignore')}-{_hash(id)}"
    taken.add(stem.casefold())
    return stem


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _parts(file: Path | StorePath) -> list[str]:
    """The parts of a file's whole path or URL."""
    if isinstance(file, StorePath):
        return file.url.split("/")
    return os.path.abspath(file).replace(os.sep, "/").rstrip("/").split("/")
