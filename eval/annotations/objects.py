"""Read masks or boxes of objects in photos, and map them to the model's input.

A pixel of the model's input belongs to an object if its centre, mapped back onto the photo by the
:class:`~xattn.photos.view.View`, is in a pixel of the object's mask, or in its box. Parts that the view
cuts off are ignored, and padding is background.
"""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from xattn.eval.annotations.coco import THING_IDS, THINGS, model_classes
from xattn.eval.interfaces import Classifier
from xattn.photos.view import View
from xattn.runtime import strict_json
from xattn.runtime.files import printable
from xattn.runtime.names import did_you_mean, short_reason

Region = tuple[str, NDArray[np.bool_]]
Box = tuple[str, float, float, float, float]  # category, x0, y0, x1, y1 in pixels of the photo
_MODES = ("1", "L", "P", "I", "I;16")  # one channel of whole numbers, or of palette indices for "P"
_NOT_A_CLASS = ("unlabeled", "unlabelled", "background", "void", "ignore")
_BEYOND = 0.5  # pixels by which a box may extend beyond the photo, due to rounding


@dataclass(frozen=True, eq=False)
class Annotation:
    """The objects of one photo. ``masks`` maps classes of the model to masks (1, H, W) bool over the
    model's input.

    Example:
        >>> import torch
        >>> from xattn.eval import Annotation
        >>> one = Annotation({3: torch.ones(4, 4, dtype=torch.bool)})  # where class 3 is
        >>> one.masks[3].sum()
        tensor(16)
    """

    masks: Mapping[int, Tensor]

    def mask(self, target: int) -> Tensor | None:
        """Return the mask of all objects of the class, (1, H, W) bool; None if the view shows no such
        object."""
        return self.masks.get(target)


class Annotations(ABC):
    """Annotations of photos. They are found by the photo's file name, which must be unique in all folders.

    Args:
        path: the file or folder with the annotations.
        names: the category of each class number in the files.
        classes: the category of each class of the model; several classes may share one.

    Example:
        >>> import json, tempfile, xattn
        >>> from pathlib import Path
        >>> from xattn.eval import load_annotations
        >>> file = Path(tempfile.mkdtemp(), "boxes.json")
        >>> _ = file.write_text(json.dumps({"a.jpg": [{"box": [8, 8, 24, 24], "class": 15}]}))
        >>> classes = {"num_classes": 2, "class_names": ["cat", "dog"]}
        >>> net = xattn.load_backbone("test_resnet", weights=None, **classes)
        >>> load_annotations(file, net).classes
        {0: 'cat', 1: 'dog'}
    """

    def __init__(self, path: str | Path, names: Mapping[int, str], classes: Mapping[int, str]):
        self.path, self.names, self.classes = Path(path), dict(names), dict(classes)
        if not self.path.exists():
            raise ValueError(f"annotations: no file or folder {path}; check the path")
        if not self.classes:
            raise ValueError(
                "annotations: no class of the model has a category; give the categories as classes"
            )
        unknown = sorted(set(self.classes.values()) - set(self.names.values()))
        if unknown:
            raise ValueError(
                f"annotations: classes contains {unknown}, which is missing from names"
            )

    def of(self, photo: Any, view: View) -> Annotation:
        """Return the objects of a photo as the model sees them. The photo is given as its path.

        Raises:
            ValueError: if the photo has no annotations, or they are damaged or do not fit the photo.
        """
        name = photo if isinstance(photo, str | Path) else getattr(photo, "name", None)
        if not name:
            raise ValueError(
                "annotations: the photo has no file name, so its annotations cannot be found"
            )
        masks: dict[str, Tensor] = {}
        for category, pixels in self.regions(Path(str(name)), view):
            if pixels.any():
                mask = torch.from_numpy(pixels)[None]
                masks[category] = masks[category] | mask if category in masks else mask
        return Annotation({i: masks[k] for i, k in self.classes.items() if k in masks})

    @abstractmethod
    def has(self, photo: Path) -> bool:
        """Return whether there are annotations for this photo, even if they are damaged."""

    @abstractmethod
    def regions(self, photo: Path, view: View) -> Iterator[Region]:
        """Yield each object's category with its pixels, (H, W) bool over the model's input. A category may
        occur several times."""

    @property
    def fingerprint(self) -> str:
        """The SHA-256 hash of the files, the categories and the classes."""
        digest = hashlib.sha256(json.dumps([self.names, self.classes]).encode())
        paths = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        for path in paths:
            if path.is_file():
                digest.update(printable(path.name).encode() + path.read_bytes())
        return digest.hexdigest()


