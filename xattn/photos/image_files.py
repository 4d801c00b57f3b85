"""Image files, on disk or in an object store, as numbered photos."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from xattn.photos.base import Photos
from xattn.photos.ids import photo_ids
from xattn.photos.images import MAX_PIXELS, load_image
from xattn.runtime.files import printable
from xattn.runtime.stores import StorePath

TAIL = 4096  # last bytes of a photo that its description holds


class Files(Photos):
    """Image files; ``folder`` is the one that was named, ``ids`` are those of a larger whole."""

    def __init__(
        self,
        paths: Sequence[Path | StorePath],
        folder: Path | StorePath | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        self.paths: list[Any] = list(paths)
        self._folder, self._ids = folder, ids

    @property
    def ids(self) -> Sequence[str]:
        """See :func:`xattn.photos.ids.photo_ids`."""
        if self._ids is None:
            self._ids = photo_ids(self.paths, self._folder)
        return self._ids

    def part(self, numbers: Sequence[int]) -> Files:
        """Some of the files, under the ids that they have here."""
        return Files([self.paths[i] for i in numbers], ids=[self.ids[i] for i in numbers])

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def id(self, index: int) -> str:
        return self.ids[index]

    def source(self, index: int) -> Path | StorePath:
        return self.paths[index]  # type: ignore[no-any-return]

    def load(self, index: int, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
        return load_image(self.paths[index], max_pixels)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for path in self.paths:
            if isinstance(path, StorePath):  # what a listing told; nothing is read for it
                text = f"{path.parent.name}/{path.name}:{path.size}:{path.mark};"
                digest.update(printable(text).encode())
                continue
            size = path.stat().st_size if path.is_file() else -1
            digest.update(printable(f"{path.parent.name}/{path.name}:{size};").encode())
            if size > 0:
                digest.update(_end(path, size))
        return {"count": len(self), "sha256": digest.hexdigest()}


def _end(path: Path, size: int) -> bytes:
    """The last bytes of a file: other pixels of the same size differ there, too."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, size - TAIL))
            return stream.read(TAIL)
    except OSError:  # an unreadable photo is skipped and listed when its turn comes
        return b""
