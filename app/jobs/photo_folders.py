"""Folders of photos below a data folder: what a training may be started on."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from xattn.app.jobs.job_files import JOBS
from xattn.packs.format import MANIFEST
from xattn.photos.image_names import SUFFIXES

DEPTH = 4  # folders below the data folder
MAX_ENTRIES = 200_000  # files that are looked at, so that a page on a huge disk still comes up
FEWEST = 4  # photos; folders of classes with a photo or two would hide the others
LABELS = (".csv", ".json")


@dataclass(frozen=True)
class PhotoFolder:
    """A folder with photos in it or below it; ``name`` is relative to the data folder, "." itself."""

    name: str
    photos: int
    classes: tuple[str, ...]
    """Names of its own folders that hold photos."""
    labels: tuple[str, ...]
    """Files beside its photos that may hold their labels."""

    @property
    def id(self) -> str:
        """What stands for the folder in a URL."""
        return hashlib.sha256(os.fsencode(self.name)).hexdigest()[:12]


def photo_folders(root: Path) -> tuple[list[PhotoFolder], bool]:
    """Folders by name, and whether all of ``root`` was looked at.

    Packs, jobs, hidden folders, links to folders and folders of fewer than ``FEWEST`` photos are passed
    over.
    """
    counts: dict[str, int] = {}
    inside: dict[str, list[str]] = {}
    labels: dict[str, tuple[str, ...]] = {}
    seen = 0
    for folder, folders, files in os.walk(root):
        path = Path(folder)
        relative = path.relative_to(root)
        seen += len(files) + len(folders)
        if seen > MAX_ENTRIES:
            break
        if MANIFEST in files or relative.parts[:1] == (JOBS,):
            folders.clear()
            continue
        if len(relative.parts) >= DEPTH:
            folders.clear()
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and not (path / f).is_symlink()
        )
        photos = sum(
            os.path.splitext(f)[1].lower() in SUFFIXES and not f.startswith(".") for f in files
        )
        name = relative.as_posix()
        labels[name] = tuple(sorted(f for f in files if f.endswith(LABELS)))[:20]
        for above in (relative, *relative.parents) if photos else ():
            counts[above.as_posix()] = counts.get(above.as_posix(), 0) + photos
    for name in counts:
        if name != ".":
            inside.setdefault(Path(name).parent.as_posix(), []).append(Path(name).name)
    found = [
        PhotoFolder(name, count, tuple(sorted(inside.get(name, ()))), labels.get(name, ()))
        for name, count in counts.items()
        if count >= FEWEST
    ]
    return sorted(found, key=lambda f: (f.name != ".", f.name.casefold())), seen <= MAX_ENTRIES
