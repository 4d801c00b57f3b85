"""Finds duplicates and near-duplicates: features and small pictures suggest pairs, whose pixels are
compared.

    candidates   for each photo, the nearest photos by the cosine of features, and by the cosine of 16 x 16
                 grey pictures, both unchanged and mirrored
    agreement    the smaller of two correlations on the pixels that both photos show: of grey values, and
                 of details (grey values minus their mean over 7 x 7 pixels)

A pair is reported if its agreement is high enough. First, the complete photos are compared, both unchanged
and mirrored. If they differ, each photo is searched for inside the other at scales from 1 to 0.5 (template
matching by normalised correlation), which finds crops. The details rule out photos that only share a
layout, such as a bright sky above dark ground.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from xattn.eval.report.photo_map.pooled_maps import normalise_rows

SIDE = 64  # pixels of a grey picture's longer side
TINY = 16  # pixels per side of the pictures that are used to find candidates
NEAREST = 5  # candidates for each photo from each way of finding them
BLOCK = 1024  # number of photos that are compared with all others at once
GREY, DETAIL = 0.9, 0.5  # smallest correlations for two complete photos
CROP_GREY, CROP_DETAIL = 0.9, 0.6  # smallest correlations for a photo and a part of another
ROUGH = 0.75  # smallest grey correlation in the coarse search for which a crop is examined further
SCALES = tuple(float(s) for s in np.geomspace(1.0, 0.5, 12))  # side of a crop / side of the photo
FLAT = 2.0  # grey levels; a photo with a smaller standard deviation is treated as empty
KINDS = {
    "exact": "identical",
    "copy": "same picture, re-encoded",
    "mirrored": "mirrored",
    "crop": "a part of the other",
    "mirrored crop": "a part of the other, mirrored",
}

Grey = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Pair:
    """Two photos that show the same picture.

    ``first`` < ``second`` are their indices, ``kind`` is a key of ``KINDS``, and ``agreement`` is in [0,
    1].
    """

    first: int
    second: int
    kind: str
    agreement: float


@dataclass(frozen=True)
class Picture:
    """A photo prepared for comparison.

    ``grey`` (h, w) contains grey values and has ``SIDE`` pixels on the longer side; ``sha256`` is the hash
    of the file.
    """

    grey: Grey
    sha256: str

    @classmethod
    def of(cls, image: Any, data: bytes = b"") -> Picture:
        """Prepare a PIL image. The hash is computed from ``data``, the bytes of its file, or from the
        pixels if ``data`` is empty."""
        width, height = image.size
        scale = SIDE / max(width, height)
        size = max(8, round(width * scale)), max(8, round(height * scale))
        digest = hashlib.sha256(data or image.tobytes()).hexdigest()
        return cls(_resized(np.asarray(image.convert("L"), np.float32), size), digest)


def find_duplicates(
    pictures: Sequence[Picture],
    features: NDArray[np.floating] | None = None,
    nearest: int = NEAREST,
    progress: Callable[[float], None] | None = None,
) -> list[Pair]:
    """Find the pairs of photos that show the same picture, ordered by agreement, highest first.

    Args:
        features: (n, d), the photos' features. Without them, crops are found only if they contain most of
            the photo.
        nearest: the number of candidates to check for each photo and each way of finding candidates.
        progress: called with the fraction of the work that is done.

    Raises:
        ValueError: the number of features differs from the number of photos, or ``nearest`` is below 1.

    Example:
        >>> from PIL import Image
        >>> rng = np.random.default_rng(0)
        >>> one, two = (Image.fromarray(rng.integers(0, 255, (32, 32), np.uint8)) for _ in range(2))
        >>> mirrored = one.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        >>> [pair] = find_duplicates([Picture.of(image) for image in (one, two, mirrored)])
        >>> pair.first, pair.second, pair.kind
        (0, 2, 'mirrored')
    """
    if nearest < 1:
        raise ValueError(f"nearest: got {nearest}; give 1 or more candidates per photo")
    if features is not None and len(features) != len(pictures):
        raise ValueError(
            f"features: got {len(features)} rows for {len(pictures)} photos; give one row per photo"
        )
    shown = np.array([float(p.grey.std()) >= FLAT for p in pictures], bool)
    candidates = _candidates(pictures, features, shown, nearest)
    found = []
    for number, (i, j) in enumerate(candidates):
        if progress and number % 100 == 0:
            progress(number / len(candidates))
        if pair := compare(pictures[i], pictures[j]):
            found.append(Pair(i, j, *pair))
    return sorted(found, key=lambda p: (-p.agreement, p.first, p.second))


def compare(one: Picture, two: Picture) -> tuple[str, float] | None:
    """How two photos are related, a key of ``KINDS``, and their agreement in [0, 1]; None if unrelated."""
    if one.sha256 == two.sha256:
        return "exact", 1.0
    best: tuple[str, float] | None = None
    for mirrored in (False, True):
        other = np.ascontiguousarray(two.grey[:, ::-1]) if mirrored else two.grey
        if _alike_in_shape(one.grey, other):
            size = one.grey.shape[1], one.grey.shape[0]
            found = _agreement(one.grey, _resized(other, size), GREY, DETAIL)
            if found is not None and (best is None or found > best[1]):
                best = ("mirrored" if mirrored else "copy"), found
    if best is not None:
        return best
    for mirrored in (False, True):
        other = np.ascontiguousarray(two.grey[:, ::-1]) if mirrored else two.grey
        for whole, part in ((one.grey, other), (other, one.grey)):
            found = _as_part(whole, part)
            if found is not None and (best is None or found > best[1]):
                best = ("mirrored crop" if mirrored else "crop"), found
    return best


def groups(pairs: Iterable[Pair]) -> list[list[int]]:
    """Groups of photos that are connected by pairs, as sorted lists of indices.

    The groups are in the order in which their first pairs occur.

    >>> groups([Pair(0, 3, "copy", 1.0), Pair(5, 6, "copy", 0.9), Pair(3, 4, "crop", 0.8)])
    [[0, 3, 4], [5, 6]]
    """
    of: dict[int, list[int]] = {}
    order: list[list[int]] = []
    for pair in pairs:
        one, two = (of.get(i, [i]) for i in (pair.first, pair.second))
        if one is two:
            continue
        for own in (one, two):
            if not any(own is other for other in order):
                order.append(own)
        one.extend(two)
        order = [own for own in order if own is not two]
        for i in one:
            of[i] = one
    return [sorted(own) for own in order]


# ---------------------------------------------------------------------- candidates


def _candidates(
    pictures: Sequence[Picture],
    features: NDArray[np.floating] | None,
    shown: NDArray[np.bool_],
    nearest: int,
) -> list[tuple[int, int]]:
    """The pairs of photos to compare, as sorted pairs of indices."""
    found: set[tuple[int, int]] = set()
    by_file: dict[str, list[int]] = {}
    for i, picture in enumerate(pictures):
        by_file.setdefault(picture.sha256, []).append(i)
    for same in by_file.values():
        found |= {(same[0], i) for i in same[1:]}
    rows = np.flatnonzero(shown)
    if len(rows) < 2:
        return sorted(found)
    tiny = np.stack([_resized(pictures[i].grey, (TINY, TINY)) for i in rows.tolist()])
    plain, mirrored = (_centred(values) for values in (tiny, tiny[:, :, ::-1]))
    ways = [(plain, plain), (plain, mirrored)]
    if features is not None:
        own = np.asarray(features, np.float32)[rows]
        toward = normalise_rows(own - own.mean(0))
        ways.append((toward, toward))
    for one, two in ways:
        for a, b in _nearest(one, two, nearest):
            i, j = int(rows[a]), int(rows[b])
            found.add((min(i, j), max(i, j)))
    return sorted(found)


def _nearest(one: Grey, two: Grey, count: int) -> Iterable[tuple[int, int]]:
    """For each row i of ``one``, yield (i, j) for the ``count`` rows j != i of ``two`` with the highest
    cosine."""
    count = min(count, len(one) - 1)
    for start in range(0, len(one), BLOCK):
        alike = one[start : start + BLOCK] @ two.T
        alike[np.arange(len(alike)), start + np.arange(len(alike))] = -2
        best = np.argpartition(-alike, count - 1, axis=1)[:, :count]
        for i, row in enumerate(best):
            yield from ((start + i, int(j)) for j in row)


def _centred(values: Grey) -> Grey:
    flat = values.reshape(len(values), -1)
    return normalise_rows(flat - flat.mean(1, keepdims=True))


# ---------------------------------------------------------------------- pixels


def _resized(grey: Grey, size: tuple[int, int]) -> Grey:
    """Resize a grey picture to ``size`` (width, height); shrinking takes means over areas."""
    smaller = size[0] < grey.shape[1] or size[1] < grey.shape[0]
    how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(grey, size, interpolation=how), np.float32)


def _alike_in_shape(one: Grey, two: Grey) -> bool:
    ratio = (one.shape[1] / one.shape[0]) / (two.shape[1] / two.shape[0])
    return abs(np.log(ratio)) < 0.05


def _agreement(one: Grey, two: Grey, grey: float, detail: float) -> float | None:
    """The agreement of two pictures of equal size; None if it is too low."""
    alike = _correlation(one, two)
    if alike < grey:
        return None
    details = [picture - cv2.blur(picture, (7, 7)) for picture in (one, two)]
    fine = _correlation(*details)
    return min(alike, fine) if fine >= detail else None


def _correlation(one: Grey, two: Grey) -> float:
    a, b = one - one.mean(), two - two.mean()
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / length if length > 1e-6 else 0.0


def _as_part(whole: Grey, part: Grey) -> float | None:
    """The agreement of ``part`` with the most similar part of ``whole``; None if it is too low."""
    small, own = _halved(whole), _halved(part)
    rough = max(_placed(small, own, scale) for scale in SCALES)
    if rough[0] < ROUGH:
        return None
    step = SCALES[0] / SCALES[1]
    fine = [rough[1] * step**n for n in (-0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75)]
    _, scale, x, y = max(_placed(whole, part, s) for s in fine if s <= 1)
    template = _scaled(whole, part, scale)
    height, width = template.shape
    window = whole[y : y + height, x : x + width]
    return _agreement(window, template, CROP_GREY, CROP_DETAIL)


def _halved(grey: Grey) -> Grey:
    return _resized(grey, (max(8, grey.shape[1] // 2), max(8, grey.shape[0] // 2)))


def _scaled(whole: Grey, part: Grey, scale: float) -> Grey:
    """Resize ``part`` so that neither side exceeds ``scale`` times the same side of ``whole``."""
    factor = scale * min(whole.shape[0] / part.shape[0], whole.shape[1] / part.shape[1])
    size = max(4, round(part.shape[1] * factor)), max(4, round(part.shape[0] * factor))
    size = min(size[0], whole.shape[1]), min(size[1], whole.shape[0])
    return _resized(part, size)


def _placed(whole: Grey, part: Grey, scale: float) -> tuple[float, float, int, int]:
    """The position of ``part`` in ``whole`` that fits best at a scale, as (correlation, scale, x, y)."""
    template = _scaled(whole, part, scale)
    if template.std() < FLAT:
        return -1.0, scale, 0, 0
    found = cv2.matchTemplate(whole, template, cv2.TM_CCOEFF_NORMED)
    found = np.where(np.isfinite(found), found, -1.0)
    y, x = np.unravel_index(int(found.argmax()), found.shape)
    return float(found[y, x]), scale, int(x), int(y)
