"""Sources of evidence in images: a file of boxes and polygons, masks, or text detectors.

A source is called with the photo's name and the photo, and returns boxes [x0, y0, x1, y1] and polygons
[[x, y], ...] in pixels of the upright photo, or a mask (H, W). :func:`open_evidence` creates one from

* a JSON file ``{"7.jpg": [box or polygon, ...]}``; an entry may also be ``{"box": ...}`` with further
  keys, as in the files of :class:`xattn.eval.annotations.Boxes`;
* a folder of masks, ``7.png`` for ``7.jpg``, whose nonzero pixels (or given numbers) are evidence;
* ``"mser"``, text lines from maximally stable extremal regions (Matas et al. 2002), without weights;
* ``"onnx:PATH"``, a text detector of the DB type (arXiv 1911.08947), run by OpenCV.

Each entry of boxes and each mask belongs to one photo: these two sources have a method
``check(names)`` that raises an error if two photos have the same entry.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xattn.runtime import strict_json
from xattn.runtime.files import file_sha256

Region: TypeAlias = Sequence[Any]  # [x0, y0, x1, y1] or [[x, y], ...]
Found: TypeAlias = "Sequence[Region] | NDArray[np.bool_]"
Source: TypeAlias = Callable[[str, Image.Image], Found]

MSER_SIDE = 256  # shorter side, in pixels, at which MSER looks for letters
_DB_MEAN = (122.67891434, 116.66876762, 104.00698793)  # for B, G, R, as in DB's own models


def evidence_mask(found: Found, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels of an image of ``size`` (width, height) that a box or polygon touches, (H, W).

    Regions are clipped at the image's border. A polygon also covers the pixels directly
    around it.

    Raises:
        ValueError: a region is outside the image or has no area, or a mask does not have the image's size.

    Example:
        >>> from xattn.parts import evidence_mask
        >>> evidence_mask([[0, 0, 4, 2]], size=(4, 4)).astype(int)
        array([[1, 1, 1, 1],
               [1, 1, 1, 1],
               [0, 0, 0, 0],
               [0, 0, 0, 0]])
    """
    width, height = size
    if isinstance(found, np.ndarray) and found.dtype == np.bool_:
        if found.shape != (height, width):
            raise ValueError(
                f"evidence: got a mask of {found.shape[::-1]} for an image of {size}; masks have the "
                f"image's width and height"
            )
        return found
    mask = np.zeros((height, width), np.uint8)
    for region in found:
        points = _points(region)
        (left, top), (right, bottom) = points.min(0), points.max(0)
        if left >= width or top >= height or right <= 0 or bottom <= 0:
            raise ValueError(
                f"evidence: {_brief(region)} lies outside the image of {width} x {height} pixels; give "
                f"pixels of the upright image, not fractions or another size's"
            )
        if len(points) == 2:
            x0, y0 = max(math.floor(left), 0), max(math.floor(top), 0)
            mask[y0 : math.ceil(bottom), x0 : math.ceil(right)] = 1
        else:
            mask |= _filled(points, mask.shape)
    return mask.astype(bool)


