"""Photos in, heat maps back out: reading files of any kind, the model's crop, and its inverse.

``prepare`` gives the very pixels of timm's evaluation transform (resize, then crop), and keeps the
geometry as a :class:`View`, so that a map (h, w) over the model's input comes back on the pixels of
the original photo (H, W): bilinear, cell centres at half-integers (``align_corners=False``).
"""

from __future__ import annotations

import errno
import math
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

    from xattn.backbone import Preprocessing
    from xattn.sources import StoredPhoto

MAX_PIXELS = 40_000_000
MAX_SIDE = 1_000_000  # pixels of a side of a view in a pack, for writers and readers alike
DIRECT_PIXELS = 8_000_000  # larger resized photos are resampled in the seen part only
SUFFIXES = frozenset(
    ".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif .tga".split()
)
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
    ``.txt`` list with one ``path [label]`` a line, relative to the list's own folder; empty lines
    and lines that start with ``#`` are skipped. Listed files are not opened here.

    Raises:
        FileNotFoundError: ``path``, or a file that a list names, does not exist.
        ValueError: the folder or list holds no image.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(_walk(path))
        if not found:
            raise ValueError(
                f"images: no image in folder {path}; files named .jpg, .png, .webp, .tif, ... count"
            )
        return found
    if not path.exists():
        raise FileNotFoundError(
            f"images: no file or folder {path}; give an image, a folder or a .txt list"
        )
    if path.suffix.lower() != ".txt":
        return [path]
    found = []
    for number, line in enumerate(_read_lines(path), start=1):
        if line and not line.startswith("#"):
            found.append(_listed_file(path, number, line))
    if not found:
        raise ValueError(f"images: the list {path} names no image; write one path a line")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """Image files below ``folder``; linked folders are followed once each, so loops end."""
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