class MaskFolder(Annotations):
    """A folder of PNG files with class numbers. The mask of ``some/where/7.jpg`` is ``7.png``.

    A mask has one channel and the size of the photo (upright, as ``load_image`` returns it). Numbers
    that are not in ``names`` are background.
    """

    def has(self, photo: Path) -> bool:
        return (self.path / f"{photo.stem}.png").is_file()

    def regions(self, photo: Path, view: View) -> Iterator[Region]:
        ids = _read_mask(self.path / f"{photo.stem}.png", view)
        if not any(number in self.names for number in np.bincount(ids.ravel()).nonzero()[0]):
            raise ValueError(
                f"annotations: mask {photo.stem}.png has no pixel of any class in names; it is "
                f"empty, or its numbers have a different meaning"
            )
        y, x = (_centres(view, axis) for axis in (0, 1))
        height, width = ids.shape
        rows, columns = (np.clip(c.astype(int), 0, n - 1) for c, n in ((y, height), (x, width)))
        seen = ids[rows[:, None], columns]
        inside = _between(y, 0, height)[:, None] & _between(x, 0, width)
        for number in np.unique(seen).tolist():
            if number in self.names:
                yield self.names[number], (seen == number) & inside


class Boxes(Annotations):
    """Boxes from a folder of YOLO files or from one JSON file. Every pixel of a box counts as the object.

    A YOLO file ``7.txt`` for photo ``7.jpg`` has a line ``class cx cy w h`` for each object. All numbers
    but the class are fractions of the photo's width and height. The JSON is ``{"7.jpg": [{"class": name or
    number, "box": [x0, y0, x1, y1]}]}``, in pixels of the photo.
    """

    def __init__(self, path: str | Path, names: Mapping[int, str], classes: Mapping[int, str]):
        super().__init__(path, names, classes)
        self._table = None if self.path.is_dir() else _read_json(self.path)

    def has(self, photo: Path) -> bool:
        if self._table is None:
            return (self.path / f"{photo.stem}.txt").is_file()
        return photo.name in self._table

    def regions(self, photo: Path, view: View) -> Iterator[Region]:
        y, x = (_centres(view, axis) for axis in (0, 1))
        for name, x0, y0, x1, y1 in self._boxes(photo, view.photo_size):
            yield name, _between(y, y0, y1)[:, None] & _between(x, x0, x1)

    def _boxes(self, photo: Path, size: tuple[int, int]) -> list[Box]:
        height, width = size
        if self._table is None:
            path = self.path / f"{photo.stem}.txt"
            label = str(path)
            boxes = [self._yolo(line, label, width, height) for line in _lines(path)]
        else:
            label = f"{photo.name} in {self.path}"
            if photo.name not in self._table:
                raise ValueError(f"annotations: no entry for {label}")
            boxes = [self._entry(entry, label) for entry in self._table[photo.name]]
        if not boxes:
            raise ValueError(f"annotations: no box for {label}")
        for name, x0, y0, x1, y1 in boxes:
            # NaN fails the comparisons.
            if not (x0 < x1 and y0 < y1):
                raise ValueError(f"annotations: {label}: the {name} box has no area")
            if not (min(x0, y0) >= -_BEYOND and x1 <= width + _BEYOND and y1 <= height + _BEYOND):
                raise ValueError(
                    f"annotations: {label}: the {name} box {x0:g} {y0:g} {x1:g} {y1:g} extends beyond "
                    f"the photo of {width} x {height} pixels"
                )
        return boxes

    def _yolo(self, line: str, label: str, width: int, height: int) -> Box:
        try:
            number, *fractions = line.split()
            cx, cy, w, h = (float(v) for v in fractions)
            name = self._name(int(number), label)
        except ValueError as error:
            if str(error).startswith("annotations:"):
                raise
            raise ValueError(
                f"annotations: {label}: got the line {line!r}; give 'class cx cy w h'"
            ) from None
        x0, y0, x1, y1 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
        return name, x0 * width, y0 * height, x1 * width, y1 * height

    def _entry(self, entry: Any, label: str) -> Box:
        try:
            x0, y0, x1, y1 = (float(v) for v in entry["box"])
            given = entry["class"]
        except (TypeError, KeyError, ValueError, OverflowError):
            raise ValueError(
                f"annotations: {label}: got {entry!r}; give "
                '{"class": name or number, "box": [x0, y0, x1, y1]}'
            ) from None
        return self._name(given, label), x0, y0, x1, y1

    def _name(self, given: Any, label: str) -> str:
        if isinstance(given, int) and given in self.names:
            return self.names[given]
        if given in self.names.values():
            return str(given)
        hint = did_you_mean(given, list(self.names.values()), "names does not have it")
        raise ValueError(f"annotations: {label}: unknown class {given!r}; {hint}")


