"""NIfTI volumes: reading and writing them, and their axial slices as numbered photos.

    xattn explain scan.nii.gz -b FOLDER --explainers gates      # every slice, bottom to top

A slice is drawn as seen from above, with the front at the top and the left side at the left; pixels are
square, and grey values are fractions of the volume's maximum. Needs nibabel, the extra ``xattn[volumes]``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xattn.photos.base import Photos
from xattn.photos.image_names import is_volume
from xattn.photos.images import MAX_PIXELS, load_image


class Volume(NamedTuple):
    """A volume's ``values``, with axes that run from left to right, back to front and bottom to top, and
    the ``affine`` (4, 4) that maps indices to positions in millimetres."""

    values: NDArray[np.float32]
    affine: NDArray[np.float64]

    @property
    def spacing(self) -> tuple[float, ...]:
        """Size of a voxel in millimetres, per axis."""
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0).tolist())


def read_volume(path: str | Path) -> Volume:
    """A NIfTI file's volume, with its axes oriented to right, front and top.

    Raises:
        ValueError: the volume is not 3-D, has no orientation, is empty or damaged, or contains NaN, or
            nibabel is not installed.
        OSError: the file does not exist.
    """
    nibabel = _nibabel()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"volume: no file {path}; give a .nii or .nii.gz file")
    try:
        found = nibabel.load(path)
        shape, header = found.shape, found.header
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(
                f"volume: {path} has shape {shape}; give one with three axes, such as a single one of "
                f"nibabel.four_to_three"
            )
        if not int(header.get("sform_code", 0)) and not int(header.get("qform_code", 0)):
            raise ValueError(
                f"volume: {path} has no affine, so left and top are unknown; set one with nibabel's "
                f"set_sform"
            )
        found = nibabel.as_closest_canonical(found)
        values = np.asarray(found.dataobj, dtype=np.float32)
    except (nibabel.filebasedimages.ImageFileError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"volume: {path} is damaged ({reason}); replace the file") from None
    if not np.isfinite(values).all():
        raise ValueError(f"volume: {path} holds NaN or infinite values; replace them first")
    return Volume(values, np.asarray(found.affine, dtype=np.float64))


def write_volume(path: str | Path, volume: Volume) -> Path:
    """Write a NIfTI file, ``.nii`` or ``.nii.gz``."""
    if not is_volume(path):
        raise ValueError(f"path: got {path}; give a name that ends in .nii or .nii.gz")
    nibabel = _nibabel()
    image = nibabel.Nifti1Image(np.asarray(volume.values, dtype=np.float32), volume.affine)
    nibabel.save(image, path)
    return Path(path)


def _nibabel() -> Any:
    try:
        import nibabel
    except ImportError:
        raise ValueError(
            'volume: NIfTI files need nibabel, which is not installed; run: pip install "xattn[volumes]"'
        ) from None
    return nibabel


class AxialSlices(Photos):
    """The axial slices of ``volume``, by default that of the file ``path``, from bottom to top; constant
    slices are left out."""

    def __init__(self, path: str | Path, volume: Volume | None = None) -> None:
        self.path = Path(path)
        self.volume = read_volume(path) if volume is None else volume
        values = self.volume.values
        self.numbers = np.flatnonzero(np.ptp(values, axis=(0, 1)) > 0).tolist()
        if not self.numbers:
            raise ValueError(f"volume: {path} is constant; give a volume that shows something")
        low = min(float(values.min()), 0.0)
        self._range = low, max(float(values.max()) - low, 1e-30)
        if low == 0 and values.max() <= 1:
            self._range = 0.0, 1.0  # already fractions

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        stem = self.path.name.removesuffix(".gz").removesuffix(".nii")
        return f"{stem}-z{self.numbers[index]:03d}"

    def load(self, index: int, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
        low, span = self._range
        plane = np.rot90(self.volume.values[:, :, self.numbers[index]])
        image = Image.fromarray(np.rint((plane - low) / span * 255).astype(np.uint8))
        x, y = self.volume.spacing[:2]
        least = min(x, y)
        size = max(round(image.width * x / least), 1), max(round(image.height * y / least), 1)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        return load_image(image, max_pixels)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(np.ascontiguousarray(self.volume.values).tobytes())
        return {"count": len(self), "sha256": digest.hexdigest()}
