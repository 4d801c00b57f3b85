"""Pictures of the viewer: how a map is drawn over its photo, its URL, and its JPEG bytes.

A picture depends only on a pack's version, an entry and a :class:`Look`; :mod:`xattn.pictures.overlay` does
all drawing. Encoded pictures are cached in memory up to a number of bytes.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image

from xattn.packs.contained_files import PackError
from xattn.packs.explanation import blank_note, contrast, map_name
from xattn.photos.view import View
from xattn.pictures.overlay import DIVERGING, SEQUENTIAL, STYLES, overlay
from xattn.pictures.scales import Legend, Scale, legend_of, make_scale, own_scale
from xattn.runtime.lru_cache import LRUCache

if TYPE_CHECKING:
    from xattn.packs.explanation import Explanation
    from xattn.packs.reader import Pack


MOST_CELLS = 40  # most cells per side that are sent; larger maps are averaged


def map_cells(explanation: Explanation, crop: bool) -> dict[str, Any]:
    """A map for a cell of a linked grid, over the whole photo, or with ``crop`` over what the model saw.

    ``cells`` are the values, row by row, in base64; each has 16 bits, in which 0 stands for ``low`` and
    65,535 for ``high``. ``of`` is the original shape of the map, ``most`` its largest value, and ``box``
    its position on the picture, see :func:`map_box`.
    """
    values = np.array(explanation.map, np.float64)
    rows, columns = (min(side, MOST_CELLS) for side in values.shape)
    if (rows, columns) != values.shape:
        values = _averaged(_averaged(values, rows).T, columns).T
    low, high = float(values.min()), float(values.max())
    steps = np.rint((values - low) / ((high - low) or 1.0) * 65535).astype("<u2")
    return {
        "rows": rows,
        "columns": columns,
        "cells": base64.b64encode(steps.tobytes()).decode("ascii"),
        "low": low,
        "high": high,
        "most": float(explanation.map.max()),
        "of": list(explanation.map.shape),
        "box": map_box(explanation.view, crop),
    }


def _averaged(values: np.ndarray, rows: int) -> np.ndarray:
    """(h, w) -> (rows, w): the means of neighbouring rows."""
    starts = np.arange(rows) * len(values) // rows
    counts = np.diff(starts, append=len(values))
    return np.add.reduceat(values, starts, axis=0) / counts[:, None]


def map_box(view: View, crop: bool) -> list[float]:
    """Top, left, bottom and right of the model's input, as fractions of the photo or of the part that the
    model saw; padding lies outside 0 to 1."""
    (rows, columns), (top, left, height, width) = view.resized, view.box
    corners = np.array(
        [[left / columns, top / rows], [(left + width) / columns, (top + height) / rows]]
    )
    (near, upper), (far, lower) = to_picture(corners, view, crop).tolist()
    return [upper, near, lower, far]


def to_picture(points: np.ndarray, view: View, crop: bool) -> np.ndarray:
    """Convert points (n, 2), with x and y as fractions of the photo, to fractions of the part that is
    shown."""
    if not crop:
        return points
    (height, width), (top, left, bottom, right) = view.photo_size, view.photo_box
    start, size = (left / width, top / height), ((right - left) / width, (bottom - top) / height)
    return (points - start) / size


PICTURE, OVERLAY = "/xattn/picture", "/xattn/overlay"
SIDES = (16, 2048)  # smallest and largest longer side, in pixels
SCALES = ("auto", "map", "clip", "shared")
COLOURS = ("auto", SEQUENTIAL, DIVERGING, "viridis", "cividis", "gray")
CACHE_BYTES = 16 << 20
QUALITY = 85
LARGEST = 1e30  # largest limit, so that differences are finite in any float


@dataclass(frozen=True)
class Look:
    """How a map is drawn.

    ``style`` is that of :func:`xattn.pictures.overlay.overlay`; an outline depends only on the map, not on
    the scale. ``crop`` shows what the model saw instead of the whole photo. ``scale="map"`` scales each map
    from its minimum to its maximum; ``"clip"`` ends its scale at percentiles, and ``"auto"`` does so for
    spiky maps, see :func:`xattn.pictures.scales.own_scale`; ``"shared"`` scales raw scores between
    ``limits``, by default the smallest and largest value of all maps of the photo in the pack.
    ``cmap="auto"`` is inferno, or the diverging colours for maps with negative values. ``minus`` names an
    entry whose map is subtracted: with ``scale="shared"``, raw scores are subtracted, and otherwise maps
    that were first scaled to [0, 1].
    """

    opacity: float = 0.55
    threshold: float = 0.0
    scale: str = "auto"
    cmap: str = "auto"
    side: int = 480
    minus: str | None = None
    limits: tuple[float, float] | None = None
    style: str = "overlay"
    crop: bool = False

    def __post_init__(self) -> None:
        for name in ("opacity", "threshold"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: got {value}; give a number from 0 to 1")
        check_side(self.side)
        if self.scale not in SCALES:
            raise ValueError(f"scale: got {self.scale!r}; give one of {', '.join(SCALES)}")
        if self.cmap not in COLOURS:
            raise ValueError(f"cmap: got {self.cmap!r}; give one of {', '.join(COLOURS)}")
        if self.style not in STYLES:
            raise ValueError(f"style: got {self.style!r}; give one of {', '.join(STYLES)}")
        if self.limits is not None:
            low, high = self.limits
            if not (-LARGEST <= low <= high <= LARGEST):
                raise ValueError(f"limits: got {low} to {high}; give two numbers, the lower first")

    def query(self) -> dict[str, str]:
        """The URL parameters that differ from the defaults."""
        found = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }
        limits = found.pop("limits", None)
        if limits is not None:
            found["low"], found["high"] = (repr(float(v)) for v in limits)
        if "crop" in found:
            found["crop"] = int(found["crop"])
        return {name: str(value) for name, value in found.items()}

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Look:
        """The look that :meth:`query` wrote; unknown parameters are ignored.

        Raises:
            ValueError: a value is not a number, not finite or out of range.
        """
        texts = ("scale", "cmap", "minus", "style")
        found: dict[str, Any] = {n: query[n] for n in texts if n in query}
        found |= {n: parse_number(query[n], n) for n in ("opacity", "threshold") if n in query}
        if "side" in query:
            found["side"] = parse_whole(query["side"], "side")
        if "crop" in query:
            if query["crop"] not in ("0", "1"):
                raise ValueError(f"crop: got {query['crop'][:40]!r}; give 0 or 1")
            found["crop"] = query["crop"] == "1"
        if ("low" in query) != ("high" in query):
            raise ValueError("limits: got one of low and high; give both")
        if "low" in query:
            found["limits"] = (
                parse_number(query["low"], "low"),
                parse_number(query["high"], "high"),
            )
        return cls(**found)


def parse_number(text: str, name: str) -> float:
    """A finite number from the text of a query parameter."""
    try:
        value = float(text) if len(text) <= 40 else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name}: got {text[:40]!r}; give a number")
    return value


def parse_whole(text: str, name: str) -> int:
    """A whole number from the text of a query parameter."""
    if not (text.isascii() and text.isdigit() and len(text) <= 6):
        raise ValueError(f"{name}: got {text[:40]!r}; give a whole number")
    return int(text)


def check_side(side: int) -> int:
    """Return ``side`` if the viewer draws pictures of that size; else raise a ValueError."""
    if not SIDES[0] <= side <= SIDES[1]:
        raise ValueError(f"side: got {side}; give {SIDES[0]} to {SIDES[1]} pixels")
    return side


# ---------------------------------------------------------------------- URLs


def photo_url(pack: Pack, image_id: str, side: int = 240, crop: str | None = None) -> str:
    """The URL of a photo with a longer side of at most ``side`` pixels.

    ``crop`` is the entry whose view of the photo is shown; by default the whole photo is shown.
    """
    query = {"pack": pack.id, "image": image_id, "side": side, "v": pack.version}
    if crop is not None:
        query["crop"] = crop
    return f"{PICTURE}?{urlencode(query)}"


def overlay_url(pack: Pack, entry_id: str, look: Look) -> str:
    """The URL of a map over its photo."""
    query = {"pack": pack.id, "entry": entry_id, **look.query(), "v": pack.version}
    return f"{OVERLAY}?{urlencode(query)}"


def map_url(pack: Pack, image_id: str, entry_id: str | None, look: Look) -> str:
    """:func:`overlay_url`, or :func:`photo_url` if the photo has no such map."""
    return overlay_url(pack, entry_id, look) if entry_id else photo_url(pack, image_id, look.side)


# ---------------------------------------------------------------------- drawing


def legends(pack: Pack, entry_ids: Iterable[str], look: Look) -> list[Legend]:
    """The legends of these maps without repetition; maps that cannot be read have none."""
    found: dict[Legend, None] = {}
    for entry_id in entry_ids:
        with contextlib.suppress(PackError):  # its picture says so
            found[_legend(pack, entry_id, look)] = None
    return list(found)


def is_clipped(pack: Pack, entry_id: str, look: Look) -> bool:
    """Whether the map is drawn on a scale that ends at percentiles of its values."""
    return _scaled(pack, pack.explanation(entry_id), look)[1].clipped


def blank_maps(pack: Pack, entry_ids: Iterable[str], title: Callable[[str], str]) -> str:
    """A sentence that names the maps that are constant; "" if there are none.

    ``title`` returns a photo's name for its id.
    """
    names = []
    for entry_id in entry_ids:
        with contextlib.suppress(PackError):  # its picture says so
            found = pack.explanation(entry_id)
            high = found.map.max()
            if found.map.min() == high and not (found.is_mask and high == 1):
                name = title(found.image_id)
                names.append(map_name(found.method_title, found.target_name, name))
    return blank_note(names) if names else ""


def _legend(pack: Pack, entry_id: str, look: Look) -> Legend:
    scale = _scaled(pack, pack.explanation(entry_id), look)[1]
    if look.minus is None:
        return legend_of(scale, look.scale == "shared", look.style, not look.crop)
    names = (pack.explanation(i).target_name for i in (entry_id, look.minus))
    plus, minus = (name.split(",")[0] for name in names)
    if look.style != "overlay":
        legend = legend_of(scale, True, look.style, not look.crop)
        return replace(legend, text=f"where {plus} has more than {minus}")
    kind = "scores" if look.scale == "shared" else "min-maxed maps"
    text = f"difference of the {kind}: orange where {plus} has more, blue where {minus} has"
    return Legend(*scale.ends, text, scale.cmap)


def overlay_image(pack: Pack, entry_id: str, look: Look) -> Image.Image:
    """A map over its photo, drawn with a look.

    Raises:
        PackError: there is no such entry, or its files are missing or have changed.
        ValueError: the map that ``minus`` names is on another grid.
    """
    explanation = pack.explanation(entry_id)
    photo = pack.photo(explanation.image_id, None if look.crop else look.side)
    drawn = draw(pack, explanation, photo, look)
    drawn.thumbnail((look.side, look.side), Image.Resampling.LANCZOS)
    return drawn


def photo_image(pack: Pack, image_id: str, side: int, view: View | None = None) -> Image.Image:
    """The photo, or the part of it that a model saw."""
    if view is None:
        return pack.photo(image_id, side)
    photo = pack.photo(image_id)
    photo = photo.crop(seen_box(view, photo))
    photo.thumbnail((side, side), Image.Resampling.LANCZOS)
    return photo


def draw(pack: Pack, explanation: Explanation, photo: Image.Image, look: Look) -> Image.Image:
    """A map of the pack over its photo, which may have been shrunk."""
    values, scale = _scaled(pack, explanation, look)
    on_photo = explanation.view.to_photo(scale(values), (photo.height, photo.width))
    if look.crop:
        left, top, right, bottom = box = seen_box(explanation.view, photo)
        photo, on_photo = photo.crop(box), on_photo[top:bottom, left:right]
    return overlay(photo, on_photo, look.opacity, scale.cmap, look.threshold, look.style)


def seen_box(view: View, photo: Image.Image) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) that the model saw, in pixels of ``photo``, which may have any
    size; it has at least one pixel."""
    y, x = photo.height / view.photo_size[0], photo.width / view.photo_size[1]
    top, left, bottom, right = view.photo_box
    left, right = _whole_range(left * x, right * x, photo.width)
    top, bottom = _whole_range(top * y, bottom * y, photo.height)
    return int(left), int(top), int(right), int(bottom)