def _read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(
            f"images: {path} is not a UTF-8 text list; write one path a line"
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


def load_image(
    source: str | Path | Image.Image | StoredPhoto, max_pixels: int | None = MAX_PIXELS
) -> Image.Image:
    """One photo, a file, an image or one of :mod:`xattn.sources`, as 8-bit RGB, upright.

    EXIF rotation is applied; transparency is laid over white; 16-bit, 32-bit and float grey values
    are scaled to 8 bit and never clipped; of an animation the first frame counts. The size in the
    header is compared with ``max_pixels`` (None: no cap) before anything is decoded.

    Raises:
        FileNotFoundError, OSError: no such file, or it may not be read.
        ValueError: not an image, too many pixels, truncated or damaged, or non-finite values.
    """
    if isinstance(source, Image.Image):
        _check_size(source.size, "the given image", max_pixels)
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
        image = Image.open(stream, formats=_formats())
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
    _check_size(image.size, label, max_pixels)
    return _to_rgb(image, label)


Thing = TypeVar("Thing")
Read = TypeVar("Read")


def read_ahead(
    read: Callable[[Thing], Read], things: Iterable[Thing], count: int, threads: int = 2
) -> Iterator[tuple[Thing, Future[Read]]]:
    """Each thing with the future of ``read(thing)``, in order, begun ``count`` things ahead.

    Decoding runs in ``threads`` while the caller computes; no more than ``count`` results wait.
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


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_size(size: tuple[int, int], label: str, max_pixels: int | None) -> None:
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


# ---------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class View:
    """What part of a photo the model saw; sizes are (height, width) in pixels.

    The photo is resized to ``resized``; ``box`` (top, left, height, width) of that is the model's
    input, of ``input_size``. A box may reach over the edge (timm's ``crop_mode="border"`` pads).
    """

    mode: str
    photo_size: tuple[int, int]
    resized: tuple[int, int]
    box: tuple[int, int, int, int]
    input_size: tuple[int, int]

    @property
    def photo_box(self) -> tuple[float, float, float, float]:
        """The seen region on the photo: (top, left, bottom, right) in photo pixels."""
        top, left, height, width = self.box
        y, x = (p / r for p, r in zip(self.photo_size, self.resized, strict=True))
        bottom, right = (top + height) * y, (left + width) * x
        return (
            max(top * y, 0.0),
            max(left * x, 0.0),
            min(bottom, float(self.photo_size[0])),
            min(right, float(self.photo_size[1])),
        )

    def check_size(self) -> View:
        """The view itself, if a pack may hold it.

        Raises:
            ValueError: a side over ``MAX_SIDE``, for example of a photo of 20,000 x 1 pixels whose
                short side is resized to 256.
        """
        sides = (*self.photo_size, *self.resized, *map(abs, self.box), *self.input_size)
        if max(sides) > MAX_SIDE:
            (height, width), (tall, wide) = self.photo_size, self.resized
            raise ValueError(
                f"image: a photo of {width} x {height} pixels has {wide:,} x {tall:,} when it is resized "
                f"for the model, over the limit of {MAX_SIDE:,} a side; crop it"
            )
        return self

    def to_photo(
        self, map: NDArray[Any] | Tensor, size: tuple[int, int] | None = None
    ) -> NDArray[np.float32]:
        """A map over the model's input, (h, w) or (M, h, w), on the photo: (..., H, W), float32.

        Bilinear between cell centres, constant beyond the outermost; where the photo is coarser
        than the map the kernel widens (an average, not a sample). NaN outside the seen region.
        ``size`` asks for another raster over the whole photo, e.g. a thumbnail's (height, width).
        """
        values = np.asarray(map.detach().cpu().float() if hasattr(map, "detach") else map)
        if values.ndim not in (2, 3) or 0 in values.shape:
            raise ValueError(f"map: got shape {values.shape}; give (h, w) or (M, h, w)")
        height, width = size or self.photo_size
        rows, inside_y = self._weights(0, values.shape[-2], height)
        columns, inside_x = self._weights(1, values.shape[-1], width)
        out = np.full((*values.shape[:-2], height, width), np.nan, dtype=np.float32)
        for index in np.ndindex(values.shape[:-2]):
            one = values[index].astype(np.float32)
            out[(*index, inside_y, inside_x)] = _resampled(one, rows, columns)
        return out

    def _weights(self, axis: int, cells: int, count: int) -> tuple[_Band, slice]:
        """The weights of the map's cells for the pixels inside, and where those are."""
        start, length = self.box[axis], self.box[axis + 2]
        unit = self.resized[axis] / count  # one output pixel, in pixels of the resized photo
        centre = (np.arange(count) + 0.5) * unit - start
        inside = (centre >= 0) & (centre <= length)
        if not inside.any():  # the whole crop lies between two pixel centres of a tiny photo
            inside = (centre + unit / 2 > 0) & (centre - unit / 2 < length)
        at = np.clip(centre[inside] * cells / length, 0, cells)
        support = max(1.0, unit * cells / length)
        band = min(cells, math.floor(2 * support) + 1)
        least = np.clip(np.ceil(at - support - 0.5), 0, cells - band).astype(np.int64)
        near = least[:, None] + np.arange(band)
        weights = np.maximum(1 - np.abs(at[:, None] - (near + 0.5)) / support, 0)
        weights /= weights.sum(axis=1, keepdims=True)
        first = int(inside.argmax())
        return _Band(near, weights.astype(np.float32)), slice(first, first + len(at))

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary of strings and lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> View:
        """The view that :meth:`to_json` wrote; ValueError if a field is missing or malformed."""
        try:
            sizes = {
                key: tuple(int(v) for v in data[key])
                for key in ("photo_size", "resized", "box", "input_size")
            }
            view = cls(mode=str(data["mode"]), **sizes)  # type: ignore[arg-type]
            valid = [len(v) for v in sizes.values()] == [2, 2, 4, 2]
            positive = (*view.photo_size, *view.resized, *view.box[2:], *view.input_size)
        except (KeyError, TypeError, ValueError, IndexError):
            valid = False
        if not valid or min(positive) < 1:
            raise ValueError(f"view: got {data!r}; give what View.to_json wrote")
        return view


class _Band(NamedTuple):
    """Weights (pixels, band) of the cells (pixels, band) that are not too far away to count.

    All of them together are about 2 (pixels + cells) numbers, where a matrix has pixels x cells.
    """

    cells: NDArray[np.int64]
    weights: NDArray[np.float32]

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Cells (cells, n) to pixels (pixels, n)."""
        out = self.weights[:, :1] * values[self.cells[:, 0]]
        for i in range(1, self.cells.shape[1]):
            out += self.weights[:, i, None] * values[self.cells[:, i]]
        return out


def _resampled(map: NDArray[np.float32], rows: _Band, columns: _Band) -> NDArray[np.float32]:
    """A map (h, w) at (len(rows), len(columns)) pixels, by way of the smaller of the two halfway."""
    (height, width), (tall, wide) = map.shape, (len(rows.cells), len(columns.cells))
    if tall * width <= height * wide:
        return columns(np.ascontiguousarray(rows(map).T)).T
    return rows(np.ascontiguousarray(columns(np.ascontiguousarray(map.T)).T))


def make_view(
    photo_size: tuple[int, int], preprocessing: Preprocessing, mode: str = "crop"
) -> View:
    """The geometry of ``prepare`` for a photo of (height, width) pixels.

    ``mode="crop"`` follows timm's evaluation transform for the model's ``crop_mode`` ("center",
    "squash", "border"); ``mode="whole"`` squeezes the entire photo into the input, aspect not kept.
    """
    if mode not in ("crop", "whole"):
        raise ValueError(f"view: got {mode!r}; give 'crop' (the model's own) or 'whole'")
    height, width = photo_size
    out_h, out_w = target = preprocessing.input_size
    if mode == "whole":
        return View("whole", (height, width), target, (0, 0, *target), target)
    scale_h, scale_w = (math.floor(side / preprocessing.crop_pct) for side in target)
    if preprocessing.crop_mode == "squash":
        resized = (scale_h, scale_w)
    elif preprocessing.crop_mode == "border":
        resized = _keep_ratio(photo_size, max(height / scale_h, width / scale_w))
    elif scale_h != scale_w:
        resized = _keep_ratio(photo_size, min(height / scale_h, width / scale_w))
    elif width <= height:
        resized = (int(scale_w * height / width), scale_w)
    else:
        resized = (scale_h, int(scale_h * width / height))
    top, left = _centre(resized[0], out_h), _centre(resized[1], out_w)
    return View("crop", (height, width), resized, (top, left, out_h, out_w), target)


def _keep_ratio(photo_size: tuple[int, int], ratio: float) -> tuple[int, int]:
    height, width = (max(round(side / ratio), 1) for side in photo_size)
    return height, width


def _centre(size: int, crop: int) -> int:
    """Start of a centred crop, or minus the padding before a centred, smaller image."""
    return -((crop - size) // 2) if crop > size else round((size - crop) / 2.0)


def prepare(
    image: Image.Image, preprocessing: Preprocessing, mode: str = "crop"
) -> tuple[Tensor, View]:
    """An RGB photo as the model's input, float32 (3, H, W) in [0, 1], not normalised, and its view.

    The whole photo is resized and then cropped, as timm does; where that would be large (a photo of
    8000 x 20 becomes 102400 x 256) only the seen part is resampled, to the same pixels up to the
    rounding of Pillow's single-precision box.
    """
    import torch

    if image.mode != "RGB":
        image = load_image(image, max_pixels=None)
    view = make_view((image.height, image.width), preprocessing, mode)
    top, left, height, width = view.box
    y0, y1 = max(top, 0), min(top + height, view.resized[0])
    x0, x1 = max(left, 0), min(left + width, view.resized[1])
    resampling = _resampling(preprocessing.interpolation)
    if view.resized[0] * view.resized[1] <= DIRECT_PIXELS:
        seen = image.resize(view.resized[::-1], resampling).crop((x0, y0, x1, y1))
    else:
        y, x = image.height / view.resized[0], image.width / view.resized[1]
        box = (x0 * x, y0 * y, min(x1 * x, image.width), min(y1 * y, image.height))
        seen = image.resize((x1 - x0, y1 - y0), resampling, box=box)
    if seen.size != (width, height):
        border = preprocessing.crop_mode == "border"
        fill = tuple(round(255 * m) for m in preprocessing.mean) if border else (0, 0, 0)
        canvas = Image.new("RGB", (width, height), fill)
        canvas.paste(seen, (x0 - left, y0 - top))
        seen = canvas
    pixels = np.array(seen, dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(255), view


def _resampling(name: str) -> Image.Resampling:
    if name == "random":  # timm: a training-time mixture; its evaluation default is bilinear
        name = "bilinear"
    try:
        return Image.Resampling[name.upper()]
    except KeyError:
        known = ", ".join(r.name.lower() for r in Image.Resampling)
        raise ValueError(f"interpolation: got {name!r}; give one of {known}") from None
