"""Apply 3-D mask networks to NIfTI volumes tile by tile, to get masks and slice-by-slice maps from the
gates.

    write_volume("mask.nii.gz", segment(net, read_volume("scan.nii.gz"), spacing=4))
    xattn explain scan.nii.gz -b runs/study-lesions/networks/volumes-agunet-0 --explainers gates

A map is psi times the gradient of the mask, see :mod:`xattn.explainers.gates`. The score of a tile is the
sum of its positive logits, so a tile without a mask adds nothing. The results of overlapping tiles are
averaged with Gaussian weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.backbone import sha256
from xattn.explainers.base import method_title
from xattn.explaining.passes import warn_of_constant_maps
from xattn.explaining.photos import Explanations
from xattn.models.agunet import AGUNet
from xattn.models.masks import load_network, network_record, predict_tiles
from xattn.packs.explanation import Explanation, ImageFacts
from xattn.packs.writer import save_pack
from xattn.photos.view import View
from xattn.photos.volumes import AxialSlices, Volume, read_volume
from xattn.runtime.version import __version__

TILE = (32, 32, 32)
CLASSES = ("no lesion", "lesion")


def segment(
    net: AGUNet, volume: Volume, spacing: float | None = None, tile: Sequence[int] = TILE
) -> Volume:
    """Compute the probabilities of the first mask on the voxels of ``volume``.

    Args:
        spacing: the voxel size in millimetres that the network was trained on; other volumes are resampled,
            and the mask is resampled back. None uses the volume as it is.
        tile: the sides of a tile; where an axis of the volume is shorter than the tile, the whole axis is
            used.
    """
    seen = volume if spacing is None else resample(volume, spacing)
    image = as_image(seen)
    logits = predict_tiles(net, image, clip_tile(tile, image))
    found = Volume(logits[0].sigmoid().numpy(), seen.affine)
    return found if seen is volume else _back(found, volume)


def volume_gates(
    net: AGUNet, image: Tensor, tile: Sequence[int] = TILE, level: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute, for an ``image`` (1, D, H, W), the logits (D, H, W) of the first mask, and the gates psi
    times the gradient of the mask with respect to psi.

    Args:
        level: the level of the gates, 0 being the finest; None sums all levels.

    Raises:
        ValueError: the network has no gates or is not 3-D, or the level does not exist.
    """
    if net.dims != 3 or not net.gates:
        raise ValueError("net: it has no gates for volumes; give one with dims=3 and gates=True")
    if level is not None and not 0 <= level < len(net.gates):
        raise ValueError(f"level: got {level}; the network has the levels 0..{len(net.gates) - 1}")

    def both(tiles: Tensor) -> Tensor:
        with torch.enable_grad():
            found = net.outputs(tiles.detach().requires_grad_(True))
            logits = found.logits[:, :1]
            chosen = list(found.gates if level is None else found.gates[level : level + 1])
            slopes = torch.autograd.grad(logits.clamp(min=0).sum(), chosen)
        maps = [
            F.interpolate((g * s).detach(), tiles.shape[2:], mode="trilinear", align_corners=False)
            for g, s in zip(chosen, slopes, strict=True)
        ]
        return torch.cat([logits.detach(), torch.stack(maps).sum(0)], 1)

    logits, gates = predict_tiles(both, image, clip_tile(tile, image))
    return logits, gates


