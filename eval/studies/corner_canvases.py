"""Photos shrunk into the corners of a canvas: does a map follow an object that is not in the middle?

    mass = sum_{u in Q} max(S(u), 0) / sum_u max(S(u), 0),    top quarter = |T & Q| / |T|
    place = mean over both axes of (c - canvas centre) / (quadrant centre - canvas centre)

S is the map of a canvas, Q the quadrant that holds the photo, T the quarter of the pixels where S is
highest, and c the centre of the map's positive mass. A map that does not move with the photo has on average
1/4, 1/4 and 0 over the four corners, wherever its mass lies; one on the photo alone has 1, 1 and about 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.eval.functional import check_maps
from xattn.eval.metrics.localization import energy_pointing_values, iou_values, pointing_values
from xattn.training.outcome_masks import background

CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))
"""(bottom, right) of the four corners."""
MEASURES = {"mass": 0.25, "top quarter": 0.25, "maximum": 0.25, "place": 0.0}
"""What :func:`placement` measures, with the value of a map that does not follow the photo."""


def corner_canvases(images: Tensor, fill: str) -> Tensor:
    """Each image at half its size in each corner of a canvas, (B, 3, H, W) -> (B, 4, 3, H, W).

    Args:
        images: raw pixels in [0, 1].
        fill: the canvas: the image's ``"mean"`` colour, its ``"blur"``, or ``"black"``.
    """
    height, width = (int(side) for side in images.shape[2:])
    places = quadrants(height, width)
    small = F.interpolate(images, (height // 2, width // 2), mode="bilinear", antialias=True)
    canvases = torch.stack([background(image, fill) for image in images])
    canvases = canvases[:, None].repeat(1, len(CORNERS), 1, 1, 1)
    for k, quadrant in enumerate(places):
        rows, columns = (slice(int(i.min()), int(i.max()) + 1) for i in quadrant.nonzero().T)
        canvases[:, k, :, rows, columns] = small.clamp(0, 1)
    return canvases


def quadrants(height: int, width: int) -> Tensor:
    """Where the photo lies in each corner, (4, H, W) bool; the middle line of odd sides is in none.

    Raises:
        ValueError: a side below 2.
    """
    if min(height, width) < 2:
        raise ValueError(
            f"images: got {height} x {width} pixels; give at least 2 a side, to be halved"
        )
    masks = torch.zeros(len(CORNERS), height, width, dtype=torch.bool, device="cpu")
    for mask, (bottom, right) in zip(masks, CORNERS, strict=True):
        rows = slice(height - height // 2, None) if bottom else slice(height // 2)
        columns = slice(width - width // 2, None) if right else slice(width // 2)
        mask[rows, columns] = True
    return masks


def placement(maps: Tensor, corners: Tensor) -> dict[str, Tensor]:
    """How far each map (n, 1, H, W) lies on the photo in corner ``corners`` (n,), (n,) float64 by measure.

    ``maximum`` is whether the highest pixel lies in the quadrant, and of equal ones their share; ``place``
    is 0 for a centre of mass in the middle of the canvas and 1 for one in that of the quadrant. NaN where
    a map is not finite, and of ``mass`` and ``place`` where it is positive nowhere.
    """
    check_maps(maps)
    maps = maps.detach().double()
    quadrant = quadrants(*maps.shape[2:]).to(maps.device)[corners.to(maps.device)][:, None]
    positive = maps.clamp_min(0)
    overlap = iou_values(maps, quadrant)
    return {
        "mass": energy_pointing_values(positive, quadrant),
        "top quarter": 2 * overlap / (1 + overlap),  # of two sets of one size
        "maximum": pointing_values(maps, quadrant, tolerance=0) / 100,
        "place": _place(positive[:, 0], corners.to(maps.device)),
    }


def _place(mass: Tensor, corners: Tensor) -> Tensor:
    signs = 2 * torch.tensor(CORNERS, dtype=mass.dtype, device=mass.device)[corners] - 1
    total = mass.sum((1, 2))
    places = []
    for axis, side in enumerate(mass.shape[1:]):
        at = (torch.arange(side, dtype=mass.dtype, device=mass.device) + 0.5) / side - 0.5
        middle = (mass.sum(2 - axis) * at).sum(1) / total
        places.append(signs[:, axis] * middle / ((1 - side // 2 / side) / 2))
    place = torch.stack(places).mean(0)
    return torch.where(total > 0, place, torch.nan)
