"""Positions of image tokens on a photo, from a table of model families, or measured for families not in
the table.

A measurement uses the fact that a token depends only on its own patch if every attention inside the image
tower returns zeros. The photo is inverted in bands, one at a time; the change |f_i - f_i'| of a token over
the bands of rows and of columns shows its position. Tokens that never change (line breaks, queries of a
resampler) have no position, and neither do tokens that change equally everywhere.

A map (h, w) of token scores s (n,) is  sum_i s_i r_i c_i^T  where r_i (h,) and c_i (w,) are the shares of
token i in rows and columns, each of sum 1. This preserves the total score; scores from overlapping views
(tiles and the whole photo) are summed on the finest grid. Some towers do not see a strip at an edge that is
narrower than a patch; the table ignores this.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import pairwise
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode

from xattn.attention.record import FUSED, fused_layers
from xattn.photos.view import View
from xattn.vlm.model import VLM
from xattn.vlm.reading import QueryRows, read_rows
from xattn.vlm.words import PhotoError

# Standard deviation, relative to the photo's side, of a token without a position; uniform: 0.29
EVERYWHERE = 0.25
CHECKED = 4  # number of bands used to check the table when a model is loaded

Array = NDArray[np.float64]
Views = Literal["all", "base", "tiles"]


@dataclass(frozen=True, eq=False)
class Layout:
    """The image tokens of one photo, or of a frame of a clip.

    Args:
        number: number of the photo or frame among those shown.
        first: the number of this photo's first token among the tokens of all photos.
        rows, columns: the shares (k, h) and (k, w) of each token in rows and columns; they sum to 1 or, for
            a token without a position, to 0.
        view: maps positions on the grid back to the photo.
        source: "table", "measured" or "resampler".
        spread: for queries of a resampler, instead of rows and columns: the shares (k, h, w) of each query
            in all cells, that is, where it attends.
        base: (k,) bool, only for a photo that is shown both whole and in tiles: which tokens show the whole
            photo.
    """

    number: int
    first: int
    rows: Array
    columns: Array
    view: View
    source: str = "table"
    spread: Array | None = None
    base: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) of a map."""
        return self.rows.shape[1], self.columns.shape[1]

    @cached_property
    def has_place(self) -> NDArray[np.bool_]:
        """(k,): the tokens that have a position."""
        if self.spread is not None:
            return np.ones(len(self), bool)
        return (self.rows.sum(1) > 0) & (self.columns.sum(1) > 0)

    @property
    def tokens(self) -> slice:
        """The slice of this photo's tokens among the n tokens of all photos."""
        return slice(self.first, self.first + len(self))

    def shown(self, views: Views = "all") -> NDArray[np.bool_]:
        """(k,): the tokens that a map of these views includes.

        Raises:
            ValueError: there are no tiles.
        """
        if views == "tiles" and self.base is None:
            raise PhotoError("views: got 'tiles', but the photo is shown only whole; give 'all'")
        if views == "all" or self.base is None:
            return self.has_place
        return self.has_place & (self.base if views == "base" else ~self.base)  # type: ignore[no-any-return]

    def maps(self, scores: Any, views: Views = "all") -> NDArray[np.float32]:
        """Maps (W, h, w) of scores (W, n) of the tokens of all photos."""
        own = np.asarray(scores, dtype=np.float64)[:, self.tokens] * self.shown(views)
        if self.spread is not None:
            return np.tensordot(own, self.spread, 1).astype(np.float32)
        return np.stack([(self.rows * s[:, None]).T @ self.columns for s in own]).astype(np.float32)

    def unplaced(self, scores: Any, views: Views = "all") -> Array:
        """(W,): the sum of ``scores`` (W, n) over those tokens of this photo that maps of ``views`` leave
        out."""
        own = np.asarray(scores, dtype=np.float64)[:, self.tokens]
        return own[:, ~self.shown(views)].sum(1)  # type: ignore[no-any-return]

    @cached_property
    def grids(self) -> list[NDArray[np.int64]]:
        """The numbers of this photo's tokens, arranged as on the photo in grids (h', w'), for the whole
        photo or for each view; empty if tokens have no positions. Measured centres in a row may differ by
        3/4 of a band, because bands need not align with patches."""
        if self.spread is not None:
            return []
        near = 0.75 if self.source == "measured" else 1e-6
        y, x = (shares @ (np.arange(shares.shape[1]) + 0.5) for shares in (self.rows, self.columns))
        rows: list[list[int]] = []
        for t in np.flatnonzero(self.has_place).tolist():
            last = rows[-1][-1] if rows else t
            if rows and abs(y[t] - y[last]) < near and x[t] > x[last] - near / 4:
                rows[-1].append(t)
            else:
                rows.append([t])
        found: list[list[list[int]]] = []
        for row in rows:
            above = found[-1][-1] if found else []
            aligned = len(above) == len(row) and np.allclose(x[above], x[row], atol=near)
            if aligned and y[row[0]] > y[above[0]] - near:
                found[-1].append(row)
            else:
                found.append([row])
        return [np.array(grid) for grid in found]

    def hidden_by(self, box: tuple[float, float, float, float]) -> NDArray[np.bool_]:
        """(k,): whether a box (top, left, bottom, right) of cells hides each token, that is, whether the
        two overlap in at least half the area of the smaller one."""
        if self.spread is not None:  # queries of a resampler have no single position
            return np.zeros(len(self), bool)
        top, left, bottom, right = box
        height, width = self.rows.shape[1], self.columns.shape[1]
        shares = (
            self.rows
            @ _overlap(top, bottom, height)
            * (self.columns @ _overlap(left, right, width))
        )
        areas = 1 / np.maximum((self.rows**2).sum(1) * (self.columns**2).sum(1), 1e-12)
        common = shares * areas
        smaller = np.minimum(areas, (bottom - top) * (right - left))
        return self.has_place & (common >= smaller / 2 - 1e-9)  # type: ignore[no-any-return]


