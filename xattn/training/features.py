"""``cache_features``: compute the features of a frozen backbone once and read them from disk afterwards.

The features are stored in a :mod:`~xattn.training.cache`, whose key contains everything that they depend
on: the backbone's weights, taps and preprocessing, and the photos. A row contains the tokens ``tap-0``,
``tap-1``, ..., each (N, C_i) on the grid of the last tap, and ``prefix`` (P, C). After a run was killed,
the next one computes only the missing blocks; the result is that of an uninterrupted run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from xattn.backbone import Backbone, Taps
from xattn.heads.attentive import Tokens, patches_of
from xattn.photos.base import Data, Photos
from xattn.photos.images import MAX_PIXELS
from xattn.photos.sources import open_photos
from xattn.runtime.distributed import processes
from xattn.runtime.memory import raise_on_out_of_memory
from xattn.runtime.option_checks import Count, check
from xattn.training.cache import FEATURES, Cache, filled_cache

PREFIX = "prefix"
Kind = Literal["float32", "float16"]


@dataclass(frozen=True, eq=False)
class Features:
    """Cached features; photo i is the i-th photo that could be read.

    ``names`` are the names of the photos, ``skipped`` lists (name, reason) for the photos that could not
    be read, ``channels`` is the width of every tap, ``grid`` their common (h, w), and ``key`` everything
    that the features depend on.
    """

    names: list[str]
    skipped: list[tuple[str, str]]
    channels: tuple[int, ...]
    grid: tuple[int, int]
    prefix_tokens: int
    _photos: Tensor = field(repr=False)
    _cache: Cache = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def folder(self) -> Path:
        """The folder in which the features are stored."""
        return self._cache.folder

    @property
    def key(self) -> dict[str, Any]:
        """Everything that the features depend on."""
        return self._cache.key

    @property
    def digest(self) -> str:
        """SHA-256 of the key."""
        return self._cache.digest

    @property
    def views(self) -> int:
        """The number of crops of every photo: the evaluation crop, then random ones."""
        return self._cache.crops

    def batch(self, index: Sequence[int] | Tensor, view: int | Tensor = 0) -> Tokens:
        """Return the tokens of photos in float32: (B, N, C_i) of every tap, and the prefix (B, P, C).

        Args:
            index: numbers of photos, 0 .. len - 1.
            view: the crop, 0 .. views - 1, either one for all photos or one for each photo.

        Raises:
            ValueError: the stored features have changed since they were written.
        """
        photos = self._photos[torch.as_tensor(index, dtype=torch.long, device="cpu")]
        crops = torch.as_tensor(view, dtype=torch.long, device="cpu")
        rows = self._cache.rows(crops * self._cache.count + photos)
        patches = tuple(rows[f"tap-{i}"].float() for i in range(len(self.channels)))
        return Tokens(patches, rows[PREFIX].float(), self.grid)

    def taps(self, index: Sequence[int] | Tensor, view: int | Tensor = 0) -> Taps:
        """Return the tokens of :meth:`batch` as :class:`~xattn.backbone.Taps` with empty logits (B, 0), as
        input for a head."""
        tokens = self.batch(index, view)
        maps = tuple(p.transpose(1, 2).unflatten(2, self.grid) for p in tokens.patches)
        return Taps(tokens.prefix.new_empty(len(tokens.prefix), 0), maps, tokens.prefix)


def _features(cache: Cache) -> Features:
    kept, names, skipped = cache.photos
    row = cache.first_row()
    return Features(
        names=names,
        skipped=skipped,
        channels=tuple(row[f"tap-{i}"].shape[2] for i in range(len(row) - 1)),
        grid=(cache.key["grid"][0], cache.key["grid"][1]),
        prefix_tokens=row[PREFIX].shape[1],
        _photos=torch.tensor(kept, device="cpu"),
        _cache=cache,
    )


def feature_key(
    backbone: Backbone,
    photos: Photos,
    dtype: Kind = "float32",
    views: int = 1,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, Any]:
    """Return everything that the features in a cache depend on."""
    return {
        "format": FEATURES.version,
        "backbone": {"name": backbone.name, "sha256": backbone.fingerprint},
        "taps": list(backbone.taps),
        "grid": list(backbone.tap_sizes[-1]),
        "preprocessing": json.loads(json.dumps(asdict(backbone.preprocessing))),
        "photos": photos.describe(),
        "max_pixels": max_pixels,
        "dtype": dtype,
        "crops": views,
        "seed": seed if views > 1 else None,
    }


def cache_features(
    backbone: Backbone,
    data: Data,
    folder: str | Path,
    *,
    batch_size: int = 16,
    workers: int = 0,
    dtype: Kind = "float32",
    views: int = 1,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
    progress: bool = True,
) -> Features:
    """Return the features of ``data``; those that are not yet in ``folder`` are computed and stored
    there.

    Args:
        data: see :func:`xattn.photos.sources.open_photos`.
        batch_size: number of photos per pass; a smaller batch is padded to this number.
        dtype: dtype of the features on disk; ``"float16"`` halves the space.
        views: number of crops of every photo. The first is the evaluation crop; the others are random
            crops and flips, which are pure functions of (seed, view, index).

    Taps with a finer grid are averaged to the grid of the last tap. Photos that cannot be read are left
    out and listed. If there are several processes, each computes a share of the features.

    Raises:
        ValueError: ``folder`` contains features with another key (the message gives both keys) or is in
            use; no photo can be read; or ``dtype`` cannot represent the features.
        OSError: ``folder`` cannot be written, or the disk does not have enough space.

    Example:
        >>> import tempfile
        >>> from xattn import cache_features
        >>> from PIL import Image
        >>> photos = tempfile.mkdtemp()
        >>> for i in range(4):
        ...     Image.new("RGB", (64, 64), (25 * i, 90, 10)).save(f"{photos}/{i}.png")
        >>> import xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> folder = f"{tempfile.mkdtemp()}/features"
        >>> features = cache_features(net, photos, folder, progress=False)
        >>> len(features)
        4
    """
    check("batch_size", batch_size, Count)
    check("views", views, Count)
    check("dtype", dtype, Kind)
    photos = open_photos(data)
    ranks, rank = processes(backbone.device)
    key = feature_key(backbone, photos, dtype, views, seed, max_pixels)
    kind = getattr(torch, dtype)

    def compute(
        crop: int, block: range, images: Tensor | None, readable: list[int]
    ) -> Mapping[str, Tensor]:
        tokens = _block_tokens(backbone, images, readable, batch_size)
        _check_numbers(tokens, readable, kind, [photos.name(i) for i in block])
        names = [*(f"tap-{i}" for i in range(len(tokens) - 1)), PREFIX]
        return {n: t[: len(block)].to(kind) for n, t in zip(names, tokens, strict=True)}

    def fill(cache: Cache) -> None:
        cells = math.prod(backbone.tap_sizes[-1])
        numbers = cells * sum(backbone.channels) + backbone.prefix_tokens * backbone.channels[-1]
        cache.require_room(numbers * kind.itemsize)
        cache.fill(
            photos,
            backbone.preprocessing,
            batch_size,
            compute,
            workers=workers,
            process=(rank, ranks),
            progress=progress,
            desc="features",
        )

    return _features(filled_cache(Path(folder), key, FEATURES, photos, rank, fill))


@torch.inference_mode()
def _block_tokens(
    backbone: Backbone, batch: Tensor | None, readable: list[int], batch_size: int
) -> list[Tensor]:
    """Tokens of every tap and the prefix tokens of a block, with grey instead of unreadable photos.

    The pass always has ``batch_size`` photos, because the last bits may depend on its shape.
    """
    size = backbone.preprocessing.input_size
    images = torch.full((batch_size, len(backbone.preprocessing.mean), *size), 0.5, device="cpu")
    if batch is not None:
        images[readable] = batch
    with raise_on_out_of_memory(
        MemoryError(f"batch_size: out of memory with {batch_size} photos per pass; use fewer")
    ):
        taps = backbone(images.to(backbone.device, next(backbone.parameters()).dtype))
    patches = patches_of(taps.maps)
    prefix = patches[-1].new_empty(batch_size, 0, 0) if taps.prefix is None else taps.prefix
    return [*patches, prefix]


def _check_numbers(
    tokens: Sequence[Tensor], readable: list[int], dtype: torch.dtype, names: list[str]
) -> None:
    """Raise a ``ValueError`` that names the photo whose numbers the file cannot represent."""
    limit = torch.finfo(dtype).max
    for values in tokens:
        if not values.numel():
            continue
        good = (values[readable].flatten(1).float().abs() <= limit).all(1)  # NaN is not good
        if not good.all():
            name = names[readable[int((~good).nonzero()[0])]]
            raise ValueError(
                f"features: the features of {name} are not finite in {str(dtype)[6:]}; use dtype='float32' "
                f"and check the backbone's weights"
            )