def load_annotations(path: str | Path, backbone: Classifier) -> Annotations:
    """Load annotations from a folder with ``masks/`` or ``boxes/``, or from a JSON file of boxes.

    If both folders exist, masks are used. The class numbers of masks are looked up in ``classes.yaml``
    beside the folder (``classes: {number: name}``). Without this file, the numbers of masks are taken to be
    COCO's category ids. The numbers of boxes are indices into COCO's 80 thing categories. Classes of an
    ImageNet-1k model are converted to COCO categories with
    :data:`xattn.eval.annotations.coco.IMAGENET_TO_COCO`. Classes of other models are matched by name.

    Raises:
        ValueError: if there are no such annotations, or the model has none of their categories.

    Example:
        >>> import json, tempfile, xattn
        >>> from pathlib import Path
        >>> from xattn.eval import load_annotations
        >>> file = Path(tempfile.mkdtemp(), "boxes.json")
        >>> _ = file.write_text(json.dumps({"a.jpg": [{"box": [8, 8, 24, 24], "class": 15}]}))
        >>> classes = {"num_classes": 2, "class_names": ["cat", "dog"]}
        >>> net = xattn.load_backbone("test_resnet", weights=None, **classes)
        >>> type(load_annotations(file, net)).__name__
        'Boxes'
    """
    return annotations_of_classes(path, backbone.class_names, backbone.name)


def annotations_of_classes(
    path: str | Path, class_names: Sequence[str] | Mapping[int, str], model: str
) -> Annotations:
    """Do the same as :func:`load_annotations` for a model that is given by its name and the names of some
    or all of its classes.

    Raises:
        ValueError: see :func:`load_annotations`.
    """
    path = Path(path)
    names = dict(enumerate(THINGS))
    kind: type[Annotations] = Boxes
    if (path / "masks").is_dir():
        kind, source = MaskFolder, path / "masks"
        table = path / "classes.yaml"
        names = _read_names(table) if table.is_file() else THING_IDS
    elif (path / "boxes").is_dir():
        source = path / "boxes"
    elif path.is_file() and path.suffix.lower() == ".json":
        source = path
    else:
        raise ValueError(
            f"annotations: {path} is neither a folder with masks/ or boxes/ nor a .json file"
        )
    classes = model_classes(class_names, list(names.values()))
    if not classes:
        raise ValueError(
            f"annotations: no class of {model} is a category of {path}, such as "
            f"{', '.join(list(names.values())[:5])}; give the model's classes the same names"
        )
    return kind(source, names, classes)


# ---------------------------------------------------------------- geometry


def _centres(view: View, axis: int) -> NDArray[np.float64]:
    """Return the positions on the photo of the input's pixel centres, along one axis, in pixels of the
    photo."""
    count, start, length = view.input_size[axis], view.box[axis], view.box[axis + 2]
    resized = start + (np.arange(count) + 0.5) * length / count
    return resized * view.photo_size[axis] / view.resized[axis]


def _between(at: NDArray[np.float64], low: float, high: float) -> NDArray[np.bool_]:
    return (at >= low) & (at < high)


# ---------------------------------------------------------------- files


def _read_mask(path: Path, view: View) -> NDArray[Any]:
    """Read the class numbers (H, W) in a mask, which must have the photo's size."""
    _check_file(path)
    height, width = view.photo_size
    try:
        # The file is read from memory, so that a chunk that claims to be larger than the file cannot make
        # Pillow allocate more than the size of the file.
        with Image.open(io.BytesIO(path.read_bytes()), formats=["PNG"]) as image:
            mode, size = image.mode, image.size
            if mode in _MODES and size == (
                width,
                height,
            ):  # other images may be huge: do not decode
                return np.asarray(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise ValueError(
            f"annotations: mask {path} cannot be read as PNG ({type(error).__name__}: {error})"
        ) from error
    if mode not in _MODES:
        raise ValueError(
            f"annotations: mask {path} has the mode {mode}; give class numbers in one channel"
        )
    raise ValueError(
        f"annotations: mask {path} has {size[0]} x {size[1]} pixels, but the upright photo has "
        f"{width} x {height}; give a mask of the photo's size"
    )


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"annotations: no file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"annotations: {path} is empty (0 bytes)")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"annotations: {path} is not UTF-8 text") from None


def _lines(path: Path) -> list[str]:
    _check_file(path)
    return [line for line in _text(path).splitlines() if line.strip()]


def _read_json(path: Path) -> dict[str, Any]:
    _check_file(path)
    text = _text(path)
    try:
        table = strict_json.parse(text)
    except ValueError as error:
        raise ValueError(f"annotations: {path} is not JSON ({error})") from None
    if not isinstance(table, dict) or not all(isinstance(v, list) for v in table.values()):
        raise ValueError(f"annotations: {path} is not {{file name: [box, ...]}}")
    return table


def _read_names(path: Path) -> dict[int, str]:
    """Return the ``classes`` of a YAML file, without entries for background and the like."""
    import yaml

    text = _text(path)
    try:
        table = yaml.safe_load(text)
    except MemoryError:
        raise
    except Exception as error:  # PyYAML raises many kinds of error, such as an IndexError
        raise ValueError(f"annotations: {path} is not plain YAML ({short_reason(error)})") from None
    try:
        names = {int(number): _name(name) for number, name in table["classes"].items()}
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        raise ValueError(f"annotations: {path} has no 'classes: {{number: name}}'") from None
    return {number: name for number, name in names.items() if name not in _NOT_A_CLASS}


def _name(value: Any) -> str:
    if isinstance(value, dict | list):
        raise TypeError("a name is not text")
    return str(value)