def _points(region: Region) -> NDArray[np.float64]:
    """The two corners of a box, (2, 2), or the points of a polygon, (n, 2)."""
    try:
        points = np.asarray(region, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        points = np.empty(0)
    if points.shape == (4,):
        points = points.reshape(2, 2)
    elif points.ndim != 2 or points.shape[1] != 2 or len(points) < 3:
        points = np.full((1, 2), np.nan)
    if not np.isfinite(points).all():
        raise ValueError(
            f"evidence: got {_brief(region)}; give [x0, y0, x1, y1] or [[x, y], ...] of 3 points or more"
        )
    low, high = (points[0], points[1]) if len(points) == 2 else (points.min(0), points.max(0))
    if not (low < high).all():
        raise ValueError(f"evidence: {_brief(region)} has no area; give x0 < x1 and y0 < y1")
    return points


def _brief(region: Any) -> str:
    text = str(region.tolist() if isinstance(region, np.ndarray) else region)
    return text if len(text) <= 80 else text[:77] + "..."


def _filled(points: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    import cv2

    bits = 8  # fractions of a pixel; OpenCV's whole numbers are the centres of pixels
    limit = 2 ** (30 - bits)
    fixed = np.rint((np.clip(points, -limit, limit) - 0.5) * 2**bits).astype(np.int32)
    filled: Any = np.zeros(shape, np.uint8)
    cv2.fillPoly(filled, [fixed], 1, shift=bits)
    return cv2.dilate(filled, np.ones((3, 3), np.uint8))  # type: ignore[return-value]


# ---------------------------------------------------------------------- sources


def open_evidence(source: str | Path, numbers: Sequence[int] = ()) -> Source:
    """Open the evidence that ``source`` names (see the module); ``numbers`` are the values of masks to use.

    Raises:
        ValueError: an unknown form, or a damaged file. FileNotFoundError: no such file or folder.

    Example:
        >>> from xattn.parts import open_evidence
        >>> type(open_evidence("mser")).__name__
        'MserText'
    """
    text = str(source)
    if numbers and not Path(text).is_dir():
        raise ValueError(f"numbers: got {list(numbers)}; only a folder of masks has numbers")
    if text == "mser":
        return MserText()
    if text.startswith("onnx:"):
        return DetectorText(text.removeprefix("onnx:"))
    path = Path(text)
    if path.is_dir():
        return Masks(path, numbers)
    if not path.exists():
        raise FileNotFoundError(
            f"evidence: no file or folder {text}; give a JSON file of boxes, a folder of masks, mser, or "
            f"onnx:PATH"
        )
    return BoxFile(path)


class BoxFile:
    """Boxes and polygons from a JSON file, whose keys are file names of photos or the last parts of paths.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from xattn.parts import BoxFile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp(), "boxes.json")
        >>> _ = path.write_text('{"a.jpg": [[0, 0, 64, 16]]}')
        >>> BoxFile(path)("a.jpg", Image.new("RGB", (64, 64)))
        [[0, 0, 64, 16]]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            text = self.path.read_text(encoding="utf-8-sig")
            table = strict_json.parse(text)
        except ValueError as error:
            raise ValueError(
                f"evidence: {path} is not UTF-8 JSON ({error}); write it anew"
            ) from None
        if not isinstance(table, dict) or not all(isinstance(v, list) for v in table.values()):
            raise ValueError(
                f'evidence: {path} has the wrong form; give {{"7.jpg": [[x0, y0, x1, y1], ...]}}'
            )
        self.table: dict[str, list[Any]] = {PurePath(k).as_posix(): v for k, v in table.items()}
        self.description = f"boxes {hashlib.sha256(text.encode()).hexdigest()}"

    def __call__(self, name: str, image: Image.Image) -> list[Region]:
        key = self._key(name)
        if key is None:
            raise ValueError(f"evidence: {self.path} has no entry for {PurePath(name).name}")
        return [_region(entry) for entry in self.table[key]]

    def _key(self, name: str) -> str | None:
        """The longest end of ``name`` in the table: file names may repeat across folders."""
        parts = PurePath(name).parts
        ends = (PurePath(*parts[start:]).as_posix() for start in range(len(parts)))
        return next((end for end in ends if end in self.table), None)

    def check(self, names: Iterable[str]) -> None:
        """Raise a ``ValueError`` if two photos have the same entry."""
        if (shared := _shared(names, self._key)) is not None:
            key, first, second = shared
            raise ValueError(
                f"evidence: the entry {key!r} of {self.path} belongs to {first} and {second}; give "
                f"each an entry with its folder"
            )


def _shared(
    names: Iterable[str], key_of: Callable[[str], str | None]
) -> tuple[str, str, str] | None:
    """A key that two names share, and these names."""
    owners: dict[str, str] = {}
    for name in names:
        key = key_of(name)
        if key is not None and owners.setdefault(key, name) != name:
            return key, owners[key], name
    return None


def _region(entry: Any) -> Region:
    if isinstance(entry, dict):
        entry = entry.get("box", entry.get("polygon"))
    if not isinstance(entry, list):
        raise ValueError(
            'evidence: an entry is not a box; give [x0, y0, x1, y1], [[x, y], ...] or {"box": ...}'
        )
    return entry


class Masks:
    """A folder of masks, ``7.png`` for ``7.jpg``: a pixel is evidence if its value is one of
    ``numbers`` or, if none are given, is not 0.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from xattn.parts import Masks
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("L", (4, 4), 255).save(folder / "a.png")
        >>> Masks(folder)("a.jpg", Image.new("RGB", (4, 4))).all()
        np.True_
    """

    def __init__(self, folder: str | Path, numbers: Sequence[int] = ()) -> None:
        self.folder, self.numbers = Path(folder), tuple(numbers)
        sizes = sorted((p.name, p.stat().st_size) for p in self.folder.glob("*.png"))
        if not sizes:
            raise ValueError(f"evidence: {folder} holds no .png mask; name the folder of masks")
        digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
        self.description = f"masks {digest} {list(self.numbers)}"

    def _path(self, name: str) -> Path:
        return self.folder / f"{PurePath(name).stem}.png"

    def check(self, names: Iterable[str]) -> None:
        """Raise a ``ValueError`` if two photos have the same mask."""

        def mask_of(name: str) -> str | None:
            return str(path) if (path := self._path(name)).is_file() else None

        if (shared := _shared(names, mask_of)) is not None:
            mask, first, second = shared
            raise ValueError(
                f"evidence: the mask {mask} belongs to {first} and {second}; give photos names of "
                f"their own, or cut each folder with its own masks"
            )

    def __call__(self, name: str, image: Image.Image) -> NDArray[np.bool_]:
        path = self._path(name)
        if not path.is_file():
            raise ValueError(f"evidence: no mask {path}")
        try:
            with Image.open(path) as mask:
                values = np.asarray(mask)
        except (
            Exception
        ) as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
            raise ValueError(f"evidence: mask {path} is damaged ({error}); replace it") from None
        if values.ndim != 2:
            raise ValueError(f"evidence: mask {path} has {values.shape[2]} channels; give one")
        return np.isin(values, self.numbers) if self.numbers else values != 0


class MserText:
    """Lines of text found by MSER: rows of at least three stable regions, each about the size of a letter.

    This fallback does not recognise letters: it finds bold lettering, but also some rows of other
    small objects, and misses faint, slanted or very small text.

    Example:
        >>> from PIL import Image
        >>> from xattn.parts import MserText
        >>> MserText()("a.jpg", Image.new("RGB", (64, 64)))  # a black photo holds no text
        []
    """

    description = "mser"

    def __call__(self, name: str, image: Image.Image) -> list[Region]:
        scale = min(MSER_SIDE / min(image.size), 4.0)
        size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        down = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
        x, y, width, height = _letters(np.asarray(image.convert("L").resize(size, down)))
        middle = y + height / 2
        tall, low = np.maximum(height[:, None], height), np.minimum(height[:, None], height)
        gap = np.maximum(x[:, None], x) - np.minimum((x + width)[:, None], x + width)
        linked = (tall <= 1.6 * low) & (np.abs(middle[:, None] - middle) <= 0.3 * low)
        lines: list[Region] = []
        for row in _components(linked & (gap <= 1.5 * tall)):
            size_of_letter = float(np.median(height[row]))
            centres = np.sort((x + width / 2)[row])
            letters = 1 + int((np.diff(centres) > 0.3 * size_of_letter).sum())
            if letters < 3:  # regions are nested: several may be one letter
                continue
            rim = 0.15 * size_of_letter  # for an outline, and for what the blur removed
            box = (
                max(x[row].min() - rim, 0) / scale,
                max(y[row].min() - rim, 0) / scale,
                min((x + width)[row].max() + rim, size[0]) / scale,
                min((y + height)[row].max() + rim, size[1]) / scale,
            )
            lines.append([round(float(v), 2) for v in box])
        return lines


def _letters(grey: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(4, n): left, top, width, height of stable regions in ``grey`` (H, W) with a letter's shape."""
    import cv2

    height, width = grey.shape
    # A blur gives flat strokes a slope, because OpenCV finds no stable region on a plateau.
    mser = cv2.MSER.create(
        delta=30,
        min_area=12,
        max_area=max(int(0.02 * height * width), 13),
        max_variation=1.0,
        min_diversity=0.3,
    )
    _, boxes = mser.detectRegions(cv2.GaussianBlur(grey, (3, 3), 0))
    if not len(boxes):
        return np.empty((4, 0))
    found = np.unique(np.asarray(boxes, dtype=np.float64), axis=0).T
    w, h = found[2], found[3]
    fits = (h >= max(6, 0.02 * height)) & (h <= 0.25 * height) & (w <= 2.5 * h) & (w >= 0.1 * h)
    return found[:, fits]


def _components(linked: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Connected components of a symmetric, reflexive relation (n, n), each as (n,) bool."""
    count = len(linked)
    label = np.arange(count)
    while count:
        lowest = np.where(linked, label, count).min(1)
        if (lowest == label).all():
            break
        label = lowest
    return [label == i for i in np.unique(label)]


class DetectorText:
    """Text found by your own ONNX network: it outputs a probability map as in DB, which OpenCV
    post-processes.

    Args:
        path: the ONNX file; it maps (BGR - mean) / 255 of shape (1, 3, side, side) to probabilities
            (side, side), without further axes, as OpenCV requires.
        side: side of the network's input in pixels, a multiple of 32.
    """

    def __init__(self, path: str | Path, side: int = 736) -> None:
        import cv2

        if not Path(path).is_file():
            raise FileNotFoundError(
                f"evidence: no file {path}; give onnx:PATH of a DB text detector"
            )
        if side < 32 or side % 32:
            raise ValueError(f"side: got {side}; give a multiple of 32")
        self.path, self.side = Path(path), side
        try:
            self.model = cv2.dnn.TextDetectionModel_DB(str(path))
        except (cv2.error, SystemError) as error:  # its constructor wraps one in the other
            raise ValueError(
                f"evidence: OpenCV cannot read {path} ({_reason(error)}); give an ONNX file"
            ) from None
        self.model.setInputParams(1 / 255, (side, side), _DB_MEAN)
        self.description = f"onnx {file_sha256(self.path)} {side}"

    def __call__(self, name: str, image: Image.Image) -> list[Region]:
        import cv2

        frame = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
        try:
            polygons, _ = self.model.detect(frame)
        except cv2.error as error:
            raise ValueError(
                f"evidence: {self.path} is not a DB text detector ({_reason(error)}); give a network that "
                f"maps (1, 3, {self.side}, {self.side}) to probabilities ({self.side}, {self.side})"
            ) from None
        return [np.asarray(polygon).tolist() for polygon in polygons]


def _reason(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())[:160]
