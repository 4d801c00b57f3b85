"""What a pack says of a photo beside its maps: how much methods disagree, and a thumbnail."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from PIL import Image

from xattn.correlation import disagreement
from xattn.packs.explanation import Explanation
from xattn.packs.format import THUMBNAIL_SIDE


def disagreement_of(group: Sequence[Explanation]) -> float:
    """Of the methods on one photo, sanity rows aside, on the classes that several explain; four decimals,
    NaN without such."""
    by_class: dict[Any, list[Explanation]] = {}
    for e in group:
        if not e.sanity and not e.is_mask:
            by_class.setdefault((e.target, e.view), []).append(e)
    values = [disagreement([e.map for e in maps]) for maps in by_class.values() if len(maps) > 1]
    values = [v for v in values if math.isfinite(v)]
    return round(sum(values) / len(values), 4) if values else math.nan


def thumbnail_jpeg(photo: Image.Image) -> bytes:
    """A photo as the JPEG file of its thumbnail; ``photo`` is shrunk in place."""
    photo.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    return jpeg(photo)


def jpeg(image: Image.Image) -> bytes:
    """The file of a picture in a pack."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88, optimize=True)
    return stream.getvalue()
