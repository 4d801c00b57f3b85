"""Shows the boxes of a photo from a pack of detections, over the photo and as outlines over the
maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xattn.app import components
from xattn.app.components import sent_value
from xattn.app.pages.image.display import SIDE, aspect_of_photo
from xattn.app.pictures.rendering import photo_url, to_picture
from xattn.app.triage import selection

if TYPE_CHECKING:
    from xattn.packs.reader import Pack
    from xattn.photos.view import View

KINDS = ("found", "false", "missed", "candidate")


class PhotoBox(NamedTuple):
    """A detection: ``at`` is left, top, right and bottom in fractions of the photo, ``target`` its number
    in the pack, and ``text`` its class and score."""

    target: int
    at: tuple[float, ...]
    text: str
    kind: str


def boxes_of(pack: Pack, image_id: str) -> list[PhotoBox]:
    """The detections of a photo that have a map; [] if this is not a pack of detections."""
    first = selection.table(pack).entries_of(image_id).drop_duplicates("target")
    found = []
    for entry_id, target, name in zip(
        first.index, first["target"], first["target_name"], strict=True
    ):
        record = pack.provenance(entry_id)["protocol"].get("detection")
        at = _shares(record, pack.view(entry_id).photo_size)
        if at is not None:
            kind = record["kind"] if record.get("kind") in KINDS else "found"
            found.append(PhotoBox(int(target), at, str(name), kind))
    return found


def _shares(record: Any, size: tuple[int, int]) -> tuple[float, ...] | None:
    """The box in a detection's record; None if it is not such a record."""
    box = record.get("box") if isinstance(record, Mapping) else None
    if not isinstance(box, list) or len(box) != 4:
        return None
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in box):
        return None
    return tuple(min(max(v / size[(i + 1) % 2], 0.0), 1.0) for i, v in enumerate(box))


def photo_boxes(
    pack: Pack,
    image_id: str,
    found: Sequence[PhotoBox],
    key: str,
    target: int | None,
    on_open: Callable[[int], None],
    **drawing: Any,
) -> None:
    """Show the photo with its boxes; ``on_open`` is called with the number of the box that was clicked."""

    def opened() -> None:
        number = str(sent_value(key, "open"))
        if number in {str(box.target) for box in found}:
            on_open(int(number))

    components.boxes(
        photo_url(pack, image_id, SIDE),
        [
            {
                "id": str(box.target),
                "at": [round(v, 4) for v in box.at],
                "text": box.text,
                "kind": box.kind,
                "selected": box.target == target,
            }
            for box in found
        ],
        key,
        aspect=aspect_of_photo(pack, image_id),
        label="Detections of the photo",
        alt=f"Photo {selection.table(pack).title(image_id)}",
        on_open=opened,
        **drawing,
    )


def outlines(
    found: Sequence[PhotoBox], target: int, view: View, crop: bool
) -> list[dict[str, Any]]:
    """The boxes as outlines for a linked grid, see :func:`xattn.app.components.grid`; the box with the
    number ``target`` is thick."""
    drawn = []
    for box in found:
        x0, y0, x1, y1 = box.at
        corners = to_picture(np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]), view, crop)
        drawn.append({"points": corners.round(4).tolist(), "own": box.target == target})
    return drawn
