"""What a pack says of a photo beside its maps: how much methods disagree, what the
classifier read of it, and a thumbnail."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
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


def features_of(
    group: Sequence[Explanation], length: int | None = None
) -> NDArray[np.float16] | None:
    """What the classifier read of a photo, (d,), None where that was not kept.

    Raises:
        ValueError: they are not finite, or not ``length`` numbers.
    """
    found = next((e.facts.features for e in group if e.facts.features is not None), None)
    if found is None:
        return None
    row, name = np.asarray(found, np.float16), group[0].image_id
    wanted = row.shape if length is None else (length,)
    if row.ndim != 1 or row.shape != wanted or not row.size:
        raise ValueError(f"features: those of {name} have shape {row.shape}; give {wanted}")
    if not np.isfinite(row).all():
        raise ValueError(f"features: those of {name} are not finite; check the weights")
    return row


def thumbnail_jpeg(photo: Image.Image) -> bytes:
    """A photo as the JPEG file of its thumbnail; ``photo`` is shrunk in place."""
    photo.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    return jpeg(photo)


def jpeg(image: Image.Image) -> bytes:
    """The file of a picture in a pack."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88, optimize=True)
    return stream.getvalue()
