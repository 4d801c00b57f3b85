"""``cache_outcomes``: what a network answers for masked photos, computed once and read from disk.

The key of a table is the SHA-256 of what its numbers depend on: the network, the photos and the masks. So
heads and runs share a table. A run that was killed goes on with the missing rows, and gives the bits that
an uninterrupted one gives, in one process or several. The files are described in
:mod:`~xattn.training.outcome_table`.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from xattn.backbone import Backbone
from xattn.config import TrainConfig
from xattn.photos.base import Data, Photos
from xattn.photos.images import MAX_PIXELS
from xattn.photos.sources import open_photos
from xattn.runtime.distributed import gather, peers, processes, together
from xattn.training.data import TrainImages, load_batches
from xattn.training.outcome_masks import FILLS, KINDS
from xattn.training.outcome_rows import (
    Guide,
    HeadGuide,
    MaskSettings,
    OutcomeCost,
    Precision,
    RowMaker,
    guess_name,
    time_row,
)
from xattn.training.outcome_table import (
    TABLE,
    OutcomeBatch,
    Outcomes,
    file_records,
    open_outcomes,
    read_outcomes,
)
from xattn.training.row_files import MISSING, STORED, UNREADABLE, RowFile
from xattn.training.row_store import RowStore, claimed, is_key, share_of

__all__ = [
    "Guide",
    "HeadGuide",
    "OutcomeBatch",
    "OutcomeCost",
    "Outcomes",
    "cache_outcomes",
    "open_outcomes",
    "outcome_cost",
    "outcome_key",
]

FEW = 20  # photos; with fewer a head learns little


def outcome_key(
    backbone: Backbone,
    photos: Photos,
    settings: MaskSettings,
    max_pixels: int = MAX_PIXELS,
    guide: Guide | None = None,
) -> dict[str, Any]:
    """Everything that the numbers of a table depend on."""
    return {
        "format": TABLE.version,
        "backbone": {"name": backbone.name, "sha256": backbone.fingerprint},
        "task": backbone.task,
        "preprocessing": json.loads(json.dumps(asdict(backbone.preprocessing))),
        "photos": photos.describe(),
        "max_pixels": max_pixels,
        "crops": settings.crops,
        "masks": settings.masks,
        "kinds": list(settings.kinds),
        "fills": list(settings.fills),
        "seed": settings.seed,
        "precision": settings.precision,
        "guide": guess_name(backbone, guide, settings.kinds),
    }


def cache_outcomes(
    backbone: Backbone,
    data: Data,
    folder: str | Path,
    *,
    crops: int = 1,
    masks: int = 16,
    kinds: Sequence[str] = KINDS,
    fills: Sequence[str] = FILLS,
    seed: int = 0,
    precision: Precision = "no",
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    progress: bool = True,
    say: Callable[[str], object] | None = None,
    guide: Guide | None = None,
) -> Outcomes:
    """The outcomes of masks on ``data``; rows that are not in ``folder`` yet are computed into it.

    Args:
        data: see :func:`xattn.photos.sources.open_photos`.
        crops: of every photo. The first is the evaluation crop, further ones are random crops and flips,
            pure functions of (seed, crop, index).
        masks: of every crop, half of them the complements of the others.
        kinds, fills: see :func:`~xattn.training.outcome_masks.mask_pairs`.
        seed: masks are a pure function of (seed, crop, index).
        precision: ``"bf16"`` computes the passes in mixed precision.
        say: is handed one line on what the missing rows cost, before they are computed.
        guide: the first guess that ``"evidence"`` masks come from, see
            :class:`~xattn.training.outcome_rows.Guide`. By default it is the row of the most probable class
            in the classifier, applied to the last tap, or the norm of the last tap where they do not fit.

    Photos that cannot be read are left out and listed. Of several processes each computes its share. Every
    row is compared with its checksum; those that are not as they were written are named in a warning and
    computed again, and a damaged index is written again.

    Raises:
        ValueError: ``folder`` holds a table with another key (both are named) or is in use; no photo can
            be read; logits that float16 cannot hold.
        OSError: ``folder`` cannot be written, or the disk has no room.
        MemoryError: the masked images of one photo do not fit.
    """
    settings = MaskSettings(crops, masks, kinds, fills, seed, precision)
    backbone.require_classes()
    if backbone.task == "regression":
        raise ValueError(
            f"backbone: {backbone.name} gives numbers, a table of outcomes has probabilities; load a "
            f"classifier"
        )
    folder, photos = Path(folder), open_photos(data)
    ranks, rank = processes(backbone.device)
    key = outcome_key(backbone, photos, settings, max_pixels, guide)
    names = [photos.name(i) for i in range(len(photos))]
    with peers("start all of them again to go on"):
        found = _as_it_is(folder, key, names)
        if not all(gather(found is not None)):
            with claimed(folder, key, TABLE, rank):
                maker = RowMaker(backbone, settings, guide)
                store = together(lambda: _Store(folder, key, maker.layout, photos))
                if rank == 0:
                    _warn_of_damage(store, photos)
                together(lambda: None if rank else _announce(store, maker, ranks, say))
                show = progress and rank == 0
                together(lambda: _fill(store, maker, photos, workers, (rank, ranks), show))
                together(lambda: None if rank else store.finish(photos, backbone.num_classes))
            found = together(lambda: read_outcomes(folder, key, names))
    assert found is not None
    if len(found) < FEW and rank == 0:
        warnings.warn(
            f"table: {len(found)} photos could be read; a head needs {FEW} or more to learn from",
            stacklevel=2,
        )
    return found


def outcomes_to_train_on(
    backbone: Backbone,
    data: Data,
    folder: str | Path,
    config: TrainConfig,
    *,
    progress: bool = True,
    say: Callable[[str], object] | None = None,
) -> Outcomes:
    """The table that training with ``config`` reads, see :func:`cache_outcomes`."""
    return cache_outcomes(
        backbone,
        data,
        folder,
        crops=config.crops,
        masks=config.masks,
        seed=config.seed,
        workers=config.workers,
        max_pixels=config.max_pixels,
        precision="bf16" if config.precision == "bf16" else "no",
        progress=progress,
        say=say,
    )


def outcome_cost(
    backbone: Backbone,
    photos: Data | int,
    *,
    crops: int = 1,
    masks: int = 16,
    kinds: Sequence[str] = KINDS,
    fills: Sequence[str] = FILLS,
    precision: Precision = "no",
) -> OutcomeCost:
    """What a new table of ``photos`` (or of so many) costs; the time of one row is measured."""
    maker = RowMaker(backbone, MaskSettings(crops, masks, kinds, fills, precision=precision))
    count = photos if isinstance(photos, int) else len(open_photos(photos))
    return _cost(maker, count, count * crops, 1)


def _cost(maker: RowMaker, photos: int, rows: int, ranks: int) -> OutcomeCost:
    settings, row_bytes = maker.settings, sum(file.bytes for file in maker.layout.values())
    seconds = rows * time_row(maker) / ranks
    return OutcomeCost(photos, settings.crops, settings.masks, rows, row_bytes, seconds)


def _as_it_is(folder: Path, key: dict[str, Any], names: list[str]) -> Outcomes | None:
    """The table, if it is whole and has this key; this writes nothing, so many runs may read one table."""
    try:
        return read_outcomes(folder, key, names) if is_key(folder, key) else None
    except ValueError:
        return None


# ---------------------------------------------------------------------- computing what is missing


class _Store(RowStore):
    """The files of a table while it is filled."""

    def __init__(
        self, folder: Path, key: dict[str, Any], layout: dict[str, RowFile], photos: Photos
    ) -> None:
        super().__init__(folder, key, TABLE, layout, len(photos), key["crops"])

    def finish(self, photos: Photos, classes: int) -> None:
        """Write the index, which makes the folder a whole table."""
        about = {"files": file_records(self.files, self.total), "classes": classes}
        self.finish_rows(photos, about, "could not be read when the table was computed")


def _warn_of_damage(store: _Store, photos: Photos) -> None:
    """One warning of all rows that are not as they were written, or of what else is not."""
    named = [f"{photos.name(r % store.count)} (crop {r // store.count})" for r in store.damaged]
    if named:
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        count = "1 row is" if len(named) == 1 else f"{len(named)} rows are"
        warnings.warn(
            f"table: {count} not as written in {store.folder}: {', '.join(named[:3])}{more}; computed "
            f"again",
            stacklevel=3,
        )
    elif (store.folder / TABLE.index).exists() and not (store.rows == MISSING).any():
        warnings.warn(
            f"table: {store.folder} was damaged, but its rows are as written; its index is written again",
            stacklevel=3,
        )


def _announce(
    store: _Store, maker: RowMaker, ranks: int, say: Callable[[str], object] | None
) -> None:
    missing = int((store.rows == MISSING).sum())
    if missing and say is not None:
        say(str(_cost(maker, store.count, missing, ranks)))


def _fill(
    store: _Store,
    maker: RowMaker,
    photos: Photos,
    workers: int,
    process: tuple[int, int],
    progress: bool,
) -> None:
    """Compute the missing rows that fall to ``process``, (rank, ranks)."""
    seed, (rank, ranks) = maker.settings.seed, process
    preprocessing, pixels = maker.backbone.preprocessing, store.key["max_pixels"]
    photos.open_shards = max(photos.open_shards, 2)
    with tqdm(total=store.total, desc="outcomes", unit="photo", disable=not progress) as bar:
        for crop in range(maker.settings.crops):
            images = TrainImages(photos, preprocessing, seed, crop > 0, pixels)
            missing = [block.start for block in store.missing(crop, 1)]
            bar.update(store.count - len(missing))
            mine = share_of(missing, rank, ranks)
            keys = [[(crop, photo)] for photo in mine]
            with contextlib.closing(load_batches(images, keys, workers)) as batches:
                for photo, (image, _) in zip(mine, batches, strict=True):
                    if image is None:
                        state, numbers = UNREADABLE, maker.empty()
                    else:
                        state, name = STORED, photos.name(photo)
                        numbers = maker(image[0], f"{seed}/{crop}/{photo}", name)
                    states = np.array([state], np.uint8)
                    store.put_rows(crop * store.count + photo, states, numbers)
                    bar.update(min(ranks, store.total - bar.n))
