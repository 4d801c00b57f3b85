"""Image files: listing them, and reading each as an upright 8-bit RGB photo."""

from __future__ import annotations

import errno
import io
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from xattn.photos.image_names import SUFFIXES, check_images, walk
from xattn.runtime.lru_cache import LRUCache
from xattn.runtime.stores import StorePath, resolve_place

MAX_PIXELS = 40_000_000
MAX_BYTES = 1 << 30  # size limit of a photo in a store, which is read into memory
# Formats that run other programs or draw vectors (EPS, WMF, ...) are never opened.
FORMATS = "JPEG MPO PNG WEBP BMP DIB GIF TIFF PPM JPEG2000 AVIF TGA".split()
_RECENT = LRUCache(64 << 20)  # bytes of photos in stores, which packs read again for pictures
_COPYING = threading.Lock()  # two threads must not decode one lazily opened image


# ---------------------------------------------------------------------- listing


@overload
def list_images(path: Path) -> list[Path]: ...
@overload
def list_images(path: str | StorePath) -> list[Any]: ...
def list_images(path: str | Path | StorePath) -> Any:
    """The image files given by ``path``, in a fixed order: paths or, for a URL, :class:`StorePath`.

    ``path`` is one image, a folder (searched recursively, without hidden entries, sorted), or a
    ``.txt`` list with one ``path [label]`` per line; empty lines and lines that start with ``#`` are
    skipped. A path in a list is relative to the list's own folder, or is a URL. Listed files are not
    opened here, and those in a store are not checked.

    Raises:
        FileNotFoundError: ``path``, or a file named in a list, does not exist.
        ValueError: the folder or list contains no image, or a URL names no readable store.
        StoreError: the store does not respond.
    """
    place = resolve_place(path, "images")
    if isinstance(place, StorePath):
        if place.suffix.lower() != ".txt":
            return _stored_images(place)
    else:
        check_images(place)
        if place.is_dir():
            return sorted(walk(place))
        if place.suffix.lower() != ".txt":
            return [place]
    found = []
    for number, line in enumerate(_read_lines(place), start=1):
        if line and not line.startswith("#"):
            found.append(_listed_file(place, number, line))
    if not found:
        raise ValueError(f"images: the list {place} names no image; write one path per line")
    return found


def _stored_images(place: StorePath) -> list[StorePath]:
    file = place.info()
    if file is not None:
        return [file]
    files = place.files()
    found = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not files:
        check_images(place)
    if not found:
        raise ValueError(
            f"images: no image in folder {place}; image files end in .jpg, .png, .webp, .tif, ..."
        )
    return found


