"""Serves single frames of a pack's film (the overlays of a clip), so that no video player is needed.

OpenCV writes MPEG-4 Part 2 on every system, but no browser plays it; JPEG frames work in all browsers.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from PIL import Image

from xattn.app.pictures.rendering import jpeg
from xattn.packs.contained_files import PackError
from xattn.runtime.files import Signature
from xattn.runtime.lru_cache import LRUCache

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

FRAME = "/xattn/frame"
CACHE_BYTES = 32 << 20
MAX_PIXELS = 40_000_000
_CHECKED = LRUCache(8)  # films whose hash was checked, each of size 1
_CACHE = LRUCache(CACHE_BYTES)


def frames(pack: Pack) -> list[str]:
    """The image ids of the film's frames, in order; [] for a pack without a film."""
    return [] if _film(pack) is None else list(pack.images.index)


def rate(pack: Pack) -> float:
    """Frames per second of the film."""
    with closing(_Reader(pack)) as reader:
        return reader.rate


def frame_url(pack: Pack, side: int = 960) -> str:
    """The URL of a frame up to its number, which the caller appends; frames are numbered from 0."""
    query = {"pack": pack.id, "side": side, "v": pack.version}
    return f"{FRAME}?{urlencode(query)}&frame="


def frame_bytes(pack: Pack, index: int, side: int = 960) -> bytes:
    """Frame number ``index``, counted from 0, as JPEG; its longer side has at most ``side`` pixels.

    Raises:
        PackError: there is no film or no such frame, or the film is damaged.
    """
    key = (pack.id, pack.version, index, side)

    def draw() -> bytes:
        with closing(_Reader(pack)) as reader:
            image = reader.frame(index)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        return jpeg(image)

    return _CACHE.kept(key, draw, len)


def _film(pack: Pack) -> Path | None:
    """The film's file; its hash is checked once, and again if the file changes."""
    key: tuple[object, ...] = (pack.files.address, pack.version)
    if pack.folder is not None:
        try:
            key = (*key, Signature.of((pack.folder / "overlay.mp4").stat()))
        except OSError:
            return pack.video  # None, or the error that says what is missing
    film: Path | None = _CHECKED.get(key)
    if film is None or not film.exists():  # a copy of a remote film is deleted with its pack
        film = pack.video
        if film is not None:
            _CHECKED.put(key, film, 1)
    return film


class _Reader:
    """An open film."""

    def __init__(self, pack: Pack) -> None:
        import cv2

        from xattn.photos.clip import opencv_path

        path = _film(pack)
        if path is None:
            raise PackError("This pack holds no film; explain a clip to make one")
        try:
            self._capture = cv2.VideoCapture(opencv_path(path, "film"))
        except ValueError as error:
            raise PackError(str(error)) from None
        size = [self._capture.get(k) for k in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)]
        if not self._capture.isOpened() or not 0 < size[0] * size[1] <= MAX_PIXELS:
            self.close()
            raise _damaged()
        self.count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        fps = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.rate = fps if 0 < fps <= 1000 else 25.0

    def frame(self, index: int) -> Image.Image:
        import cv2

        if not 0 <= index < self.count:
            raise PackError(f"The film has the frames 0 to {self.count - 1}; choose one of them")
        self._capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        there, pixels = self._capture.read()
        if not there:
            raise _damaged()
        return Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))

    def close(self) -> None:
        self._capture.release()


def _damaged() -> PackError:
    return PackError("The film of this pack is damaged; explain the clip again")
