"""The model's crop of a photo, and its inverse.

``prepare`` gives exactly the pixels of timm's evaluation transform (resize, then crop) and stores the
geometry as a :class:`View`, which maps (h, w) over the model's input back to the pixels of the original
photo (H, W): bilinear, cell centres at half-integers (``align_corners=False``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xattn.photos.images import load_image

if TYPE_CHECKING:
    from torch import Tensor

    from xattn.photos.preprocessing import Preprocessing

MAX_SIDE = 1_000_000  # largest side of a view in a pack, in pixels, for writers and readers alike
# If the resized photo would be larger, only the visible part is resampled.
DIRECT_PIXELS = 8_000_000


@dataclass(frozen=True)
class View:
    """The part of a photo that the model saw; sizes are (height, width) in pixels.

    The photo is resized to ``resized``; its region ``box`` (top, left, height, width) is the model's
    input, of ``input_size``. The box may extend beyond the edge of the resized photo (timm's
    ``crop_mode="border"`` pads).
    """

    mode: str
    photo_size: tuple[int, int]
    resized: tuple[int, int]
    box: tuple[int, int, int, int]
    input_size: tuple[int, int]

    @property
    def photo_box(self) -> tuple[float, float, float, float]:
        """The region of the photo that the model sees: (top, left, bottom, right) in photo pixels."""
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
        """Return this view if it is small enough to be stored in a pack.

        Raises:
            ValueError: a side exceeds ``MAX_SIDE``, for example for a photo of 20,000 x 1 pixels whose
                short side is resized to 256.
        """
        sides = (*self.photo_size, *self.resized, *map(abs, self.box), *self.input_size)
        if max(sides) > MAX_SIDE:
            (height, width), (tall, wide) = self.photo_size, self.resized
            raise ValueError(
                f"image: a photo of {width} x {height} pixels has {wide:,} x {tall:,} when it is resized "
                f"for the model, over the limit of {MAX_SIDE:,} per side; crop it"
            )
        return self

    def to_photo(
        self, map: NDArray[Any] | Tensor, size: tuple[int, int] | None = None
    ) -> NDArray[np.float32]:
        """Transfer a map over the model's input, (h, w) or (M, h, w), to the photo: (..., H, W), float32.

        The map is interpolated bilinearly between cell centres and constant beyond the outermost ones. If
        the photo is coarser than the map, the kernel widens, so that cells are averaged. Pixels outside the
        visible region are NaN. ``size`` requests another raster over the whole photo, e.g. a thumbnail's
        (height, width).
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
        """The weights of the map's cells for the pixels inside the view, and the range of these pixels."""
        start, length = self.box[axis], self.box[axis + 2]
        unit = self.resized[axis] / count  # one output pixel, in pixels of the resized photo
        centre = (np.arange(count) + 0.5) * unit - start
        inside = (centre >= 0) & (centre <= length)
        if not inside.any():  # the whole crop is between two pixel centres of a tiny photo
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
        """The view written by :meth:`to_json`; raises a ValueError if a field is missing or malformed."""
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
    """The cells that contribute to each pixel, (pixels, band), and their weights.

    This takes about 2 (pixels + cells) numbers; a full matrix would take pixels x cells.
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
    """A map (h, w) at (len(rows), len(columns)) pixels; the axis with the smaller result goes first."""
    (height, width), (tall, wide) = map.shape, (len(rows.cells), len(columns.cells))
    if tall * width <= height * wide:
        return columns(np.ascontiguousarray(rows(map).T)).T
    return rows(np.ascontiguousarray(columns(np.ascontiguousarray(map.T)).T))


def make_view(
    photo_size: tuple[int, int], preprocessing: Preprocessing, mode: str = "crop"
) -> View:
    """The geometry of ``prepare`` for a photo of (height, width) pixels.

    ``mode="crop"`` follows timm's evaluation transform for the model's ``crop_mode`` ("center",
    "squash", "border"), or that of transformers, which rounds the middle of a side down ("center_floor");
    ``mode="whole"`` squeezes the entire photo into the input, whatever its aspect ratio.
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
    down = preprocessing.crop_mode == "center_floor"
    top, left = _centre(resized[0], out_h, down), _centre(resized[1], out_w, down)
    return View("crop", (height, width), resized, (top, left, out_h, out_w), target)


