"""Generated lesions in the MNI152 T1 template that ships with nilearn: slices and volumes with masks.

    image, mask, radius = sample(seed=0, index=7)               # a slice of 64 x 64 pixels of 3 mm
    image, mask, radius = sample(seed=0, index=7, kind=VOLUMES)     # 48 x 56 x 48 voxels of 4 mm

A sample depends only on (seed, index, kind). The template is rotated, scaled and shifted; a lesion,
a bent ellipsoid, lies anywhere in the brain, or there is none. Bright rods, bright dots and dark
blobs are distractors, not lesions. A smooth bias field and noise are added last. All samples come
from one brain, so no figure says how a network does on others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float32]
BRIGHTEST = 1.6  # brightness that is scaled to 1


@dataclass(frozen=True)
class Kind:
    """Settings for drawing samples; lengths are in pixels."""

    size: tuple[int, ...] = (64, 64)
    """Axes of a slice: front to back, left to right; of a volume: left to right, back to front,
    bottom to top."""
    spacing: int = 3  # Millimetres per pixel.
    radius: tuple[float, float] = (3.0, 8.0)  # Least and largest radius of a lesion.
    added: tuple[float, float] = (0.75, 1.15)
    """Brightness of a lesion, as a share of the template's maximum."""
    kept: float = 0.3  # Share of the image that shows through a lesion.
    clean: float = 1 / 6  # Share of samples without a lesion.


SLICES = Kind()
FAINT = Kind(radius=(2.0, 8.0), added=(0.45, 0.75), kept=0.4)
VOLUMES = Kind(size=(48, 56, 48), spacing=4, radius=(2.0, 6.0))


class Sample(NamedTuple):
    """``image`` (1, *size) in [0, 1], ``mask`` (1, *size) of 0 and 1, the lesion's ``radius`` or 0."""

    image: Tensor
    mask: Tensor
    radius: float


class Samples(NamedTuple):
    """``images`` and ``masks`` (n, 1, *size), ``radii`` (n,)."""

    images: Tensor
    masks: Tensor
    radii: Tensor


def samples(seed: int, count: int, kind: Kind = SLICES) -> Samples:
    """Samples 0 to ``count`` - 1 of a seed."""
    every = [sample(seed, index, kind) for index in range(count)]
    images, masks, radii = zip(*every, strict=True)
    return Samples(torch.stack(images), torch.stack(masks), torch.tensor(radii))


def sample(seed: int, index: int, kind: Kind = SLICES) -> Sample:
    """Sample ``index`` of ``seed``."""
    rng = np.random.default_rng([seed, index])
    image = _anatomy(rng, kind)
    brain = image > 0.25
    places = np.argwhere(brain)
    for _ in range(rng.integers(0, 4)):
        image = _distract(image, places[rng.integers(len(places))], rng)
    mask, radius = np.zeros(kind.size, dtype=bool), 0.0
    if rng.random() >= kind.clean:
        radius = float(rng.uniform(*kind.radius))
        mask = _lesion(places[rng.integers(len(places))], radius, brain, rng)
        image = np.where(mask, kind.kept * image + rng.uniform(*kind.added), image)
    image = image * _bias(kind.size, rng) + rng.normal(0, rng.uniform(0.01, 0.04), kind.size)
    seen = np.clip(image / BRIGHTEST, 0, 1).astype(np.float32)
    return Sample(torch.from_numpy(seen)[None], torch.from_numpy(mask)[None].float(), radius)