def _overlap(start: Any, end: Any, cells: int) -> Array:
    """(cells,), or (k, cells) for (k, 1): how much of each cell lies between ``start`` and ``end``."""
    edges = np.arange(cells + 1)
    return np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], start), 0, 1)  # type: ignore[no-any-return]


class Places(NamedTuple):
    """The table's entry for a photo. ``boxes`` (k, 4): top, left, bottom and right of each token as
    fractions of what the model saw, NaN for a token without a position. ``shape``: the finest grid.
    ``view``: what the model saw, by default the whole photo. ``slack``: how many neighbouring cells a token
    may also read, for example because of strided convolutions. ``base``: if the photo is also shown in
    tiles, the tokens of the whole photo."""

    boxes: Array
    shape: tuple[int, int]
    view: View | None = None
    slack: float = 0.0
    base: slice | None = None

    def layout(self, number: int, first: int, size: tuple[int, int]) -> Layout:
        """The layout of a photo of ``size`` (height, width)."""
        shares = []
        for axis, cells in enumerate(self.shape):
            start, end = self.boxes[:, axis, None] * cells, self.boxes[:, axis + 2, None] * cells
            part = np.nan_to_num(_overlap(start, end, cells))
            shares.append(part / np.maximum(part.sum(1, keepdims=True), 1e-12))
        tokens = np.arange(len(self.boxes))
        base = None if self.base is None else np.isin(tokens, tokens[self.base])
        return Layout(number, first, shares[0], shares[1], self.view or _whole(size), base=base)


def _whole(size: tuple[int, int]) -> View:
    return View("whole", size, size, (0, 0, *size), size)


def grid(
    height: int,
    width: int,
    box: tuple[float, float, float, float] = (0, 0, 1, 1),
    newline: bool = False,
) -> Array:
    """Boxes of a grid of tokens, row by row, optionally with an unplaced token after each row."""
    top, left, bottom, right = box
    y = top + (bottom - top) * np.arange(height + 1) / height
    x = left + (right - left) * np.arange(width + 1) / width
    found = np.full((height, width + newline, 4), np.nan)
    found[:, :width, 0], found[:, :width, 2] = y[:-1, None], y[1:, None]
    found[:, :width, 1], found[:, :width, 3] = x[None, :-1], x[None, 1:]
    return found.reshape(-1, 4)


