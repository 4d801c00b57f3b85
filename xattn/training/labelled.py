"""Labelled photos for training a probe: splits, batches of cached features, and scores of a head's
predictions."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.config import ProbeConfig
from xattn.heads import AttentiveHead, Tokens
from xattn.photos.images import read_ahead
from xattn.photos.labels import Labels
from xattn.runtime.distributed import gather
from xattn.training.features import Features
from xattn.training.processes import Share

FOLDS = 5


class Split(NamedTuple):
    """The indices of the photos for training, for early stopping, and for reporting."""

    train: list[int]
    validation: list[int]
    test: list[int]


def stratified_folds(groups: Sequence[str], folds: int = FOLDS, seed: int = 0) -> list[list[int]]:
    """Divide photo numbers into ``folds`` parts so that each group is spread evenly over all parts."""
    rng = random.Random(seed)
    parts: list[list[int]] = [[] for _ in range(folds)]
    dealt = 0
    for name in sorted(set(groups)):
        members = [i for i, group in enumerate(groups) if group == name]
        rng.shuffle(members)
        for i in members:
            parts[dealt % folds].append(i)
            dealt += 1
    return [sorted(part) for part in parts]


def split(labels: Labels, seed: int = 0, fold: int = 0, folds: int = FOLDS) -> Split:
    """Split labelled photos: fold ``fold`` is used for reporting, the next one for early stopping, and the
    others for training.

    Raises:
        ValueError: a class is too small to be in all three parts.
    """
    if not 0 <= fold < folds or folds < 3:
        raise ValueError(f"fold: got {fold} of {folds}; give 0..{folds - 1}, with at least 3 folds")
    classes = [labels.names[labels.index[i]] for i in labels.used]
    small = [f"{name!r} ({count})" for name, count in Counter(classes).items() if count < 3]
    if small:
        raise ValueError(
            f"labels: {len(small)} classes have fewer than 3 photos, such as {small[0]}, but "
            "each class has to be in the training, validation and test parts; give coarser "
            "labels or more photos"
        )
    parts = [[labels.used[i] for i in p] for p in stratified_folds(classes, folds, seed)]
    held = {fold, (fold + 1) % folds}
    train = sorted(i for k, part in enumerate(parts) if k not in held for i in part)
    return Split(train, parts[(fold + 1) % folds], parts[fold])


def check_labels(labels: Tensor, index: Sequence[int], classes: int, part: str) -> Tensor:
    """Return ``labels[index]`` after checking it; errors name the ``part`` of the photos.

    Raises:
        ValueError: a label is missing or not in 0..classes - 1, there is no photo, or all training photos
            have the same class.
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels: got {labels.dtype} of shape {tuple(labels.shape)}; give a LongTensor (n,)"
        )
    numbers = torch.as_tensor(list(index), dtype=torch.long, device="cpu")
    if not len(numbers):
        raise ValueError(f"{part}: got no photo; give at least one")
    if int(numbers.min()) < 0 or int(numbers.max()) >= len(labels):
        raise ValueError(
            f"{part}: got photo {int(numbers.max())}, but there are only {len(labels)} labels"
        )
    chosen = labels[numbers].long()
    bad = (chosen < 0) | (chosen >= classes)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"labels: photo {int(numbers[at])} of {part} has {int(chosen[at])}, but the head has the "
            f"classes 0..{classes - 1}; leave out photos without a label, or create the head with "
            f"more classes"
        )
    if part == "train" and len(chosen.unique()) < 2:
        raise ValueError(
            f"labels: all training photos have the class {int(chosen[0])}; give two classes or more"
        )
    return chosen


# ---------------------------------------------------------------------- batches of features


Chunk = tuple[list[int], list[int]]  # positions of photos, and the view of each
READ_AHEAD = 2  # batches


