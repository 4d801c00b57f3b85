"""Training images whose augmentation is a pure function of (seed, epoch, index).

Nothing here reads global random state, so a resumed run, with or without loader workers, sees the
very pixels that an undisturbed run sees.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from xattn.allocator import keep_memory
from xattn.backbone import Preprocessing
from xattn.images import list_images, load_image, prepare

Sample = tuple[int, Tensor | None, str]


class TrainImages(Dataset[Sample]):
    """Photos as (3, H, W) tensors in [0, 1]; item ``(epoch, index)`` -> (index, image | None, error).

    With ``augment`` the shorter side is resized to input / crop_pct, then a random crop and a flip
    follow (T-TAME's recipe); otherwise the photo gets the model's own evaluation transform. A file
    that cannot be read yields None and the reason.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        preprocessing: Preprocessing,
        seed: int,
        augment: bool = True,
        max_pixels: int = 40_000_000,
    ) -> None:
        self.paths = list(paths)
        self.preprocessing = preprocessing
        self.seed = seed
        self.augment = augment
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> Sample:  # type: ignore[override]
        epoch, index = key
        try:
            photo = load_image(self.paths[index], self.max_pixels)
            if not self.augment:
                return index, prepare(photo, self.preprocessing)[0], ""
            return index, self._augmented(photo, epoch, index), ""
        except (ValueError, OSError) as error:
            return index, None, str(error)

    def _augmented(self, photo: Image.Image, epoch: int, index: int) -> Tensor:
        height, width = self.preprocessing.input_size
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        scale = max(
            math.ceil(width / self.preprocessing.crop_pct) / photo.width,
            math.ceil(height / self.preprocessing.crop_pct) / photo.height,
        )
        # The crop in photo pixels: cut first, then resize the cut alone.
        crop_w, crop_h = width / scale, height / scale
        left = rng.random() * max(photo.width - crop_w, 0)
        top = rng.random() * max(photo.height - crop_h, 0)
        box = (left, top, min(left + crop_w, photo.width), min(top + crop_h, photo.height))
        crop = photo.resize((width, height), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(crop, dtype=np.float32).transpose(2, 0, 1) / 255.0
        if rng.random() < 0.5:
            pixels = pixels[:, :, ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels))


def find_images(data: str | Path | Sequence[str | Path]) -> list[Path]:
    """A folder, a list file, one image, or a sequence of paths, as a list of files."""
    if isinstance(data, str | Path):
        return list_images(data)
    paths = [Path(p) for p in data]
    if not paths:
        raise ValueError("data: got an empty list of images; give at least one path")
    return paths


def epoch_batches(
    count: int,
    batch_size: int,
    seed: int,
    epoch: int,
    first: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[list[tuple[int, int]]]:
    """Keys of the batches of ``epoch`` from step ``first`` on, for process ``rank`` of ``ranks``.

    All processes take the same number of steps: the last global batch is filled from the epoch's
    start where it would leave a process without images.
    """
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    size = batch_size * ranks
    for start in range(first * size, count, size):
        batch = order[start : start + size]
        if len(batch) < ranks:
            batch += order[: ranks - len(batch)]
        yield [(epoch, i) for i in batch[rank::ranks]]


def steps_per_epoch(count: int, batch_size: int, ranks: int = 1) -> int:
    """Batches in one epoch of ``count`` images."""
    return math.ceil(count / (batch_size * ranks))


def collate(samples: Sequence[Sample]) -> tuple[Tensor | None, list[tuple[int, str]]]:
    """Readable images (B, 3, H, W), or None, and (index, reason) of the others."""
    images = [image for _, image, _ in samples if image is not None]
    skipped = [(index, reason) for index, image, reason in samples if image is None]
    return (torch.stack(images) if images else None), skipped


def _start_worker(worker: int) -> None:
    keep_memory()
    torch.set_num_threads(1)


def loader(
    images: TrainImages, batches: Iterator[list[tuple[int, int]]], workers: int
) -> DataLoader[tuple[Tensor | None, list[tuple[int, str]]]]:
    """A loader over ``batches`` of keys; it draws nothing from the global generator."""
    return DataLoader(
        images,  # type: ignore[arg-type]
        batch_sampler=list(batches),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(0),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
    )
