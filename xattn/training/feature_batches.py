"""The batches of cached features that a probe trains on, and one process's share of each."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Generator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from xattn.config import ProbeConfig
from xattn.heads import AttentiveHead, Tokens
from xattn.photos.images import read_ahead
from xattn.training.features import Features
from xattn.training.whole_batch import Share

Chunk = tuple[list[int], list[int]]  # positions of photos, and the view of each
READ_AHEAD = 2  # batches


@dataclass(frozen=True, eq=False)
class LabelledPhotos:
    """Numbers of photos in the features, and their classes, a LongTensor (n,)."""

    index: list[int]
    labels: Tensor

    @property
    def digest(self) -> str:
        """SHA-256 of both."""
        return hashlib.sha256(repr((self.index, self.labels.tolist())).encode()).hexdigest()


class FeatureBatch(NamedTuple):
    """One process's share of a batch: tokens and classes (B,)."""

    tokens: Tokens
    target: Tensor
    share: Share


class FeatureBatches:
    """All batches of a run, ``per_epoch`` in an epoch, as ``head`` reads them.

    Raises:
        ValueError: too few photos, see :func:`chunks`.
    """

    def __init__(
        self,
        head: AttentiveHead,
        features: Features,
        photos: LabelledPhotos,
        config: ProbeConfig,
        rank: int,
        ranks: int,
    ) -> None:
        self.head, self.features, self.photos = head, features, photos
        self.rank, self.ranks = rank, ranks
        self.plan = (len(photos.index), features.views, config.batch_size, ranks, config.seed)
        self.per_epoch = len(chunks(*self.plan, 0))

    def of_epoch(self, epoch: int, first: int = 0) -> Generator[Future[FeatureBatch], None, None]:
        """The batches of ``epoch`` from the one numbered ``first`` on; a thread reads ahead."""
        ahead = read_ahead(self._read, chunks(*self.plan, epoch)[first:], READ_AHEAD, threads=1)
        with closing(ahead) as batches:  # type: ignore[type-var]
            for _, batch in batches:
                yield batch

    def _read(self, chunk: Chunk) -> FeatureBatch:
        positions, views = (numbers[self.rank :: self.ranks] for numbers in chunk)
        index = [self.photos.index[i] for i in positions]
        taps = self.features.taps(index, torch.tensor(views, device="cpu"))
        share = Share(range(self.rank, len(chunk[0]), self.ranks), len(chunk[0]))
        return FeatureBatch(self.head.tokens(taps), self.photos.labels[positions], share)


def chunks(count: int, views: int, size: int, ranks: int, seed: int, epoch: int) -> list[Chunk]:
    """Positions and views of the batches of an epoch, a function of ``seed`` and ``epoch``.

    Batches differ by at most one photo. They hold at most ``size`` x ``ranks``, unless that is fewer than
    the 2 photos that BatchNorm needs, or than one for each process.

    Raises:
        ValueError: there are not that many photos.
    """
    least = max(2, ranks)
    if count < least:
        raise ValueError(f"train: got {count} photos for {ranks} processes; give {least} or more")
    steps = min(math.ceil(count / (size * ranks)), count // least)
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(count))
    rng.shuffle(order)
    seen = [rng.randrange(views) if views > 1 else 0 for _ in order]
    ends = [count * i // steps for i in range(steps + 1)]
    return [(order[a:b], seen[a:b]) for a, b in pairwise(ends)]