def _keep_ratio(photo_size: tuple[int, int], ratio: float) -> tuple[int, int]:
    height, width = (max(round(side / ratio), 1) for side in photo_size)
    return height, width


def _centre(size: int, crop: int, down: bool) -> int:
    """Start of a centred crop, rounded ``down`` or to even; for a smaller image, minus the padding."""
    if crop > size:
        return -((crop - size) // 2)
    return (size - crop) // 2 if down else round((size - crop) / 2.0)


def prepare(
    image: Image.Image, preprocessing: Preprocessing, mode: str = "crop"
) -> tuple[Tensor, View]:
    """An RGB photo as the model's input, float32 (3, H, W) in [0, 1], not normalised, and its view.

    The whole photo is resized and then cropped, as in timm; if that would be large (a photo of
    8000 x 20 becomes 102400 x 256), only the visible part is resampled, to the same pixels up to the
    rounding of Pillow's single-precision box. A network with one channel gets the photo in grey.

    Raises:
        ValueError: the network has two channels, or more than three.
    """
    import torch

    if image.mode != "RGB":
        image = load_image(image, max_pixels=None)
    channels = len(preprocessing.mean)
    if channels not in (1, 3):
        raise ValueError(
            f"images: a photo has 3 channels, but the network takes {channels}; give tensors "
            f"({channels}, H, W), or arrays (H, W, {channels})"
        )
    image = image.convert("L") if channels == 1 else image
    view = make_view((image.height, image.width), preprocessing, mode)
    border = preprocessing.crop_mode == "border"
    fill = tuple(round(255 * m) * border for m in preprocessing.mean)
    pixels = np.array(_seen(image, view, preprocessing, fill), dtype=np.uint8)
    pixels = pixels.reshape(*pixels.shape[:2], channels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(255), view


def prepare_bands(
    pixels: Tensor, preprocessing: Preprocessing, mode: str = "crop"
) -> tuple[Tensor, View]:
    """:func:`prepare` for an image (C, H, W) in [0, 1] with any number of channels, not rounded to 8
    bits."""
    import torch

    view = make_view((pixels.shape[1], pixels.shape[2]), preprocessing, mode)
    fill = preprocessing.mean if preprocessing.crop_mode == "border" else [0.0] * len(pixels)
    bands = [
        np.array(_seen(Image.fromarray(band.float().numpy()), view, preprocessing, (value,)))
        for band, value in zip(pixels, fill, strict=True)
    ]
    return torch.from_numpy(np.stack(bands)).clamp(0, 1), view


def prepare_source(
    source: Any, photo: Image.Image, preprocessing: Preprocessing, mode: str
) -> tuple[Tensor, View]:
    """:func:`prepare` for ``photo`` or, if ``source`` has more or fewer than three channels, for the array
    in ``source``. A tensor of the network's size is used unchanged."""
    bands = getattr(source, "pixels", None)
    height, width = size = preprocessing.input_size
    if bands is not None and source.is_tensor and source.size == tuple(size):
        return source.input(), View("tensor", size, size, (0, 0, height, width), size)
    if bands is None or len(bands) == 3:
        return prepare(photo, preprocessing, mode)
    return prepare_bands(source.input(), preprocessing, mode)


def _seen(
    image: Image.Image, view: View, preprocessing: Preprocessing, fill: Sequence[float]
) -> Image.Image:
    """The part of an image, of any mode, that the model sees, surrounded by ``fill``."""
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
        colour: Any = tuple(fill) if len(fill) > 1 else fill[0]
        canvas = Image.new(image.mode, (width, height), colour)
        canvas.paste(seen, (x0 - left, y0 - top))
        seen = canvas
    return seen


def _resampling(name: str) -> Image.Resampling:
    if name == "random":  # timm: a training-time mixture; its evaluation default is bilinear
        name = "bilinear"
    try:
        return Image.Resampling[name.upper()]
    except KeyError:
        known = ", ".join(r.name.lower() for r in Image.Resampling)
        raise ValueError(f"interpolation: got {name!r}; give one of {known}") from None
