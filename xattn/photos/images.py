"""Image files: listing them, and reading each as an upright 8-bit RGB photo."""

from __future__ import annotations

import errno
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from xattn.photos.image_names import check_images, walk

MAX_PIXELS = 40_000_000
# Formats that run other programs or draw vectors (EPS, WMF, ...) are never opened.
FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "BMP",
    "DIB",
    "GIF",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
    "TGA",
)
_COPYING = threading.Lock()  # two threads must not decode one lazily opened image


# ---------------------------------------------------------------------- listing


def list_images(path: str | Path) -> list[Path]:
    """The image files that ``path`` stands for, in a fixed order.

    ``path`` is one image, a folder (searched recursively, hidden entries left out, sorted), or a
    ``.txt`` list with one ``path [label]`` per line, relative to the list's own folder; empty lines
    and lines that start with ``#`` are skipped. Listed files are not opened here.

    Raises:
        FileNotFoundError: ``path``, or a file that a list names, does not exist.
        ValueError: the folder or list holds no image.
    """
    path = Path(path)
    check_images(path)
    if path.is_dir():
        return sorted(walk(path))
    if path.suffix.lower() != ".txt":
        return [path]
    found = []
    for number, line in enumerate(_read_lines(path), start=1):
        if line and not line.startswith("#"):
            found.append(_listed_file(path, number, line))
    if not found:
        raise ValueError(f"images: the list {path} names no image; write one path per line")
    return found


def _read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(
            f"images: {path} is not a UTF-8 text list; write one path per line"
        ) from None


def _listed_file(path: Path, number: int, line: str) -> Path:
    for name in (line, line.rpartition("\t")[0], line.rpartition(" ")[0].rstrip()):
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


class Readable(Protocol):
    """A photo that reads itself, such as :class:`~xattn.photos.base.StoredPhoto`."""

    def load(self, max_pixels: int | None) -> Image.Image: ...


def load_image(
    source: str | Path | Image.Image | Readable, max_pixels: int | None = MAX_PIXELS
) -> Image.Image:
    """One photo, a file, an image or one of :mod:`xattn.photos.sources`, as 8-bit RGB, upright.

    EXIF rotation is applied; transparency is blended over white; 16-bit, 32-bit and float grey values
    are scaled to 8 bit and never clipped; an animation is read as its first frame. The size in the
    header is compared with ``max_pixels`` (None: no cap) before anything is decoded.

    Raises:
        FileNotFoundError, OSError: no such file, or it may not be read.
        ValueError: not an image, too many pixels, truncated or damaged, or non-finite values.
    """
    if isinstance(source, Image.Image):
        check_size(source.size, "the given image", max_pixels)
        with _COPYING:
            copy = source.copy()
        return _to_rgb(copy, "the given image")
    if not isinstance(source, str | Path):
        return source.load(max_pixels)
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"image: {path} is a folder; give a file, or list_images(folder)")
    if not path.exists():
        raise FileNotFoundError(f"image: no file {path}; check the path")
    with path.open("rb") as stream:
        return decode_image(stream, str(path), max_pixels)


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
    """Each thing with the future of ``read(thing)``, in order, started ``count`` things ahead.

    Reading runs in ``threads`` while the caller computes; no more than ``count`` results wait.
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
    """The formats of Pillow that are opened and that this installation can read."""
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
