"""Training images whose augmentation is a pure function of (seed, epoch, index).

The global random state is never used, so a resumed run sees the same pixels as an uninterrupted one,
with or without loader workers.
"""

from __future__ import annotations

import contextlib
import math
import random
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from xattn.backbone import Preprocessing
from xattn.config import DistillConfig, TrainConfig
from xattn.photos.base import Data, Photos
from xattn.photos.clip import FALLBACK_FPS
from xattn.photos.preprocessing import ClipPreprocessing
from xattn.photos.sources import open_photos
from xattn.photos.view import prepare
from xattn.photos.whole_clips import read_clip
from xattn.runtime.process import keep_memory
from xattn.runtime.stores import StoreError
from xattn.training.processes import Share
from xattn.training.run_folder import first_workers

Key = tuple[int, int]
Sample = tuple[int, Tensor | None, str]
Batch = tuple[Tensor | None, list[tuple[int, str]]]

RESTARTS = 3


class TrainImages(Dataset[Sample]):
    """Photos as (3, H, W), or clips as (3, T, H, W), tensors in [0, 1]; item ``(epoch, index)`` is (index,
    image or None, error).

    With ``augment``, the shorter side is resized to input / crop_pct, followed by a random crop and a
    flip (T-TAME's recipe), the same for all frames of a clip; without it, photos get the model's own
    evaluation transform, and frames of clips are resized as a whole. For a photo that
    cannot be read, the image is None and the error is the reason.
    """

    def __init__(
        self,
        photos: Data,
        preprocessing: Preprocessing,
        seed: int,
        augment: bool = True,
        max_pixels: int = 40_000_000,
    ) -> None:
        self.photos = open_photos(photos)
        self.preprocessing = preprocessing
        self.seed = seed
        self.augment = augment
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, key: Key) -> Sample:  # type: ignore[override]
        epoch, index = key
        try:
            if isinstance(self.preprocessing, ClipPreprocessing):
                return index, self._clip(epoch, index), ""
            photo = self.photos.load(index, self.max_pixels)
            if not self.augment:
                return index, prepare(photo, self.preprocessing)[0], ""
            return index, self._augmented(photo, epoch, index), ""
        except StoreError:
            raise
        except (ValueError, OSError) as error:
            return index, None, str(error)

    def _clip(self, epoch: int, index: int) -> Tensor:
        reads = self.preprocessing, "whole", self.max_pixels, FALLBACK_FPS
        clip = read_clip(self.photos.source(index), *reads)
        if not self.augment:
            return clip.pixels
        return torch.stack([self._augmented(one, epoch, index) for one in clip.frames.photos], 1)

    def _augmented(self, photo: Image.Image, epoch: int, index: int) -> Tensor:
        height, width = self.preprocessing.input_size
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        scale = max(
            math.ceil(width / self.preprocessing.crop_pct) / photo.width,
            math.ceil(height / self.preprocessing.crop_pct) / photo.height,
        )
        # The crop in pixels of the photo, so that only the crop is resized.
        crop_w, crop_h = width / scale, height / scale
        left = rng.random() * max(photo.width - crop_w, 0)
        top = rng.random() * max(photo.height - crop_h, 0)
        box = (left, top, min(left + crop_w, photo.width), min(top + crop_h, photo.height))
        crop = photo.resize((width, height), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(crop, dtype=np.float32).transpose(2, 0, 1) / 255.0
        if rng.random() < 0.5:
            pixels = pixels[:, :, ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels))


def epoch_batches(
    photos: Photos,
    batch_size: int,
    seed: int,
    epoch: int,
    first: int = 0,
    rank: int = 0,
    ranks: int = 1,
    streams: int = 1,
) -> list[list[Key]]:
    """Return the keys of the batches of ``epoch``, starting at step ``first``, for process ``rank`` of
    ``ranks``.

    All processes take the same number of steps; the last batch of some processes may be empty. Streamed
    photos are divided into ``streams`` pieces: batch i of a process belongs to piece i % ``streams``, so
    that with ``streams`` loader workers, each worker reads its shards from start to end. All pieces have
    the same length, so two of them may share a shard.
    """
    order = photos.order(seed, epoch)
    steps = steps_per_epoch(len(order), batch_size, ranks)
    if not photos.streamed:
        size = batch_size * ranks
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        return [[(epoch, i) for i in batch[rank::ranks]] for batch in batches[first:]]
    last = len(order) - batch_size * ranks * (steps - 1)
    sizes = [[batch_size] * (steps - 1) + [len(range(r, last, ranks))] for r in range(ranks)]
    start = sum(map(sum, sizes[:rank]))
    at = [start + sum(sum(sizes[rank][s::streams]) for s in range(n)) for n in range(streams)]
    keys = []
    for step, size in enumerate(sizes[rank]):
        begin = at[step % streams]
        at[step % streams] += size
        keys.append([(epoch, i) for i in order[begin : begin + size]])
    return keys[first:]


def steps_per_epoch(count: int, batch_size: int, ranks: int = 1) -> int:
    """Return the number of batches in an epoch of ``count`` images."""
    return math.ceil(count / (batch_size * ranks))


