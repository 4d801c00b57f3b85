"""Accepts and opens files that a browser sends.

Uploads are untrusted. The numbers of files, bytes and pixels are checked before anything is decoded, and
only the formats in :data:`xattn.photos.images.FORMATS` are opened. Only the pixels and the name of a photo
are kept; its location, camera data and comments are discarded.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from xattn.photos.image_names import CLIPS, SUFFIXES
from xattn.photos.images import MAX_PIXELS, decode_image, readable_formats

PHOTO_TYPES = sorted(s.removeprefix(".") for s in SUFFIXES)
CLIP_TYPES = sorted(s.removeprefix(".") for s in CLIPS)
MAX_PHOTOS = 32
MAX_BYTES = 32 << 20  # largest size of a photo
MAX_TOTAL = 256 << 20  # largest size of all photos together
MAX_CLIP_BYTES = 200 << 20
NAME_LENGTH = 100  # largest number of characters in a name
NAME_BYTES = 200  # largest number of bytes of a name in UTF-8; file systems allow 255


@dataclass(frozen=True)
class Upload:
    """One uploaded file, with its cleaned name and its bytes or, without them, their digest."""

    name: str
    data: bytes = field(repr=False)
    digest: str = ""

    def without_bytes(self) -> Upload:
        """A copy with a digest instead of the bytes; copies are equal if names and bytes were equal."""
        if self.digest:
            return self
        return Upload(self.name, b"", hashlib.sha256(self.data).hexdigest())


Problem = tuple[str, str]  # (file name, a phrase for the user that describes what is wrong with it)


def accept(files: Sequence[Any] | None) -> tuple[list[Upload], list[Problem]]:
    """Check the headers of ``files``; return the usable photos, and a problem for each of the other files.

    ``files`` are Streamlit's ``UploadedFile`` objects, or other objects with ``name``, ``size`` and
    ``getvalue()``.
    """
    good: list[Upload] = []
    problems: list[Problem] = []
    total = 0
    for number, file in enumerate(files or ()):
        name = clean_name(file.name)
        if number >= MAX_PHOTOS:
            problems.append((name, f"only {MAX_PHOTOS} photos can be explained at a time"))
            continue
        try:
            _check_bytes(file.size, MAX_BYTES)
            if total + file.size > MAX_TOTAL:
                raise ValueError(f"the limit is {MAX_TOTAL / 1e6:.0f} MB at a time")
            upload = Upload(name, file.getvalue())
            _check_header(upload)
        except ValueError as error:
            problems.append((name, str(error)))
        else:
            good.append(upload)
            total += file.size
    return good, problems


def accept_clip(file: Any) -> Upload:
    """Accept a clip by its name and size; whether it can be decoded is not checked.

    Raises:
        ValueError: the file is empty or too large, or its suffix is not that of a video.
    """
    name = clean_name(file.name)
    if PurePosixPath(name).suffix.lower() not in CLIPS:
        raise ValueError("not a video: give .mp4, .mov, .avi, .mkv, .webm, ...")
    _check_bytes(file.size, MAX_CLIP_BYTES)
    return Upload(name, file.getvalue())


def photo(upload: Upload) -> Image.Image:
    """Decode a photo to 8-bit RGB, rotate it upright, and remove its metadata.

    The attribute ``filename`` of the result is the name of the upload.

    Raises:
        ValueError: the file is not an image, or is too large, truncated or damaged.
    """
    try:
        decoded = decode_image(io.BytesIO(upload.data), upload.name, MAX_PIXELS)
    except ValueError as error:
        said = str(error).removeprefix(f"image: {upload.name} ")
        raise ValueError(said.removeprefix("is ")) from None
    clean = Image.fromarray(np.asarray(decoded))
    clean.filename = upload.name  # type: ignore[attr-defined]
    return clean


def clean_name(name: str) -> str:
    """The last part of a file name, shortened and without control characters."""
    last = PureWindowsPath(PurePosixPath(str(name)).name).name
    shown = "".join(c if c.isprintable() else "_" for c in last).strip() or "photo"
    stem, dot, suffix = shown.rpartition(".")
    if not dot or len(suffix) > 8:
        stem, dot, suffix = shown, "", ""
    end = dot + suffix
    stem = stem[: NAME_LENGTH - len(end)]
    return stem.encode()[: NAME_BYTES - len(end.encode())].decode(errors="ignore") + end


def _check_bytes(size: int, limit: int) -> None:
    if size <= 0:
        raise ValueError("empty: it has 0 bytes; save or upload it again")
    if size > limit:
        raise ValueError(f"too large: {size / 1e6:.0f} MB; the limit is {limit / 1e6:.0f} MB")


def _check_header(upload: Upload) -> None:
    """Check the format and the size in the header, without decoding pixels."""
    limit = f"the limit is {MAX_PIXELS / 1e6:.0f} million pixels; make the photo smaller"
    try:
        with Image.open(io.BytesIO(upload.data), formats=readable_formats()) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise ValueError(f"too many pixels: {limit}") from None
    except UnidentifiedImageError:
        raise ValueError("not a readable image: give a JPEG, PNG, WebP, ...") from None
    except Exception as error:  # a decoder can raise any error for a damaged header
        raise ValueError(
            f"truncated or damaged ({type(error).__name__}); save or upload it again"
        ) from None
    if width * height > MAX_PIXELS:
        raise ValueError(f"too many pixels: {width} x {height}; {limit}")