def _whole_range(low: float, high: float, count: int) -> tuple[int, int]:
    """The pixels whose centres lie in [low, high], or else the pixel that contains its midpoint."""
    first, end = math.ceil(low - 0.5), math.floor(high + 0.5)
    if end <= first:
        first = min(max(int((low + high) / 2), 0), count - 1)
        end = first + 1
    return max(first, 0), min(end, count)


def _scaled(pack: Pack, explanation: Explanation, look: Look) -> tuple[np.ndarray, Scale]:
    """The values (h, w) that are drawn, and their scale."""
    coloured = look.style == "overlay"
    cmap = None if look.cmap == "auto" or not coloured else look.cmap
    if look.minus is not None:
        values = contrast(explanation, pack.explanation(look.minus), raw=look.scale == "shared")
        limits = look.limits if look.scale == "shared" else None
        ends = limits or (float(values.min()), float(values.max()))
        return values, make_scale([ends], DIVERGING)
    if look.style == "outline":
        return explanation.map, own_scale(explanation)
    if look.scale != "shared":
        clip = {"map": False, "clip": True}.get(look.scale)
        return explanation.map, own_scale(explanation, cmap, clip)
    return explanation.map, make_scale(
        [look.limits] if look.limits else _limits(pack, explanation.image_id), cmap
    )