@dataclass(frozen=True, eq=False)
class LabelledPhotos:
    """The indices of photos in the features, and their classes, a LongTensor (n,)."""

    index: list[int]
    labels: Tensor

    @property
    def digest(self) -> str:
        """SHA-256 of the indices and classes."""
        return hashlib.sha256(repr((self.index, self.labels.tolist())).encode()).hexdigest()


class FeatureBatch(NamedTuple):
    """One process's share of a batch: tokens and classes (B,)."""

    tokens: Tokens
    target: Tensor
    share: Share


class FeatureBatches:
    """All batches of a run, ``per_epoch`` in each epoch, in the form that ``head`` reads.

    Raises:
        ValueError: there are too few photos, see :func:`chunks`.
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
        """Yield the batches of ``epoch``, starting with number ``first``; a thread reads ahead."""
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
    """Return the positions and views of the batches of an epoch, as a function of ``seed`` and ``epoch``.

    Batch sizes differ by at most one photo. A batch has at most ``size`` x ``ranks`` photos, but at least
    2, which BatchNorm needs, and at least one per process.

    Raises:
        ValueError: there are too few photos.
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


# ---------------------------------------------------------------------- scores


BINS = 15


@dataclass(frozen=True, eq=False)
class ProbeScores:
    """A head's predictions: ``logits`` (n, K) float32 and the ``labels`` (n,), on the CPU."""

    logits: Tensor
    labels: Tensor

    @property
    def correct(self) -> Tensor:
        """(n,) bool: whether the most probable class is the label."""
        return self.logits.argmax(1) == self.labels

    @property
    def accuracy(self) -> float:
        """Share of correct predictions, in [0, 1]."""
        return float(self.correct.double().mean())

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(F.cross_entropy(self.logits.double(), self.labels))

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1]: |accuracy - confidence| of the most probable class in 15
        bins of equal width, averaged with the number of photos as weights (arXiv 1706.04599)."""
        from torchmetrics.functional.classification import multiclass_calibration_error

        probabilities = self.logits.softmax(1)
        return float(
            multiclass_calibration_error(
                probabilities, self.labels, probabilities.shape[1], n_bins=BINS, norm="l1"
            )
        )


def predict_logits(
    head: AttentiveHead, features: Features, index: Sequence[int], batch_size: int = 256
) -> Tensor:
    """Compute the logits (n, K) of the photos ``index``, float32 on the CPU, in eval mode.

    In a group of processes, each computes its share, and all of them get the complete result.
    """
    check_features(head, features)
    ranks = len(shares := gather(None))
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    share = -(-len(index) // len(shares))
    mine = list(index)[rank * share : (rank + 1) * share]
    training = head.training
    head.eval()
    parts = []
    try:
        with torch.no_grad():
            for start in range(0, len(mine), batch_size):
                taps = features.taps(mine[start : start + batch_size])
                tokens = to_head(head, head.tokens(taps))
                parts.append(head.predict(head.attend(tokens)).float().cpu())
    finally:
        head.train(training)
    own = torch.cat(parts) if parts else torch.zeros(0, head.num_classes, device="cpu")
    return torch.cat(gather(own))


def check_features(head: AttentiveHead, features: Features) -> None:
    """Raise a ``ValueError`` unless ``features`` come from the backbone and taps that ``head`` reads."""
    theirs = features.key["backbone"]["sha256"], features.key["taps"]
    own = head.backbone_fingerprint, head.backbone_taps
    if theirs != own:
        raise ValueError(
            f"features: {features.folder} (key {features.digest}) come from weights sha256 "
            f"{theirs[0]} and the taps {theirs[1]}, but the head {head.name!r} reads {own[0]} and "
            f"{own[1]}; cache the features of the head's backbone"
        )


def to_head(head: AttentiveHead, tokens: Tokens) -> Tokens:
    """Move ``tokens`` to the device and dtype of ``head``."""
    weight = head.classifier.weight
    patches = tuple(p.to(weight.device, weight.dtype) for p in tokens.patches)
    return Tokens(patches, tokens.prefix.to(weight.device, weight.dtype), tokens.grid)
