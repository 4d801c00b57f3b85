"""The batches of photos that a run trains on, from any step on, and one process's share of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from xattn.backbone import Preprocessing
from xattn.config import DistillConfig, TrainConfig
from xattn.photos.base import Photos
from xattn.training.data import TrainImages, epoch_batches, load_batches, steps_per_epoch
from xattn.training.run_folder import first_workers
from xattn.training.whole_batch import Share


@dataclass(frozen=True)
class PhotoBatch:
    """One process's share of a batch of ``epoch``.

    ``images`` (B, 3, H, W) are those that could be read, or None; ``unreadable`` holds (index, reason) of
    the others; ``failure`` is an error that ends the run.
    """

    epoch: int
    images: Tensor | None
    unreadable: list[tuple[int, str]]
    share: Share
    failure: OSError | None = None

    def __len__(self) -> int:
        return 0 if self.images is None else len(self.images)


class PhotoBatches:
    """All batches of a run: ``per_epoch`` in an epoch, ``total`` of them.

    Args:
        rank, ranks: which of how many processes this is.
        resumed: the folder of a run that is resumed, or None. Shards are dealt out among as many loader
            workers as it was started with, or the order would change.

    Raises:
        ValueError: fewer photos than processes.
    """

    def __init__(
        self,
        photos: Photos,
        preprocessing: Preprocessing,
        config: TrainConfig | DistillConfig,
        rank: int,
        ranks: int,
        resumed: Path | None,
    ) -> None:
        if len(photos) < ranks:
            raise ValueError(
                f"data: got {len(photos)} images for {ranks} processes; give more images"
            )
        self.photos, self.config, self.rank, self.ranks = photos, config, rank, ranks
        self.images = TrainImages(
            photos, preprocessing, config.seed, config.augment, config.max_pixels
        )
        self.per_epoch = steps_per_epoch(len(photos), config.batch_size, ranks)
        epochs = config.all_epochs if isinstance(config, DistillConfig) else config.epochs
        self.total = self.per_epoch * epochs
        self.streams = 1
        if photos.streamed:
            self.streams = max(first_workers(resumed, config.workers), 1)
            # With other workers than at the start a worker follows several streams, each of which may
            # be between two shards.
            followed = self.streams // math.gcd(self.streams, max(config.workers, 1))
            photos.open_shards = 1 if followed == 1 else 2 * followed

    def describe(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run it resumes."""
        streams = {"streams": self.streams} if self.photos.streamed else {}
        return {**self.photos.describe(), **streams}

    def from_step(self, step: int, stopped: Callable[[], int]) -> Generator[PhotoBatch, None, None]:
        """The batches from ``step`` on, to the end of the last epoch.

        Loader processes that die are not replaced once ``stopped()`` is true.
        """
        while step < self.total:
            epoch, first = divmod(step, self.per_epoch)
            keys = epoch_batches(
                self.photos,
                self.config.batch_size,
                self.config.seed,
                epoch,
                first,
                self.rank,
                self.ranks,
                self.streams,
            )
            loaded = load_batches(self.images, keys, self.config.workers, stopped)
            with closing(loaded) as batches:
                for own in keys:
                    try:
                        images, unreadable = next(batches)
                    except ChildProcessError as error:
                        yield PhotoBatch(epoch, None, [], Share(), error)
                        continue
                    lost = {index for index, _ in unreadable}
                    rows = [
                        self.rank + self.ranks * i
                        for i, (_, index) in enumerate(own)
                        if index not in lost
                    ]
                    share = Share(rows, self.config.batch_size * self.ranks)
                    yield PhotoBatch(epoch, images, unreadable, share)
            step += len(keys)
