"""Checks that maps depend on the network's weights, the photo and the class, and follow the object.

    weights    rank correlation of a photo's map with its map on a network with random weights
    photo      rank correlation with another photo's map for the same class, and its fidelity here
    class      rank correlation of the maps of the two most probable classes
    corners    whether the map lies on the photo when that is shrunk into a corner of a larger canvas

Weights: Adebayo et al. 2018 (arXiv 1810.03292). Photo: a head computes the other map from the other
photo's taps; if that is as faithful as the photo's own map, the head has not read the photo.

Corners: does a map follow an object that is not in the middle?

    mass = sum_{u in Q} max(S(u), 0) / sum_u max(S(u), 0),    top quarter = |T & Q| / |T|
    place = mean over both axes of (c - canvas centre) / (quadrant centre - canvas centre)

S is the map of a canvas, Q the quadrant that holds the photo, T the quarter of the pixels where S
is highest, and c the centre of the map's positive mass. Averaged over the four corners, a map that
does not move with the photo has 1/4, 1/4 and 0, wherever its mass is; a map only on the photo has
1, 1 and about 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.backbone import Backbone
from xattn.correlation import spearman
from xattn.eval.evaluation.engine import evaluate
from xattn.eval.functional import check_maps, upsample
from xattn.eval.metrics.base import Column
from xattn.eval.metrics.localization import energy_pointing_values, iou_values, pointing_values
from xattn.eval.metrics.randomization import SPEARMAN, randomization_curves
from xattn.training.outcome_rows import replacement_pixels

CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))
"""(bottom, right) of the four corners."""
MEASURES = {"mass": 0.25, "top quarter": 0.25, "maximum": 0.25, "place": 0.0}
"""The measures of :func:`placement`, with their values for a map that does not follow the photo."""


def corner_canvases(images: Tensor, fill: str) -> Tensor:
    """Each image at half its size in each corner of a canvas, (B, 3, H, W) -> (B, 4, 3, H, W).

    Args:
        images: raw pixels in [0, 1].
        fill: of the canvas: the image's ``"mean"`` colour, its ``"blur"``, or ``"black"``.
    """
    height, width = (int(side) for side in images.shape[2:])
    places = quadrants(height, width)
    small = F.interpolate(images, (height // 2, width // 2), mode="bilinear", antialias=True)
    canvases = torch.stack([replacement_pixels(image, fill) for image in images])
    canvases = canvases[:, None].repeat(1, len(CORNERS), 1, 1, 1)
    for k, quadrant in enumerate(places):
        rows, columns = (slice(int(i.min()), int(i.max()) + 1) for i in quadrant.nonzero().T)
        canvases[:, k, :, rows, columns] = small.clamp(0, 1)
    return canvases


def quadrants(height: int, width: int) -> Tensor:
    """The four quadrants of a canvas, (4, H, W) bool; the middle line of odd sides is in none."""
    masks = torch.zeros(len(CORNERS), height, width, dtype=torch.bool, device="cpu")
    for mask, (bottom, right) in zip(masks, CORNERS, strict=True):
        rows = slice(height - height // 2, None) if bottom else slice(height // 2)
        columns = slice(width - width // 2, None) if right else slice(width // 2)
        mask[rows, columns] = True
    return masks


def placement(maps: Tensor, corners: Tensor) -> dict[str, Tensor]:
    """How well each map (n, 1, H, W) lies on the photo in corner ``corners`` (n,): (n,) float64 by
    measure.

    ``maximum`` is whether the highest pixel is in the quadrant, or the share that is among several
    equal ones; ``place`` is 0 for a centre of mass in the middle of the canvas and 1 for one in the
    middle of the quadrant. NaN for maps that are not finite; ``mass`` and ``place`` also for maps
    without positive values.
    """
    check_maps(maps)
    maps = maps.detach().double()
    quadrant = quadrants(*maps.shape[2:]).to(maps.device)[corners.to(maps.device)][:, None]
    positive = maps.clamp_min(0)
    overlap = iou_values(maps, quadrant)
    return {
        "mass": energy_pointing_values(positive, quadrant),
        "top quarter": 2 * overlap / (1 + overlap),  # for two sets of equal size
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


Explain = Callable[[Tensor, Tensor], Tensor]
"""Images (b, 3, H, W) in [0, 1] and classes (b,) -> raw maps (b, 1, h, w)."""
FIDELITY = {"deletion": False, "insertion": True, "ROAD": True}
"""Metrics of fidelity, and whether higher is better."""
ALL_RANDOM, ANOTHER = "all weights random", "map of another photo"
CORRELATION, TWO_CLASSES, SAME_CLASS = "correlation", "two classes", "class stays"
OWN, OTHER = "own", "other"


class Block(NamedTuple):
    """Photos that are measured together.

    ``images`` (n, 3, H, W) in [0, 1]; ``classes`` (n, 2), the two most probable; ``partners`` (n,),
    for each photo the index of one with another predicted class, -1 where there is none.
    """

    images: Tensor
    classes: Tensor
    partners: Tensor

    @classmethod
    def of(cls, backbone: Backbone, images: Tensor) -> Block:
        """Classify ``images`` and pair them."""
        if backbone.num_classes < 2:
            raise ValueError(f"backbone: {backbone.name} has one class; give one with two or more")
        with torch.no_grad():
            classes = backbone.logits(images.to(backbone.device)).cpu().topk(2).indices
        return cls(images, classes, partners(classes[:, 0]))


def partners(classes: Tensor) -> Tensor:
    """For each of ``classes`` (n,), the index of the next other one, cyclically; -1 without one."""
    found = []
    for i in range(len(classes)):
        after = ((i + step) % len(classes) for step in range(1, len(classes)))
        found.append(next((j for j in after if classes[j] != classes[i]), -1))
    return torch.tensor(found, device="cpu")


@dataclass(frozen=True)
class Method:
    """A method under test: its maps, and its maps ``on_random`` weights at each of ``stages``; at
    the last stage, all weights are random (:class:`xattn.eval.sanity.Cascade`)."""

    label: str
    explain: Explain
    on_random: Callable[[int, Tensor, Tensor], Tensor]
    stages: Sequence[str]


@dataclass(frozen=True)
class Settings:
    """Settings of the checks.

    ``fills`` of the corner canvases are those of
    :func:`~xattn.training.outcome_rows.replacement_pixels`.
    """

    fills: tuple[str, ...] = ("mean", "blur")
    metrics: tuple[str, ...] = ("insertion-deletion", "road")
    max_forward_batch: int = 16


def weights(
    backbone: Backbone, method: Method, block: Block, settings: Settings
) -> dict[str, Tensor]:
    """Rank correlation with the maps at each stage of randomisation, (n,) each.

    A constant map of a random network counts as 0. The chance level is the correlation with another
    photo's own map.
    """
    size, asked = block.images.shape[2:], block.classes[:, 0]
    own = upsample(method.explain(block.images, asked).float(), size)
    stages = [
        upsample(method.on_random(stage, block.images, asked).float(), size)
        for stage in range(len(method.stages))
    ]
    curves = randomization_curves(own, torch.stack(stages, 1), absolute=False)[SPEARMAN]
    names = [*(f"random down to {name}" for name in method.stages[:-1]), ALL_RANDOM]
    values = dict(zip(names, curves.unbind(1), strict=True))
    values[ANOTHER] = _paired(spearman(own, own[block.partners]), block)
    return values


def photo(
    backbone: Backbone, method: Method, block: Block, settings: Settings
) -> dict[str, Tensor]:
    """Rank correlation of a photo's map with another photo's map for the same class, and the
    fidelity of both maps on the first photo, (n,) each."""
    asked = block.classes[:, 0]
    maps = {
        OWN: method.explain(block.images, asked),
        OTHER: method.explain(block.images[block.partners], asked),
    }
    # No partner, no map: the engine leaves maps out that are not finite.
    maps[OTHER] = torch.where((block.partners < 0)[:, None, None, None], torch.nan, maps[OTHER])
    results = evaluate(
        backbone,
        {name: _Given(block.images, values) for name, values in maps.items()},
        block.images,
        classes=asked.tolist(),
        metrics=settings.metrics,
        max_forward_batch=settings.max_forward_batch,
        progress=False,
    )
    values = {CORRELATION: spearman(maps[OWN], maps[OTHER])}
    for metric in FIDELITY:
        for name in maps:
            measured = results.methods[name].values[Column(metric)]
            values[f"{metric}, {name}"] = torch.from_numpy(measured)
    return values


def two_classes(
    backbone: Backbone, method: Method, block: Block, settings: Settings
) -> dict[str, Tensor]:
    """Rank correlation of the maps of the two most probable classes, (n,)."""
    first, second = (method.explain(block.images, column) for column in block.classes.unbind(1))
    return {TWO_CLASSES: spearman(first, second)}


def corners(
    backbone: Backbone, method: Method, block: Block, settings: Settings
) -> dict[str, Tensor]:
    """The placement of maps when the photo is in a corner, and the share of corners that count,
    (n,) each.

    Values are means over the corners in which the photo is still given the class that it has in
    full.
    """
    values = {}
    for fill in settings.fills:
        canvases = corner_canvases(block.images, fill).flatten(0, 1)
        with torch.no_grad():
            found = backbone.logits(canvases.to(backbone.device)).argmax(1).cpu()
        same = found == block.classes[:, 0].repeat_interleave(len(CORNERS))
        at = torch.arange(len(CORNERS), device="cpu").repeat(len(block.images))
        measured = {name: torch.full((len(same),), torch.nan).double() for name in MEASURES}
        if bool(same.any()):
            maps = method.explain(canvases[same], found[same])
            maps = upsample(maps.float(), canvases.shape[2:])
            for name, column in placement(maps, at[same]).items():
                measured[name][same] = column
        for name, column in measured.items():
            values[f"{name}, {fill}"] = column.view(-1, len(CORNERS)).nanmean(1)
        kept = same.double().view(-1, len(CORNERS)).mean(1)
        values[f"{SAME_CLASS}, {fill}"] = kept
    return values


Check = Callable[[Backbone, Method, Block, Settings], dict[str, Tensor]]
CHECKS: Mapping[str, Check] = {
    "weights": weights,
    "photo": photo,
    "class": two_classes,
    "corners": corners,
}


def _paired(values: Tensor, block: Block) -> Tensor:
    return torch.where(block.partners < 0, torch.nan, values)


class _Given:
    """An explainer that returns given maps (n, 1, h, w), looked up by the image's pixels."""

    def __init__(self, images: Tensor, maps: Tensor) -> None:
        self._maps = dict(zip(map(_digest, images), maps, strict=True))

    def attribute(self, inputs: Tensor, target: Any) -> Tensor:
        return torch.stack([self._maps[_digest(image)] for image in inputs]).to(inputs.device)


def _digest(image: Tensor) -> str:
    return hashlib.sha256(image.float().cpu().contiguous().numpy().data).hexdigest()
