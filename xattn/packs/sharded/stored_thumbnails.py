"""The thumbnails of a pack of format 2 as numbered photos, which explanations can name as sources."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from xattn.packs.contents import Contents
from xattn.photos.base import Photos
from xattn.photos.images import MAX_PIXELS, decode_image


class StoredThumbnails(Photos):
    """Photos by the rows of their images; ``ids`` are the ids of all rows."""

    def __init__(self, contents: Contents, ids: Sequence[str]) -> None:
        self._contents, self._ids = contents, ids

    def __len__(self) -> int:
        return len(self._ids)

    def name(self, index: int) -> str:
        return f"{self._ids[index]}.jpg"

    def load(self, index: int, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
        data = self._contents.thumbnail(self._contents.photo(self._ids[index]))
        if data is None:
            raise ValueError(f"image: the pack holds no picture of {self._ids[index]}")
        return decode_image(io.BytesIO(data), self.name(index), max_pixels)

    def describe(self) -> dict[str, Any]:
        return {"count": len(self)}