def collate(samples: Sequence[Sample]) -> Batch:
    """Combine samples into the readable images (B, 3, H, W), or None, and (index, reason) for each
    unreadable one."""
    images = [image for _, image, _ in samples if image is not None]
    skipped = [(index, reason) for index, image, reason in samples if image is None]
    return (torch.stack(images) if images else None), skipped


def _start_worker(worker: int) -> None:
    # Ctrl-C reaches the whole process group, but the main process still needs its next batch.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_memory()
    torch.set_num_threads(1)


def loader(
    images: TrainImages, keys: Sequence[list[Key]], workers: int, prefetch: int = 2
) -> DataLoader[Batch]:
    """Create a loader for the batches with the given keys; it draws nothing from the global
    generator."""
    images.photos.close()
    return DataLoader(
        images,  # type: ignore[arg-type]
        batch_sampler=list(keys),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(0),
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=prefetch if workers else None,
        persistent_workers=False,
    )


def load_batches(
    images: TrainImages,
    keys: Sequence[list[Key]],
    workers: int,
    stopped: Callable[[], Any] = lambda: False,
) -> Generator[Batch, None, None]:
    """Yield the batches of ``keys``, even if loader processes die.

    Batches are a function of their keys, so new processes continue from the next batch, with the same
    pixels.

    Raises:
        ChildProcessError: the loader processes died more than :data:`RESTARTS` times at one batch, or died
            once when ``stopped()`` was true.
    """
    done = failures = 0
    with _QuietSigchld() as quiet:
        while done < len(keys):
            try:
                # After a failure no batch is prepared while another waits: this takes less memory, and
                # a process that is killed cannot take a finished batch with it.
                batches = _batches(
                    loader(images, keys[done:], workers, prefetch=1 if failures else 2), quiet
                )
                with contextlib.closing(batches):
                    for batch in batches:
                        yield batch
                        done, failures = done + 1, 0
            except Exception as error:
                if isinstance(error, StoreError) and workers:  # with the worker's traceback as text
                    raise StoreError(_last_line(error).partition("StoreError: ")[2]) from None
                if not workers:
                    raise
                traceback.clear_frames(error.__traceback__)  # else the old loader would survive
                reason = _last_line(error) or type(error).__name__
                if failures >= RESTARTS or stopped():
                    raise ChildProcessError(
                        f"workers: loader processes died {failures + 1} times at the same batch "
                        f"({reason}); free some memory or use fewer workers than {workers}, then "
                        "resume"
                    ) from error
                failures += 1
                warnings.warn(
                    f"workers: a loader process died ({reason}); new processes continue from the "
                    f"same batch, and nothing is lost",
                    stacklevel=2,
                )


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2]


def _batches(loader: DataLoader[Batch], quiet: _QuietSigchld) -> Generator[Batch, None, None]:
    """The batches of one loader; a worker's death becomes an error of the batch that waits for it."""
    batches = iter(loader)
    if loader.num_workers:
        quiet.install()
    try:
        yield from batches
    finally:
        del batches


class _QuietSigchld:
    """Suppresses the errors of torch's SIGCHLD handler, from ``install`` to the end of the block.

    torch also reports a worker's death from that handler, which can interrupt any statement of the main
    thread: an optimizer step could be left half done. Old workers may end late, so the block covers all
        loaders of the run.
    """

    def __enter__(self) -> _QuietSigchld:
        self._handler: Any = None
        return self

    def install(self) -> None:
        """Replace torch's handler, once a loader has set it."""
        handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        main = threading.current_thread() is threading.main_thread()
        if self._handler is None and callable(handler) and main:
            self._handler = handler
            signal.signal(signal.SIGCHLD, self._call)

    def _call(self, number: int, frame: Any) -> None:
        with contextlib.suppress(RuntimeError):
            self._handler(number, frame)

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGCHLD, self._handler)


# ---------------------------------------------------------------------- batches of a run


@dataclass(frozen=True)
class PhotoBatch:
    """One process's share of a batch of ``epoch``.

    ``images`` (B, 3, H, W) are the images that could be read, or None; ``unreadable`` lists (index,
    reason) for all others; ``failure`` is an error that ends the run.
    """

    epoch: int
    images: Tensor | None
    unreadable: list[tuple[int, str]]
    share: Share
    failure: OSError | None = None

    def __len__(self) -> int:
        return 0 if self.images is None else len(self.images)


class PhotoBatches:
    """All batches of a run: ``per_epoch`` in each epoch, ``total`` in all.

    Args:
        rank, ranks: the number of this process, and the number of processes.
        resumed: the folder of a run that is resumed, or None. Shards are divided among as many loader
            workers as the run was started with, to preserve the order.

    Raises:
        ValueError: there are fewer photos than processes.
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
            # With another number of workers than at the start, a worker follows several streams, each
            # of which may be between two shards.
            followed = self.streams // math.gcd(self.streams, max(config.workers, 1))
            photos.open_shards = 1 if followed == 1 else 2 * followed

    def describe(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the original run."""
        streams = {"streams": self.streams} if self.photos.streamed else {}
        return {**self.photos.describe(), **streams}

    def from_step(self, step: int, stopped: Callable[[], int]) -> Generator[PhotoBatch, None, None]:
        """Yield the batches from ``step`` to the end of the last epoch.

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