def explain_volume(
    folder: str | Path, path: str | Path, output: str | Path | None = None, level: int | None = None
) -> Explanations:
    """Explain a volume by the gates of a 3-D network, with a map for each axial slice that is not empty.

    Args:
        folder: the network's folder, see :func:`xattn.models.masks.save_network`.
        path: the volume's path; if its voxel size is not the network's, it is resampled.
        output: the folder to which a pack is written.

    Returns:
        The slices from bottom to top; a slice's probability is that of its most probable voxel.
    """
    net, about = load_network(folder), network_record(folder)["about"]
    volume, spacing = read_volume(path), about.get("spacing")
    volume = volume if spacing is None else resample(volume, spacing)
    slices = AxialSlices(path, volume)
    logits, maps = volume_gates(net, as_image(volume), about.get("tile", TILE), level)
    names = tuple(about.get("classes", CLASSES))
    protocol: dict[str, Any] = {
        "xattn": __version__,
        "backbone": {"name": "AGUNet", "sha256": sha256(net), "tile": about.get("tile", TILE)},
        "explainer": "gates",
        "level": level,
        "view": "whole",
        "map": "as explained; min-max scaled before upsampling for display",
        "probability": "sigmoid",
        "task": "binary",
    }
    result = Explanations()
    for photo, number in zip(slices, slices.numbers, strict=True):
        height, width = size = photo.load().size[::-1]
        p = float(logits[:, :, number].amax().sigmoid())
        top = sorted([(0, names[0], 1 - p), (1, names[1], p)], key=lambda item: -item[2])
        result.append(
            Explanation(
                map=np.rot90(maps[:, :, number].numpy()),
                target=1,
                target_name=names[1],
                probability=p,
                method="gates",
                method_title=method_title("gates"),
                view=View("whole", size, size, (0, 0, height, width), size),
                image_id=photo.name,
                protocol=protocol,
                file_name=photo.name,
                source=photo,
                facts=ImageFacts(tuple(top)),
            )
        )
    warn_of_constant_maps([(e, e.image_id) for e in result])
    if output is not None:
        save_pack(output, result, True, [])
    return result


# ---------------------------------------------------------------------- voxels


def as_image(volume: Volume) -> Tensor:
    """Convert a volume to an image (1, D, H, W) in [0, 1]: fractions of its maximum, unless all values are
    already in [0, 1]."""
    values = torch.from_numpy(np.ascontiguousarray(volume.values))[None]
    low, high = min(float(values.min()), 0.0), float(values.max())
    return values if low == 0 and high <= 1 else (values - low) / max(high - low, 1e-30)


def clip_tile(tile: Sequence[int], image: Tensor) -> tuple[int, ...]:
    """Limit ``tile`` to the size of ``image`` (1, *size)."""
    return tuple(min(a, b) for a, b in zip(tile, image.shape[1:], strict=True))


def resample(volume: Volume, spacing: float) -> Volume:
    """Resample ``volume`` to cubic voxels of ``spacing`` millimetres; it is unchanged if it already has
    them."""
    if not 0 < spacing < float("inf"):
        raise ValueError(f"spacing: got {spacing}; give millimetres above 0")
    if np.allclose(volume.spacing, spacing, rtol=1e-3):
        return volume
    sides = [n * mm / spacing for n, mm in zip(volume.values.shape, volume.spacing, strict=True)]
    if min(sides) < 2:
        raise ValueError(
            f"spacing: got {spacing} mm for a volume of {volume.values.shape} voxels of "
            f"{volume.spacing} mm, which leaves fewer than 2 voxels per side; give a larger "
            "volume"
        )
    nibabel, image = _libraries()
    source = nibabel.Nifti1Image(volume.values, volume.affine)
    made = image.resample_img(source, np.eye(3) * spacing, interpolation="linear")
    values = np.asarray(made.dataobj, dtype=np.float32)
    return Volume(values, np.asarray(made.affine))


def _back(found: Volume, volume: Volume) -> Volume:
    """``found`` on the voxels of ``volume``."""
    nibabel, image = _libraries()
    made = image.resample_img(
        nibabel.Nifti1Image(found.values, found.affine),
        volume.affine,
        volume.values.shape,
        interpolation="linear",
    )
    return Volume(np.asarray(made.dataobj, dtype=np.float32), volume.affine)


def _libraries() -> tuple[Any, Any]:
    try:
        import nibabel
        from nilearn import image
    except ImportError:
        raise ValueError(
            'spacing: resampling needs nilearn, which is not installed; run: pip install "xattn[volumes]"'
        ) from None
    return nibabel, image
