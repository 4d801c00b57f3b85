"""``cache_features``: features of a frozen backbone, computed once and read from disk.

The key of a cache is the SHA-256 of what its numbers depend on: the backbone's weights, taps and
preprocessing, and the description of the photos. A caching run that was killed goes on with the missing
blocks, and gives the numbers that an uninterrupted run gives. The files are described in
:mod:`~xattn.training.feature_files`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from xattn.backbone import Backbone
from xattn.photos.base import Data, Photos
from xattn.photos.images import MAX_PIXELS
from xattn.photos.sources import open_photos
from xattn.runtime.distributed import processes, together
from xattn.runtime.memory import is_out_of_memory
from xattn.training.data import TrainImages, load_batches
from xattn.training.feature_files import FEATURES, Features, open_features, read_features
from xattn.training.feature_store import FeatureStore
from xattn.training.row_files import STORED, UNREADABLE
from xattn.training.row_store import claimed, share_of

__all__ = ["Features", "Kind", "cache_features", "feature_key", "open_features"]

Kind = Literal["float32", "float16"]


def feature_key(
    backbone: Backbone,
    photos: Photos,
    dtype: Kind = "float32",
    views: int = 1,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, Any]:
    """Everything that the numbers of a cache depend on."""
    return {
        "format": FEATURES.version,
        "backbone": {"name": backbone.name, "sha256": backbone.fingerprint},
        "taps": list(backbone.taps),
        "preprocessing": json.loads(json.dumps(asdict(backbone.preprocessing))),
        "photos": photos.describe(),
        "max_pixels": max_pixels,
        "dtype": dtype,
        "views": views,
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
    """The features of ``data``; those that are not in ``folder`` yet are computed into it.

    Args:
        data: see :func:`xattn.photos.sources.open_photos`.
        batch_size: photos a pass; every pass has this shape.
        dtype: of the numbers on disk; ``"float16"`` halves the space.
        views: crops of every photo. The first is the evaluation crop, further ones are random crops and
            flips, pure functions of (seed, view, index).

    Finer maps are averaged to the grid of the last tap. Photos that cannot be read are left out and
    listed. Of several processes each computes its share.

    Raises:
        ValueError: ``folder`` holds features with another key (both are named), is damaged or in use;
            no photo can be read; ``dtype`` cannot hold the features.
        OSError: ``folder`` cannot be written, or the disk has no room.
    """
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype: got {dtype!r}; choose 'float32' or 'float16'")
    for name, value in (("batch_size", batch_size), ("views", views)):
        if isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value}; give a positive number")
    folder, photos = Path(folder), open_photos(data)
    ranks, rank = processes(backbone.device)
    key = feature_key(backbone, photos, dtype, views, seed, max_pixels)
    with claimed(folder, key, FEATURES, rank):
        if not (folder / FEATURES.index).is_file():
            store = together(lambda: FeatureStore(folder, backbone, photos, key))
            process = (rank, ranks)
            together(lambda: _fill(store, backbone, photos, batch_size, workers, process, progress))
            together(lambda: None if rank else store.finish(photos))
    return read_features(folder, key, [photos.name(i) for i in range(len(photos))])


def _fill(
    store: FeatureStore,
    backbone: Backbone,
    photos: Photos,
    batch_size: int,
    workers: int,
    process: tuple[int, int],
    progress: bool,
) -> None:
    """Compute the missing blocks of ``batch_size`` rows that fall to ``process``, (rank, ranks)."""
    n, key = store.count, store.key
    rank, ranks = process
    photos.open_shards = max(photos.open_shards, 2)
    with tqdm(
        total=store.total, desc="features", unit="photo", disable=not progress or rank > 0
    ) as bar:
        for view in range(key["views"]):
            images = TrainImages(
                photos, backbone.preprocessing, key["seed"] or 0, view > 0, key["max_pixels"]
            )
            blocks = store.missing(view, batch_size)
            bar.update(n - sum(map(len, blocks)))
            mine = share_of(blocks, rank, ranks)
            keys = [[(view, i) for i in block] for block in mine]
            with contextlib.closing(load_batches(images, keys, workers)) as batches:
                for block, (batch, unreadable) in zip(mine, batches, strict=True):
                    lost = {i for i, _ in unreadable}
                    states = np.array([UNREADABLE if i in lost else STORED for i in block])
                    maps = _block_tokens(backbone, batch, states == STORED, batch_size)
                    _check_numbers(maps, states == STORED, store.dtype, photos, block.start)
                    store.put(view * n + block.start, states.astype(np.uint8), maps)
                    bar.update(min(len(block) * ranks, store.total - bar.n))


@torch.inference_mode()
def _block_tokens(
    backbone: Backbone, batch: Tensor | None, readable: NDArray[np.bool_], batch_size: int
) -> list[Tensor]:
    """Tokens of every tap and the prefix tokens of a block, with grey in place of unreadable photos.

    The pass always has ``batch_size`` photos, since the last bits may depend on its shape.
    """
    size = backbone.preprocessing.input_size
    images = torch.full((batch_size, len(backbone.preprocessing.mean), *size), 0.5, device="cpu")
    if batch is not None:
        images[torch.from_numpy(np.flatnonzero(readable))] = batch
    try:
        taps = backbone(images.to(backbone.device, next(backbone.parameters()).dtype))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"batch_size: out of memory with {batch_size} photos a pass; cache with fewer"
        ) from error
    grid = taps.maps[-1].shape[2:]
    patches = [
        (m if m.shape[2:] == grid else F.adaptive_avg_pool2d(m, tuple(grid)))
        .flatten(2)
        .transpose(1, 2)
        for m in taps.maps
    ]
    prefix = patches[-1].new_empty(batch_size, 0, 0) if taps.prefix is None else taps.prefix
    return [m[: len(readable)] for m in (*patches, prefix)]


def _check_numbers(
    maps: Sequence[Tensor],
    readable: NDArray[np.bool_],
    dtype: np.dtype[Any],
    photos: Photos,
    start: int,
) -> None:
    """Raise a ValueError that names the photo whose numbers the file cannot hold."""
    limit = float(np.finfo(dtype).max)
    for values in maps:
        if not values.numel():
            continue
        wide = values.flatten(1).float()
        good = (wide.abs() <= limit).all(1).cpu().numpy() | ~readable  # NaN is not good
        if not good.all():
            name = photos.name(start + int(np.flatnonzero(~good)[0]))
            raise ValueError(
                f"features: those of {name} are not finite in {dtype.name}; use dtype='float32' "
                f"and check the backbone's weights"
            )
