"""Splits of labelled photos that keep the classes even, and the check of the labels trained on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xattn.photos.labels import Labels

FOLDS = 5


class Split(NamedTuple):
    """Numbers of the photos to train on, to stop early by, and to report on."""

    train: list[int]
    validation: list[int]
    test: list[int]


def stratified_folds(groups: Sequence[str], folds: int = FOLDS, seed: int = 0) -> list[list[int]]:
    """The numbers of the photos in ``folds`` parts, each group spread evenly over all of them."""
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
    """Report on fold ``fold`` of the labelled photos, stop early by the next, train on the others.

    Raises:
        ValueError: a class is too small to be in all three parts.
    """
    if not 0 <= fold < folds or folds < 3:
        raise ValueError(f"fold: got {fold} of {folds}; give 0..{folds - 1} of at least 3 folds")
    classes = [labels.names[labels.index[i]] for i in labels.used]
    small = [f"{name!r} ({count})" for name, count in Counter(classes).items() if count < 3]
    if small:
        raise ValueError(
            f"labels: {len(small)} classes have fewer than 3 photos, such as {small[0]}; a class has "
            f"to be in the training, validation and test parts: give coarser labels or more photos"
        )
    parts = [[labels.used[i] for i in p] for p in stratified_folds(classes, folds, seed)]
    held = {fold, (fold + 1) % folds}
    train = sorted(i for k, part in enumerate(parts) if k not in held for i in part)
    return Split(train, parts[(fold + 1) % folds], parts[fold])


def check_labels(labels: Tensor, index: Sequence[int], classes: int, part: str) -> Tensor:
    """``labels[index]``, checked; errors name the ``part`` of the photos.

    Raises:
        ValueError: a label is missing or not in 0..classes - 1, there is no photo, or the photos to train
            on all have one class.
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels: got {labels.dtype} of shape {tuple(labels.shape)}; give a LongTensor (n,)"
        )
    numbers = torch.as_tensor(list(index), dtype=torch.long, device="cpu")
    if not len(numbers):
        raise ValueError(f"{part}: got no photo; give some")
    if int(numbers.min()) < 0 or int(numbers.max()) >= len(labels):
        raise ValueError(f"{part}: got photo {int(numbers.max())}, there are {len(labels)} labels")
    chosen = labels[numbers].long()
    bad = (chosen < 0) | (chosen >= classes)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"labels: photo {int(numbers[at])} of {part} has {int(chosen[at])}, the head has the "
            f"classes 0..{classes - 1}; leave out photos without a label, or create the head with "
            f"more classes"
        )
    if part == "train" and len(chosen.unique()) < 2:
        raise ValueError(
            f"labels: all photos of train have the class {int(chosen[0])}; give two classes or more"
        )
    return chosen