def _read_lines(path: Path | StorePath) -> list[str]:
    try:
        return [line.strip() for line in path.read_bytes().decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(
            f"images: {path} is not a UTF-8 text list; write one path per line"
        ) from None


def _listed_file(path: Path | StorePath, number: int, line: str) -> Path | StorePath:
    forms = (line, line.rpartition("\t")[0], line.rpartition(" ")[0].rstrip())
    if isinstance(path, StorePath) or isinstance(resolve_place(line, "images"), StorePath):
        named = [name for name in forms if Path(name).suffix.lower() in SUFFIXES]
        if not named:
            raise ValueError(
                f"images: line {number} of {path} names no image ({line!r}); write one path per line"
            )
        if isinstance(resolve_place(named[0], "images"), StorePath):
            return resolve_place(named[0], "images")
        return StorePath(f"{path.parent}/{named[0].removeprefix('./')}")
    for name in forms:
        try:
            if name and (path.parent / name).is_file():
                return path.parent / name
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
    raise FileNotFoundError(
        f"images: line {number} of {path} names no file ({line!r}); "
        f"paths are relative to {path.parent}"
    )


# ---------------------------------------------------------------------- reading


class ReadablePhoto(Protocol):
    """A photo that reads itself, such as :class:`~xattn.photos.base.StoredPhoto`."""

    def load(self, max_pixels: int | None) -> Image.Image: ...


def load_image(
    source: str | Path | StorePath | Image.Image | ReadablePhoto,
    max_pixels: int | None = MAX_PIXELS,
) -> Image.Image:
    """One photo as 8-bit RGB, upright: from a file, a URL, an image or :mod:`xattn.photos.sources`.

    EXIF rotation is applied; transparency is blended over white; 16-bit, 32-bit and float grey values
    are scaled to 8 bit and never clipped; an animation is read as its first frame. The size in the
    header is compared with ``max_pixels`` (None: no cap) before anything is decoded.

    Raises:
        FileNotFoundError, OSError: there is no such file, or reading it is not permitted.
        StoreError: the store does not respond.
        ValueError: the file is not an image, is truncated or damaged, or has too many pixels or non-finite
            values.
    """
    if isinstance(source, Image.Image):
        check_size(source.size, "the given image", max_pixels)
        with _COPYING:
            copy = source.copy()
        return _to_rgb(copy, "the given image")
    if not isinstance(source, str | Path | StorePath):
        return source.load(max_pixels)
    path = resolve_place(source, "image")
    if isinstance(path, StorePath):
        return decode_image(io.BytesIO(_stored_bytes(path)), str(path), max_pixels)
    if path.is_dir():
        raise ValueError(f"image: {path} is a folder; give a file, or list_images(folder)")
    if not path.exists():
        raise FileNotFoundError(f"image: no file {path}; check the path")
    with path.open("rb") as stream:
        return decode_image(stream, str(path), max_pixels)


def _stored_bytes(file: StorePath) -> bytes:
    try:
        size = file.known_size()
    except FileNotFoundError:
        raise FileNotFoundError(f"image: no file {file}; check the URL") from None
    if size > MAX_BYTES:
        raise ValueError(f"image: {file} has {size:,} bytes, over the limit of {MAX_BYTES:,}")
    key = (file.url, size, file.mark)
    data: bytes | None = _RECENT.get(key) if file.mark else None
    if data is None:
        data = file.read(0, size)
        if file.mark:  # otherwise another photo could have replaced it under the same name
            _RECENT.put(key, data, size)
    return data


def decode_image(stream: IO[bytes], label: str, max_pixels: int | None) -> Image.Image:
    """:func:`load_image` for an open file; ``label`` names it in errors."""
    try:
        image = Image.open(stream, formats=readable_formats())
    except Image.DecompressionBombError:
        raise ValueError(
            f"image: {label} holds more pixels than Pillow's own limit; "
            f"make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS and max_pixels"
        ) from None
    except UnidentifiedImageError:
        raise ValueError(
            f"image: {label} is not an image that can be read; give a JPEG, PNG, WebP, TIFF, ..."
        ) from None
    except Exception as error:
        raise _damaged(label, error) from error
    check_size(image.size, label, max_pixels)
    return _to_rgb(image, label)


Thing = TypeVar("Thing")
Read = TypeVar("Read")


def read_ahead(
    read: Callable[[Thing], Read], things: Iterable[Thing], count: int, threads: int = 2
) -> Iterator[tuple[Thing, Future[Read]]]:
    """Each item with the future of ``read(item)``, in order; reading starts ``count`` items ahead.

    Reading runs in ``threads`` while the caller computes; at most ``count`` results wait.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        waiting: deque[tuple[Thing, Future[Read]]] = deque()
        try:
            for thing in things:
                waiting.append((thing, pool.submit(read, thing)))
                if len(waiting) > count:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, future in waiting:
                future.cancel()


def readable_formats() -> list[str]:
    """The accepted formats that this installation of Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def check_size(size: tuple[int, int], label: str, max_pixels: int | None) -> None:
    """Raise a ``ValueError`` for an image without pixels, or with more than ``max_pixels``."""
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"image: {label} is empty ({width} x {height} pixels)")
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(
            f"image: {label} has {width} x {height} pixels, over max_pixels={max_pixels}; "
            f"make it smaller or raise max_pixels"
        )


def _damaged(label: str, error: Exception) -> ValueError:
    return ValueError(
        f"image: {label} is truncated or damaged ({type(error).__name__}: {error}); "
        f"replace the file"
    )


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise _damaged(label, error) from error
    image = _upright(image, label)
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8bit(np.asarray(image), image.mode, label)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image, label: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:
        warnings.warn(f"image: {label} has damaged EXIF data ({error}); not rotated", stacklevel=4)
        return image


def _to_8bit(values: NDArray[Any], mode: str, label: str) -> NDArray[np.uint8]:
    """Grey values as 0..255: 16-bit by 1/257, floats in [0, 1] by 255, other ranges linearly."""
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"image: {label} holds NaN or infinite values; replace them first")
    low, high = float(values.min()), float(values.max())
    if mode.startswith("I;16"):
        values /= 257
    elif mode == "F" and low >= 0 and high <= 1:
        values *= 255
    elif low >= 0 and high <= 255:
        pass
    elif mode == "I" and low >= 0 and high <= 65535:
        values /= 257
    else:
        values = (values - low) * (255 / max(high - low, 1e-300))
    return np.rint(values).astype(np.uint8)
