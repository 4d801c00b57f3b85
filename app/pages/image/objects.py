"""Annotated objects of a photo: their outlines over the maps, and how much of each map lies on them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xattn.app import state
from xattn.app.pages.image.display import PhotoView
from xattn.app.pictures.rendering import to_picture
from xattn.app.triage import selection
from xattn.eval.annotations import Annotation, Annotations, annotations_of_classes
from xattn.eval.functional import saliency
from xattn.eval.metrics.localization import energy_pointing_values, pointing_values
from xattn.packs.contained_files import PackError
from xattn.photos.view import View
from xattn.runtime.files import Signature

if TYPE_CHECKING:
    from xattn.app.triage.maps_table import MapsTable
    from xattn.packs.reader import Pack

RASTER = 512  # pixels of the longer side on which outlines are found
MOST = 200  # most objects, and most outlines
Outline = dict[str, Any]


@dataclass(frozen=True)
class Objects:
    """A photo's annotation.

    ``outlines`` are ``{"points": [[x, y]], "own": bool}`` in fractions of the picture; ``own`` is True for
    objects of the class that is shown. ``names`` are their categories. ``shares`` say how much of each map
    lies on the objects of its class. ``problem`` says why there is no annotation, or is "".
    """

    outlines: tuple[Outline, ...] = ()
    names: tuple[str, ...] = ()
    shares: Mapping[str, str] | None = None
    problem: str = ""


def objects_of(pack: Pack, shown: PhotoView, entry_ids: list[str]) -> Objects | None:
    """The annotated objects of the photo that is shown; None if there are none."""
    path = state.settings().annotations
    if path is None:
        return None
    photo = Path(str((selection.table(pack).image(shown.image_id) or {})["file_name"]))
    try:
        backbone = pack.provenance(shown.focus)["backbone"] or {}
        name = str(backbone.get("name", "the network"))
        annotations = _read(path, _stamp(path), name, _classes(selection.table(pack)))
        if not annotations.has(photo):
            return None
        view = pack.view(shown.focus)
        own = annotations.classes.get(shown.target)
        outlines, names = _outlines(annotations, photo, view, own, shown.look.crop)
        numbers = _numbers(pack, entry_ids, annotations.of(photo, view))
    except (ValueError, OSError) as error:
        return Objects(problem=str(error).replace(str(path), path.name))
    return Objects(tuple(outlines), tuple(names), numbers)


@functools.lru_cache(maxsize=8)
def _read(
    path: Path, stamp: Signature | None, model: str, classes: tuple[tuple[int, str], ...]
) -> Annotations:
    """The annotations for the classes of a pack, read again if one of their files changes."""
    return annotations_of_classes(path, dict(classes), model)


def _stamp(path: Path) -> Signature | None:
    return Signature.of(path.stat()) if path.is_file() else None


def _classes(table: MapsTable) -> tuple[tuple[int, str], ...]:
    """The classes that a pack explains, by their index."""
    found = table.answer("SELECT target, min(target_name) FROM entries GROUP BY 1 ORDER BY 1")
    return tuple((int(target), str(name)) for target, name in found)


def _outlines(
    annotations: Annotations, photo: Path, view: View, own: str | None, crop: bool
) -> tuple[list[Outline], list[str]]:
    """The outlines of objects on the whole photo, longest first, and the categories found."""
    scale = min(1.0, RASTER / max(view.photo_size))
    rows, columns = (max(1, round(side * scale)) for side in view.photo_size)
    whole = View("whole", view.photo_size, (rows, columns), (0, 0, rows, columns), (rows, columns))
    found: list[tuple[int, Outline]] = []
    names: dict[str, None] = {}
    for category, pixels in islice(annotations.regions(photo, whole), MOST):
        for ring in mask_outlines(pixels):
            names[category] = None
            points = to_picture(ring, view, crop).round(4).tolist()
            found.append((len(ring), {"points": points, "own": category == own}))
    found.sort(key=lambda pair: -pair[0])
    return [outline for _, outline in found[:MOST]], list(names)


def mask_outlines(pixels: np.ndarray) -> list[np.ndarray]:
    """The outlines of a mask (H, W), each as (n, 2) points x, y in fractions of its width and height."""
    import cv2

    height, width = pixels.shape
    # Doubled and with a border, since OpenCV's outlines run through the centres of the outermost pixels.
    large = np.pad(pixels.repeat(2, 0).repeat(2, 1).astype(np.uint8), 1)
    contours, _ = cv2.findContours(large, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    smooth = (cv2.approxPolyDP(contour, 0.7, True)[:, 0] for contour in contours)
    return [(ring - 0.5) / (2 * width, 2 * height) for ring in smooth if len(ring) > 2]


def _numbers(pack: Pack, entry_ids: list[str], annotation: Annotation) -> dict[str, str]:
    """For each map of a class with objects, the share of its energy on them, and whether its maximum is
    on one."""
    said = {}
    for entry_id in entry_ids:
        try:
            explanation = pack.explanation(entry_id)
        except PackError:  # its picture says so
            continue
        mask = annotation.mask(explanation.target)
        if mask is None or explanation.is_blank:
            continue
        raw = torch.from_numpy(np.array(explanation.map))[None, None]
        grey, _ = saliency(raw, mask.shape[-2:], is_mask=explanation.is_mask)
        energy = float(energy_pointing_values(grey, mask[None]))
        hit = float(pointing_values(grey, mask[None]))
        where = {100.0: "maximum on it", 0.0: "maximum beside it"}
        said[entry_id] = (
            f"{energy:.0%} on the object, {where.get(hit, f'{hit:.0f}% of maxima on it')}"
        )
    return said