def _limits(pack: Pack, image_id: str) -> list[tuple[float, float]]:
    """The (smallest, largest) value of every map of a photo in the pack."""
    entries = pack.entries
    own = entries[entries["image_id"] == image_id]
    return list(zip(own["min"].astype(float), own["max"].astype(float), strict=True))


def jpeg(image: Image.Image) -> bytes:
    """A picture for a page as JPEG, with full colour resolution, since colours carry the map."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY, subsampling=0)
    return stream.getvalue()


def data_uri(data: bytes) -> str:
    """A JPEG as a data URI, which needs no request, for pictures that must appear at once."""
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}"


_CACHE = LRUCache(CACHE_BYTES)


def photo_bytes(pack: Pack, image_id: str, side: int = 240, crop: str | None = None) -> bytes:
    """The photo as JPEG; with ``crop``, the part of it that the model saw for that entry.

    Raises:
        PackError: there is no such photo or entry.
    """
    view = None
    if crop is not None:
        if pack.key(crop)[0] != image_id:
            raise PackError("This map belongs to another photo; open the gallery again")
        view = pack.view(crop)
    key = (pack.id, pack.version, image_id, side, view)
    return _CACHE.kept(key, lambda: jpeg(photo_image(pack, image_id, side, view)), len)


def overlay_bytes(pack: Pack, entry_id: str, look: Look) -> bytes:
    """The map over its photo as JPEG."""
    key = (pack.id, pack.version, entry_id, look)
    return _CACHE.kept(key, lambda: jpeg(overlay_image(pack, entry_id, look)), len)
