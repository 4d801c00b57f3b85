"""Which files are photos, clips and volumes, by their names: neither numpy nor Pillow is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xattn.runtime.stores import StorePath, place_of

SUFFIXES = frozenset(
    ".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif .tga".split()
)
CLIPS = frozenset(
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .ogv .ts .mts .m2ts .3gp .mjpeg".split()
)
VOLUMES = (".nii", ".nii.gz")


def is_video(path: str | Path) -> bool:
    """Whether ``path`` is named like a clip: ``.mp4``, ``.mov``, ``.avi``, ``.mkv``, ``.webm``, ..."""
    return Path(path).suffix.lower() in CLIPS


def is_volume(data: Any) -> bool:
    """Whether ``data`` names a NIfTI file."""
    return isinstance(data, str | Path) and str(data).lower().endswith(VOLUMES)


def check_images(path: str | Path | StorePath) -> None:
    """Refuse a path that is not there and a folder without images, as ``list_images`` does, but at
    the first image; of a store, that something is there."""
    path = place_of(path, "images")
    if isinstance(path, StorePath):
        if path.info() is None and not path.is_folder():
            raise FileNotFoundError(
                f"images: no file or folder {path}; give an image, a folder or a .txt list"
            )
        return
    if path.is_dir() and next(walk(path), None) is None:
        raise ValueError(
            f"images: no image in folder {path}; image files end in .jpg, .png, .webp, .tif, ..."
        )
    if not path.exists():
        raise FileNotFoundError(
            f"images: no file or folder {path}; give an image, a folder or a .txt list"
        )


def walk(folder: Path) -> Iterator[Path]:
    """Image files below ``folder``; each linked folder is followed once, so loops end."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in files:
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(root, name)