@cache
def template(spacing: int) -> Array:
    """The template's brain (192 / spacing, 224 / spacing, 192 / spacing), cube means up to 1."""
    try:
        from nilearn.datasets import load_mni152_template
    except ImportError:
        raise ValueError(
            'lesions: the template of nilearn is not installed; run: pip install "xattn[volumes]"'
        ) from None
    whole = np.asarray(load_mni152_template(resolution=1).dataobj, dtype=np.float32)
    brain = np.pad(whole[2:194, 5:229], [(0, 0), (0, 0), (19, 0)])[:, :, :192]
    sides = [side // spacing for side in brain.shape]
    cut = brain[tuple(slice(0, side * spacing) for side in sides)]
    cells = cut.reshape(*(n for side in sides for n in (side, spacing))).mean((1, 3, 5))
    cells = cells / cells.max()
    cells.flags.writeable = False
    return cells


# ---------------------------------------------------------------------- parts of a picture


def _anatomy(rng: np.random.Generator, kind: Kind) -> Array:
    """A slice, or the volume, rotated by up to 12 degrees, scaled, shifted, perhaps mirrored."""
    from scipy.ndimage import affine_transform

    brain, dims = template(kind.spacing), len(kind.size)
    if dims == 2:
        filled = np.flatnonzero((brain > 0.25).mean((0, 1)) > 0.06)
        brain = np.rot90(brain[:, :, rng.choice(filled)])
    angle = np.radians(rng.uniform(-12, 12))
    matrix = np.eye(dims)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix /= rng.uniform(0.9, 1.1)
    if rng.random() < 0.5:
        matrix[:, 3 - dims] *= -1  # left and right
    middle, of_brain = (np.array(kind.size) - 1) / 2, (np.array(brain.shape) - 1) / 2
    offset = of_brain - matrix @ (middle + rng.uniform(-2, 2, dims))
    return affine_transform(brain, matrix, offset, kind.size, np.float32, order=1)


def _distance(size: tuple[int, ...], start: NDArray[Any], end: NDArray[Any]) -> NDArray[Any]:
    """The distance of each pixel from the segment between ``start`` and ``end``."""
    at = np.moveaxis(np.indices(size), 0, -1) - start
    along = end - start
    share = np.clip(at @ along / max(float(along @ along), 1e-9), 0, 1)
    return np.linalg.norm(at - share[..., None] * along, axis=-1)


def _distract(image: Array, place: NDArray[Any], rng: np.random.Generator) -> Array:
    """``image`` with a bright rod, a bright dot or a dark blob at ``place``."""
    kind = rng.integers(3)
    end = place
    if kind == 0:
        way = rng.normal(size=image.ndim)
        end = place + rng.uniform(4, 12) * way / np.linalg.norm(way)
    width = rng.uniform(2.5, 6) if kind == 2 else rng.uniform(0.4, 0.9)
    share = np.clip(width + 0.5 - _distance(image.shape, place, end), 0, 1)
    bright = image * rng.uniform(0.2, 0.6) if kind == 2 else 0.3 * image + rng.uniform(0.6, 1.1)
    return (image + share * (bright - image)).astype(np.float32)


def _lesion(
    place: NDArray[Any], radius: float, brain: NDArray[np.bool_], rng: np.random.Generator
) -> NDArray[np.bool_]:
    """An ellipsoid around ``place`` whose surface is bent by smooth noise, inside the brain."""
    from scipy.ndimage import gaussian_filter

    dims = brain.ndim
    axes, _ = np.linalg.qr(rng.normal(size=(dims, dims)))
    stretch = np.exp(rng.uniform(-0.25, 0.25, dims))
    stretch /= stretch.prod() ** (1 / dims)
    at = np.moveaxis(np.indices(brain.shape), 0, -1) - place
    distance = np.linalg.norm(at @ axes / stretch, axis=-1)
    bend = gaussian_filter(rng.normal(size=brain.shape), max(radius / 3, 1))
    return (distance < radius * (1 + 0.15 * bend / bend.std())) & brain


def _bias(size: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    """A smooth factor around 1: the exponential of a polynomial of degree 2."""
    axes = np.meshgrid(*(np.linspace(-1, 1, side) for side in size), indexing="ij")
    terms = [*axes, *(a * b for i, a in enumerate(axes) for b in axes[i:])]
    return np.exp(sum(rng.uniform(-0.06, 0.06) * term for term in terms))
