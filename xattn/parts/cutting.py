"""The image with its evidence cropped away: MemeTector's Visual Part Utilization (arXiv 2205.13268).

    p in linspace(.1, .9, 17),   r in linspace(sqrt(p), 1 / sqrt(p), 10)
    width = sqrt(p) r W,   height = sqrt(p) / r H

at 10 x 10 positions, evenly spaced so that the rectangle stays inside the image. Among the rectangles
without evidence, one with the largest p is chosen, at random if there are several. The method was published
for the text of image macros, but any pixels can be evidence. The crop is a hard negative: it shares
everything with its image except the evidence.

:func:`cut_parts` does this for a whole data set: crops, and a JSON file about them.
``crops/000012-cat.png`` belongs to photo 12. Crops are stored without loss: further compression would
distinguish them from their photos. A run with the same arguments continues where the last one stopped.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from xattn.parts.evidence import Source, evidence_mask, open_evidence
from xattn.photos.base import Data, Photos, StoredPhoto
from xattn.photos.images import MAX_PIXELS, read_ahead
from xattn.photos.sources import open_photos
from xattn.runtime import strict_json
from xattn.runtime.files import atomic_file, check_folder, write_json
from xattn.runtime.stores import StoreError

FRACTIONS = tuple(np.linspace(0.1, 0.9, 17).tolist())
ASPECTS = 10
CENTRES = 10
_ROUNDING = 1e-6  # pixels; keeps edges on a pixel's border there
RECORD = "parts.json"
SAVE_EVERY = 100  # photos; a killed run loses at most this many records and repeats their crops
OUTCOMES = {
    "cut": "crops written",
    "covered": "no crop: every rectangle of a tenth of the photo holds evidence",
    "bare": "no crop: the photo has no evidence",
    "skipped": "skipped with a reason",
}


@dataclass(frozen=True)
class Crop:
    """``box`` (x0, y0, x1, y1) in whole pixels, ends excluded, and the ``fraction`` p for which it was cut.

    Example:
        >>> from xattn.parts import Crop
        >>> from PIL import Image
        >>> Crop((10, 0, 50, 30), fraction=0.5).cut(Image.new("RGB", (64, 64))).size
        (40, 30)
    """

    box: tuple[int, int, int, int]
    fraction: float

    def cut(self, image: Image.Image) -> Image.Image:
        return image.crop(self.box)


@lru_cache(maxsize=4)
def rectangles(
    fractions: tuple[float, ...] = FRACTIONS, aspects: int = ASPECTS, centres: int = CENTRES
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """All rectangles of the search: p (n,), and x0, y0, x1, y1 as fractions of width and height, (n, 4)."""
    if not fractions or not all(0 < p <= 1 for p in fractions) or aspects < 1 or centres < 1:
        raise ValueError(
            f"fractions, aspects, centres: got {fractions}, {aspects}, {centres}; give fractions in "
            f"(0, 1] and counts of at least 1"
        )
    place = np.linspace(0, 1, centres)
    grid = np.meshgrid(fractions, np.linspace(0, 1, aspects), place, place, indexing="ij")
    p, step, y, x = (axis.ravel() for axis in grid)
    root = np.sqrt(p)
    r = root + step * (1 / root - root)
    width, height = root * r, root / r
    x0, y0 = x * (1 - width), y * (1 - height)
    return p, np.stack([x0, y0, x0 + width, y0 + height], 1)


def largest_crop(
    evidence: NDArray[np.bool_], seed: int = 0, index: int = 0, **search: Any
) -> Crop | None:
    """The largest rectangle of the search that contains no pixel of ``evidence`` (H, W).

    Rectangles are shrunk to whole pixels. Ties are broken at random, depending only on (seed, index);
    ``index`` is the image's number.

    Args:
        search: ``fractions``, ``aspects`` and ``centres`` of :func:`rectangles`.

    Returns:
        None if every rectangle contains evidence.

    Raises:
        ValueError: ``evidence`` is not a bool map (H, W), is empty, or ``seed`` or ``index`` is negative.

    Example:
        >>> import numpy as np
        >>> from xattn.parts import largest_crop
        >>> evidence = np.zeros((64, 64), bool)
        >>> evidence[:16] = True  # text along the top
        >>> largest_crop(evidence)
        Crop(box=(0, 16, 64, 64), fraction=0.75)
    """
    if evidence.ndim != 2 or evidence.dtype != np.bool_ or 0 in evidence.shape:
        raise ValueError(f"evidence: got {evidence.dtype} of {evidence.shape}; give bool (H, W)")
    if seed < 0 or index < 0:
        raise ValueError(f"seed, index: got {seed}, {index}; give numbers of at least 0")
    import cv2

    p, unit = rectangles(**search)
    height, width = evidence.shape
    x0, y0 = np.ceil(unit[:, :2] * (width, height) - _ROUNDING).astype(int).T
    x1, y1 = np.floor(unit[:, 2:] * (width, height) + _ROUNDING).astype(int).T
    table = cv2.integral(evidence.astype(np.uint8))
    covered = table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0]
    free = (covered == 0) & (x0 < x1) & (y0 < y1)
    if not free.any():
        return None
    ties = np.flatnonzero(free & (p == p[free].max()))
    i = ties[np.random.default_rng([seed, index]).integers(len(ties))]
    return Crop((int(x0[i]), int(y0[i]), int(x1[i]), int(y1[i])), float(p[i]))


# ---------------------------------------------------------------------- a data set


@dataclass(frozen=True)
class Parts:
    """``records``: one per photo, in order, as in ``parts.json``; ``output``: the folder.

    Example:
        >>> from pathlib import Path
        >>> from xattn.parts import Parts
        >>> Parts(Path("parts"), []).crops
        []
    """

    output: Path
    records: list[dict[str, Any]]

    @property
    def counts(self) -> dict[str, int]:
        """The number of photos with each outcome, see :data:`OUTCOMES`."""
        found = Counter(record["outcome"] for record in self.records)
        return {name: found[name] for name in OUTCOMES}

    @property
    def crops(self) -> list[Path]:
        """The files of the crops, in the order of the photos."""
        return [self.output / record["file"] for record in self.records if "file" in record]


def cut_parts(
    data: Data,
    evidence: str | Path | Source,
    output: str | Path,
    *,
    numbers: Sequence[int] = (),
    seed: int = 0,
    max_pixels: int | None = MAX_PIXELS,
    progress: bool = True,
) -> Parts:
    """For every photo of ``data``, write the largest crop that contains no evidence.

    Args:
        data: see :mod:`xattn.photos.sources`.
        evidence: see :mod:`xattn.parts.evidence`, or a function with the same signature.
        numbers: for a folder of masks, the values that are evidence.
        seed: ties between crops are broken at random by (seed, number of the photo).

    Returns:
        The outcome of each photo. A photo that consists entirely of evidence, contains none, cannot be
        read, or has missing or invalid boxes is only counted, and the run continues.

    Raises:
        ValueError: ``output`` contains crops of a run with different arguments, every photo was skipped, or
            two photos have the same box entry or mask.
        OSError: a missing file of evidence, or an ``output`` that cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from xattn.parts import cut_parts
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (64, 64)).save(folder / "a.jpg")
        >>> def text(name, photo):
        ...     return [[0, 0, 64, 16]]  # text along the top
        >>> parts = cut_parts(folder, text, folder / "parts", progress=False)
        >>> parts.counts
        {'cut': 1, 'covered': 0, 'bare': 0, 'skipped': 0}
    """
    output = Path(output)
    source = open_evidence(evidence, numbers) if isinstance(evidence, str | Path) else evidence
    photos = open_photos(data)
    if (check := getattr(source, "check", None)) is not None:
        check(photos.name(i) for i in range(len(photos)))
    check_folder(output / "crops")
    settings = _settings(photos, source, seed, max_pixels)
    done = _finished(output, settings)
    root = Path(data) if isinstance(data, str | Path) and Path(data).is_dir() else None
    left = [photo for photo in photos if photo.index not in done]
    if not done:
        _save(output, settings, done)  # before the first crop, so that every crop has a record file
    unsaved = 0
    try:
        ahead = read_ahead(lambda photo: photo.load(max_pixels), left, 4)
        for photo, image in tqdm(ahead, total=len(left), disable=not progress, unit="photo"):
            done[photo.index] = _cut(photo, image, source, output, root, seed)
            unsaved += 1
            if unsaved == SAVE_EVERY:
                _save(output, settings, done)
                unsaved = 0
    finally:
        if unsaved:
            _save(output, settings, done)
    records = [done[i] for i in range(len(photos))]
    if all(record["outcome"] == "skipped" for record in records):
        raise ValueError(
            f"data: all {len(records)} photos were skipped, the first because of: "
            f"{records[0]['reason']}"
        )
    return Parts(output, records)


def _settings(photos: Photos, source: Source, seed: int, max_pixels: int | None) -> dict[str, Any]:
    """The settings that must be unchanged for a run to continue an earlier one."""
    return {
        "data": photos.describe(),
        "evidence": getattr(source, "description", getattr(source, "__name__", "a function")),
        "seed": seed,
        "max_pixels": max_pixels,
    }


def _cut(
    photo: StoredPhoto, image: Any, source: Source, output: Path, root: Path | None, seed: int
) -> dict[str, Any]:
    name = photo.name
    if root is not None and Path(name).is_relative_to(root):
        name = Path(name).relative_to(root).as_posix()
    record: dict[str, Any] = {"index": photo.index, "photo": name}
    try:
        pixels = image.result()
        found = source(photo.name, pixels)
        mask = evidence_mask(found, pixels.size)
    except StoreError:
        raise
    except (ValueError, OSError) as error:
        return {**record, "outcome": "skipped", "reason": str(error)}
    record |= {"size": list(pixels.size), "evidence": round(float(mask.mean()), 6)}
    if not isinstance(found, np.ndarray):
        record["boxes"] = [np.asarray(region).tolist() for region in found]
    if not mask.any():
        return {**record, "outcome": "bare"}
    crop = largest_crop(mask, seed, photo.index)
    if crop is None:
        return {**record, "outcome": "covered"}
    x0, y0, x1, y1 = crop.box
    file = f"crops/{photo.index:06d}-{PurePath(name).stem}.png"
    with atomic_file(output / file) as temporary:
        crop.cut(pixels).save(temporary, "PNG")
    return {
        **record,
        "outcome": "cut",
        "crop": list(crop.box),
        "fraction": round(crop.fraction, 6),
        "area": round((x1 - x0) * (y1 - y0) / math.prod(pixels.size), 6),
        "file": file,
    }


def _finished(output: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Records of an earlier run with the same settings, by photo number."""
    path = output / RECORD
    if not path.is_file():
        return {}
    earlier = strict_json.read(path, "output", "choose another folder")
    try:
        records = {_checked(record)["index"]: record for record in earlier["parts"]}
        same = earlier["settings"] == settings
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"output: {path} is damaged ({error}); choose another folder") from None
    # A killed run may have cut more than its record says.
    if not same and not any((output / "crops").glob("*.png")):
        return {}  # nothing was cut yet: once boxes are corrected, the same folder can be used
    if not same:
        raise ValueError(
            f"output: {output} holds crops of other photos, evidence or options; choose another folder"
        )
    return {
        i: record
        for i, record in records.items()
        if record["outcome"] != "skipped"
        and ("file" not in record or os.path.isfile(output / record["file"]))
    }


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """A record, checked to be one that :func:`_cut` may have made."""
    crop = re.fullmatch(r"crops/[^/\0]{1,255}\.png", record.get("file", "crops/0.png"))
    texts = isinstance(record["photo"], str) and record["outcome"] in OUTCOMES
    if crop is None or type(record["index"]) is not int or not texts:
        raise ValueError("its record of a photo is not one that xattn parts writes")
    return record


def _save(output: Path, settings: dict[str, Any], done: dict[int, dict[str, Any]]) -> None:
    parts = Parts(output, [done[i] for i in sorted(done)])
    value = {"format": 1, "settings": settings, "counts": parts.counts, "parts": parts.records}
    write_json(output / RECORD, value)