_NOWHERE = np.full((1, 4), np.nan)

# ---------------------------------------------------------------------- the table


class _Photo(NamedTuple):
    """Photo ``number`` of ``photos``, of ``size`` (height, width), with n image tokens in all."""

    vlm: VLM
    inputs: Mapping[str, Any]
    number: int
    photos: int
    size: tuple[int, int]
    n: int

    @property
    def config(self) -> Any:
        return self.vlm.model.config

    @property
    def processor(self) -> Any:
        return self.vlm.processor.image_processor

    @property
    def side(self) -> int:
        """The number of patches along a side of the image tower's input."""
        vision = self.config.vision_config
        size, patch = (
            int(x[0] if isinstance(x, list | tuple) else x)
            for x in (vision.image_size, vision.patch_size)
        )
        return size // patch

    def rows(self, name: str, divisor: int) -> tuple[int, int]:
        """The photo's (height, width) in units of ``divisor``, from the input ``name`` (photos, 2)."""
        height, width = (int(x) // divisor for x in self.inputs[name][self.number])
        return height, width

    def square(self, side: int, *before: Array) -> Places:
        """The whole photo as side x side tokens, which follow the tokens of ``before``, without a
        position."""
        return Places(np.concatenate([*before, grid(side, side)]), (side, side))


def _llava(photo: _Photo) -> Places | None:
    if "image_sizes" in photo.inputs:  # Pixtral's tower
        shape = photo.rows("image_sizes", photo.config.vision_config.patch_size)
        return Places(grid(*shape), shape)
    full = photo.config.vision_feature_select_strategy == "full"
    view = _cropped(photo.processor, photo.size)
    if view is None:
        return None
    return photo.square(photo.side, *[_NOWHERE] * full)._replace(view=view)


def _cropped(processor: Any, size: tuple[int, int]) -> View | None:
    """The view of an image processor that resizes and crops the centre; None if it does more."""
    if getattr(processor, "do_pad", False) or not getattr(processor, "do_resize", True):
        return None
    asked = dict(processor.size)
    height, width = size
    if short := asked.get("shortest_edge"):
        long = int(short * max(size) / min(size))
        resized = (long, short) if height > width else (short, long)
    elif asked.get("height"):
        resized = (asked["height"], asked["width"])
    else:
        return None
    if not getattr(processor, "do_center_crop", False):
        return View("crop", size, resized, (0, 0, *resized), resized)
    crop = processor.crop_size["height"], processor.crop_size["width"]
    top, left = (
        int((r - c) / 2) if r >= c else -((c - r) // 2) for r, c in zip(resized, crop, strict=True)
    )
    return View("crop", size, resized, (top, left, *crop), crop)


def _llava_next(photo: _Photo) -> Places:
    """The whole photo, then tiles as one grid without padding, with a line break after each row."""
    side, (height, width) = photo.side, photo.size
    base = grid(side, side)
    onevision = photo.vlm.family == "llava_onevision"
    if onevision and photo.photos > 1:
        return Places(np.concatenate([base, _NOWHERE]), (side, side))
    module = import_module("transformers.models.llava_next.modeling_llava_next")
    tiles = module.get_anyres_image_grid_shape(
        photo.size, photo.config.image_grid_pinpoints, photo.config.vision_config.image_size
    )
    tall, wide = (side * int(t) for t in tiles)
    scale = min(tall / height, wide / width)
    cut, spans = [], []
    for cells, length, along in (
        (tall, height, tall / height > scale),
        (wide, width, wide / width > scale),
    ):
        seen = length * scale  # extent of the photo, in tokens, in the middle of the grid
        padding = (cells - int(round(seen, 7))) // 2 if along else 0
        cut.append(cells - 2 * padding)
        start = (padding - (cells - seen) / 2) / seen
        spans.append((start, start + cut[-1] / seen))
    (top, bottom), (left, right) = spans
    shape = cut[0], cut[1]
    if onevision:
        most = int(photo.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(shape[0] * shape[1] / (most * side**2))
        if ratio > 1.1:
            shape = int(shape[0] // ratio), int(shape[1] // ratio)
    boxes = np.clip(grid(*shape, (top, left, bottom, right), newline=True), 0, 1)
    finest = max(side, shape[0]), max(side, shape[1])
    return Places(np.concatenate([base, boxes]), finest, base=slice(len(base)))


def _qwen(photo: _Photo, name: str = "image_grid_thw") -> Places:
    merge = photo.config.vision_config.spatial_merge_size
    height, width = (int(x) // merge for x in photo.inputs[name][photo.number, 1:])
    return Places(grid(height, width), (height, width))


def _qwen_clip(clip: _Photo) -> list[Places]:
    return [_qwen(clip, "video_grid_thw")] * int(clip.inputs["video_grid_thw"][0, 0])


def _onevision_clip(clip: _Photo) -> list[Places]:
    """Means of 2 x 2 tokens of each frame, and a line break after the last."""
    one = clip.square(math.ceil(clip.side / 2))
    last = one._replace(boxes=np.concatenate([one.boxes, _NOWHERE]))
    return [one] * (clip.photos - 1) + [last]


def _tiles(rows: int, columns: int, side: int, overview: bool) -> Places:
    """rows x columns tiles of side x side tokens, tile after tile, with the whole photo last."""
    parts = [
        grid(side, side, (r / rows, c / columns, (r + 1) / rows, (c + 1) / columns))
        for r in range(rows)
        for c in range(columns)
    ]
    boxes = np.concatenate([*parts, *[grid(side, side)] * overview])
    base = slice(rows * columns * side**2, None) if overview else None
    return Places(boxes, (rows * side, columns * side), base=base)


def _internvl(photo: _Photo) -> Places:
    side, own = math.isqrt(photo.config.image_seq_length), photo.processor
    if photo.n == photo.photos * side**2:
        return photo.square(side)
    module = import_module("transformers.models.got_ocr2.image_processing_got_ocr2")
    size = own.size["height"], own.size["width"]
    columns, rows = module.get_optimal_tiled_canvas(
        photo.size, size, own.min_patches, own.max_patches
    )
    return _tiles(rows, columns, side, overview=rows * columns > 1)


def _idefics(photo: _Photo) -> Places:
    side = photo.side // photo.config.scale_factor
    _, rows, columns = photo.processor.get_number_of_image_patches(*photo.size)
    if photo.n == photo.photos * side**2 or not rows * columns:
        return photo.square(side)
    return _tiles(rows, columns, side, overview=True)


def _mistral3(photo: _Photo) -> Places:
    merge = photo.config.spatial_merge_size * photo.config.vision_config.patch_size
    shape = photo.rows("image_sizes", merge)
    return Places(grid(*shape), shape)


def _mllama(photo: _Photo) -> Places:
    """Tiles, each starting with a class token, of a canvas padded at the right and lower edges."""
    vision, side, own = photo.config.vision_config, photo.side, photo.processor
    module = import_module("transformers.models.mllama.image_processing_mllama")
    pixels = vision.image_size
    tall, wide = module.get_optimal_tiled_canvas(*photo.size, own.max_image_tiles, pixels)
    height, width = module.get_image_size_fit_to_canvas(*photo.size, tall, wide, pixels)
    rows, columns = tall // pixels, wide // pixels
    tiles = _tiles(rows, columns, side, False).boxes.reshape(rows * columns, -1, 4)
    tiles = np.clip(tiles * np.array([tall / height, wide / width] * 2), 0, 1)
    tiles[(tiles[..., 2] <= tiles[..., 0]) | (tiles[..., 3] <= tiles[..., 1])] = np.nan
    nowhere = np.full((len(tiles), 1, 4), np.nan)
    boxes = np.concatenate([nowhere, tiles], 1).reshape(-1, 4)
    padding = np.full(((vision.max_num_tiles - len(tiles)) * (1 + side**2), 4), np.nan)
    shape = math.ceil(rows * side * height / tall), math.ceil(columns * side * width / wide)
    return Places(np.concatenate([boxes, padding]), shape)


TABLE: dict[str, Callable[[_Photo], Places | None]] = {
    "llava": _llava,
    "vipllava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_next,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "internvl": _internvl,
    "idefics3": _idefics,
    "smolvlm": _idefics,
    "paligemma": lambda photo: photo.square(photo.side),
    "gemma3": lambda photo: photo.square(math.isqrt(photo.config.mm_tokens_per_image)),
    "mistral3": _mistral3,
    "florence2": lambda photo: photo.square(math.isqrt(photo.n // photo.photos), _NOWHERE)._replace(
        slack=0.5
    ),
    "blip": lambda photo: photo.square(photo.side, _NOWHERE),
    "mllama": _mllama,
}
"""By ``model_type``."""
CLIPS: dict[str, Callable[[_Photo], list[Places]]] = {
    "qwen2_vl": _qwen_clip,
    "qwen2_5_vl": _qwen_clip,
    "qwen3_vl": _qwen_clip,
    "llava_onevision": _onevision_clip,
}
"""By `model_type`: the token positions for each map of a clip, which may cover two frames."""


def places(
    vlm: VLM, photos: Sequence[Image.Image], inputs: Mapping[str, Any], n: int
) -> list[Places] | None:
    """The table's entry for each photo or frame; None if it has none, or expects another number of
    tokens."""
    sizes = [(p.height, p.width) for p in photos]
    if vlm.clip:
        found: list[Any] = CLIPS[vlm.family](_Photo(vlm, inputs, 0, len(photos), sizes[0], n))
    elif known := TABLE.get(vlm.family):
        found = [known(_Photo(vlm, inputs, i, len(photos), s, n)) for i, s in enumerate(sizes)]
    else:
        return None
    if None in found or sum(len(p.boxes) for p in found) != n:
        return None
    return found


# ---------------------------------------------------------------------- measuring


class _Zeros(TorchFunctionMode):
    """Makes every attention return zeros."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if function is not FUSED:
            return function(*args, **kwargs)
        query, value = (
            args[i] if len(args) > i else kwargs[k] for i, k in ((0, "query"), (2, "value"))
        )
        return query.new_zeros(*query.shape[:-1], value.shape[-1])


@contextmanager
def _local(vlm: VLM) -> Iterator[None]:
    """Context manager in which nothing before the language model mixes tokens: neither attention, even if a
    layer computes it explicitly, nor the residual convolutions of DaViT."""
    handles = []
    for name, module in vlm.model.named_modules():
        *parents, own = name.split(".")
        mixed = own in ("out_proj", "o_proj", "proj", "projection") and "att" in "".join(
            parents[-1:]
        )
        if isinstance(module, nn.Conv2d) and module.stride == (1, 1):
            mixed = module.groups == module.in_channels > 1
        if mixed:
            handles.append(module.register_forward_hook(lambda m, args, out: torch.zeros_like(out)))
    try:
        with fused_layers(vlm.model), _Zeros():
            yield
    finally:
        for handle in handles:
            handle.remove()


def measure_reactions(
    vlm: VLM, photos: Sequence[Image.Image], prompt: Any, bands: Sequence[tuple[int, int]]
) -> tuple[Array, list[tuple[Array, Array]]]:
    """How much each token changes when bands of a photo are inverted.

    Args:
        bands: for each photo the numbers of row bands and of column bands.

    Returns:
        sums (photos, n) of the changes over the rows, and each photo's changes (n, rows) and (n, columns).
    """

    def features(shown: Sequence[Image.Image]) -> torch.Tensor:
        return vlm.entered(vlm.inputs(shown, prompt)).features.float()

    found = []
    with _local(vlm):
        own = features(photos)
        for i, photo in enumerate(photos):
            pixels, parts = np.asarray(photo), []
            for axis, count in enumerate(bands[i]):
                edges = np.linspace(0, pixels.shape[axis], count + 1).round().astype(int)
                changes = []
                for start, end in pairwise(edges):
                    other = pixels.copy()
                    part = (slice(None),) * axis + (slice(start, end),)
                    other[part] = 255 - other[part]
                    shown = [*photos[:i], Image.fromarray(other), *photos[i + 1 :]]
                    changes.append((features(shown) - own).norm(dim=1).double().cpu().numpy())
                parts.append(np.stack(changes, 1))
            found.append((parts[0], parts[1]))
    return np.stack([rows.sum(1) for rows, _ in found]), found


def _normal(changes: Array) -> Array:
    """Changes (n, bands) as shares of sum 1; 0 for tokens that never change, or change equally everywhere.
    They are squared, so that what convolutions carry over from neighbours counts less."""
    changes = changes**2
    total = changes.sum(1, keepdims=True)
    shares = changes / np.maximum(total, 1e-30)
    shares[total[:, 0] <= 1e-8 * max(total.max(), 1e-30)] = 0
    if changes.shape[1] > 2:
        shares[_centres(shares)[1] > EVERYWHERE] = 0
    return shares


def _centres(shares: Array) -> tuple[Array, Array]:
    """Mean and standard deviation (n,) of the positions of shares (n, bands), relative to the photo's
    side."""
    places = (np.arange(shares.shape[1]) + 0.5) / shares.shape[1]
    mean = shares @ places
    return mean, np.sqrt(np.maximum(shares @ places**2 - mean**2, 0))


def locate(
    vlm: VLM, photos: Sequence[Image.Image], prompt: Any, inputs: Mapping[str, Any], n: int
) -> list[Layout]:
    """The positions of the n image tokens of a conversation, photo by photo.

    A model family that is not in the table is measured once for photos of these sizes, with a warning; this
    takes as many passes of the image tower as the grid has rows and columns.
    """
    told = places(vlm, photos, inputs, n)
    if told is not None:
        first, found = 0, []
        for number, own in _with_numbers(photos, told):
            photo = photos[number]
            found.append(own.layout(number, first, (photo.height, photo.width)))
            first += len(own.boxes)
        return found
    if vlm.clip:
        raise PhotoError(
            f"images: a clip has {n:,} tokens, which does not match the frames of "
            f"a {type(vlm.model).__name__}; please report this model"
        )
    if hasattr(vlm.model, "qformer"):
        return _looked_at(vlm, photos, inputs, n // len(photos))
    known = _MEASURED.setdefault(vlm, {})
    key = tuple(photo.size for photo in photos), n
    if key not in known:
        for old in list(known)[:-15]:
            del known[old]
        known[key] = _measured_layouts(vlm, photos, prompt, n)
    return known[key]


def _with_numbers(photos: Sequence[Any], told: Sequence[Places]) -> Iterator[tuple[int, Places]]:
    """Each entry with the number of its photo, or of the first of its frames."""
    step = math.ceil(len(photos) / len(told))
    return zip(range(0, len(photos), step), told, strict=True)


_MEASURED: WeakKeyDictionary[VLM, dict[Any, list[Layout]]] = WeakKeyDictionary()


def _measured_layouts(vlm: VLM, photos: Sequence[Image.Image], prompt: Any, n: int) -> list[Layout]:
    """See :func:`locate`."""
    warnings.warn(
        f"layout: the positions of a {type(vlm.model).__name__}'s image tokens are measured, because the "
        f"table has no entry for {n:,} tokens of this photo",
        stacklevel=3,
    )
    share = n / len(photos)
    bands = []
    for p in photos:
        height = min(p.height, max(2, round(math.sqrt(share * p.height / p.width))))
        bands.append((height, min(p.width, max(2, round(share / height)))))
    sums, changes = measure_reactions(vlm, photos, prompt, bands)
    owner = sums.argmax(0)
    for t in range(n):  # tokens without a position belong to the photo of the previous token
        owner[t] = owner[t] if sums[:, t].any() else owner[max(t - 1, 0)]
    found = []
    for i, photo in enumerate(photos):
        mine = np.flatnonzero(owner == i)
        rows, columns = (_normal(x[mine]) for x in changes[i])
        first = int(mine[0]) if len(mine) else 0
        view = _whole((photo.height, photo.width))
        found.append(Layout(i, first, rows, columns, view, "measured"))
    return found


def _looked_at(
    vlm: VLM, photos: Sequence[Image.Image], inputs: Mapping[str, Any], queries: int
) -> list[Layout]:
    """Where each query of a Q-Former attends: the mean of its cross-attention over layers and heads, on
    the grid of the tower, whose first token is the class token."""
    read: list[Array] = []

    def keep(rows: QueryRows) -> None:
        if rows.cross:
            read.append(rows.weights.mean(1).double().cpu().numpy())  # (photos, queries, 1 + h w)

    with read_rows(vlm.model.qformer, keep, range(queries)):
        vlm.entered(inputs)
    mean = np.mean(read, 0)[:, :, 1:]
    side = math.isqrt(mean.shape[2])
    found = []
    for i, photo in enumerate(photos):
        spread = mean[i].reshape(queries, side, side)
        empty, view = np.zeros((queries, side)), _whole((photo.height, photo.width))
        found.append(Layout(i, i * queries, empty, empty, view, "resampler", spread))
    return found


def check_table(
    vlm: VLM,
    photos: Sequence[Image.Image],
    prompt: Any,
    inputs: Mapping[str, Any],
    n: int,
    most: int = CHECKED,
) -> float | None:
    """Compare the table with a measurement in at most ``most`` bands in each direction.

    Returns:
        the largest distance between a token's measured centre and the bands of its cell, less the spread of
        the measurement, in units of the cell's size; None if the table has no entry.

    Raises:
        ValueError: the distance is more than half a cell.
    """
    told = places(vlm, photos, inputs, n)
    if told is None:
        return None
    step = math.ceil(len(photos) / len(told))
    shapes = [told[i // step].shape for i in range(len(photos))]
    bands = [(min(most, height), min(most, width)) for height, width in shapes]
    _, changes = measure_reactions(vlm, photos, prompt, bands)
    first, worst = 0, None
    for i, own in _with_numbers(photos, told):
        boxes = _on_photo(own)
        for axis, (cells, count) in enumerate(zip(own.shape, bands[i], strict=True)):
            seen = _normal(changes[i][axis][first : first + len(boxes)])
            at, spread = _centres(seen)
            start, end = boxes[:, axis], boxes[:, axis + 2]
            size = np.maximum(end - start, 1 / cells)
            more = size * (own.slack + 0.5 * (count < cells))  # if bands are wider than cells
            low = np.floor(np.clip(start - more, 0, 1) * count + 1e-6).clip(0, count - 1) + 0.5
            high = np.ceil(np.clip(end + more, 0, 1) * count - 1e-6).clip(1, count) - 0.5
            off = np.maximum(low / count - at, at - high / count) - spread
            off = np.where((seen.sum(1) > 0) & ~np.isnan(start), off, 0) / size
            t = int(np.nanargmax(off))
            worst = max(worst or 0.0, float(off[t]))
            if off[t] > 0.5:
                raise ValueError(
                    f"model: image token {first + t} of a {type(vlm.model).__name__} lies at "
                    f"{(start[t] + end[t]) / 2:.2f} of the photo's {('height', 'width')[axis]} by the "
                    f"table, at {at[t]:.2f} as measured; please report this model"
                )
        first += len(boxes)
    return worst


def _on_photo(own: Places) -> Array:
    """Boxes as fractions of the whole photo."""
    if own.view is None:
        return own.boxes
    top, left, height, width = own.view.box
    tall, wide = own.view.resized
    start, span = np.array([top, left] * 2), np.array([height, width] * 2)
    return np.clip((start + own.boxes * span) / np.array([tall, wide] * 2), 0, 1)  # type: ignore[no-any-return]
