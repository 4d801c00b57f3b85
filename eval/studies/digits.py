"""scikit-learn's 8 x 8 digits, 1,437 for training and 360 for testing; networks train on them in seconds.

The split is stratified, the same for every study.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.record import Call, record
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.small_training import minimize


class Digits(NamedTuple):
    """``images`` (n, 1, 8, 8) in [0, 1] and ``labels`` (n,)."""

    images: Tensor
    labels: Tensor


@cache
def load_digits() -> tuple[Digits, Digits]:
    """The digits for training, and those for testing."""
    try:
        from sklearn.datasets import load_digits as load
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ValueError(
            'digits: scikit-learn, which has them, is not installed; run: pip install "xattn[demo]"'
        ) from None
    found = load()
    parts = train_test_split(
        found.images / 16, found.target, test_size=360, random_state=0, stratify=found.target
    )
    seen, held_out, of_seen, of_held_out = (torch.as_tensor(part) for part in parts)
    return (
        Digits(seen.float()[:, None], of_seen.long()),
        Digits(held_out.float()[:, None], of_held_out.long()),
    )


def pixels_right() -> float:
    """The share of test digits that logistic regression on pixels classifies correctly."""
    split = Split("digits, pixels")
    seen, held_out = load_digits()
    seen, held_out = split.fit(seen), split.score(held_out)
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=5000).fit(seen.images.flatten(1), seen.labels)
    return float(model.score(held_out.images.flatten(1), held_out.labels))


@dataclass(frozen=True)
class Training:
    """Cross-entropy by :func:`~xattn.eval.studies.small_training.minimize`."""

    epochs: int = 20
    lr: float = 3e-3
    weight_decay: float = 0.05
    batch_size: int = 64
    seed: int = 0
    aux: float = 0.0  # Weight of the losses that recorded operators ask for.


def train(
    net: nn.Module,
    settings: Training,
    split: Split,
    extra: Callable[[nn.Module], Tensor] | None = None,
) -> float:
    """Train ``net`` on the digits and return the CPU seconds; ``extra(net)`` is added to each loss."""
    seen = split.fit(load_digits()[0])
    generator = torch.Generator().manual_seed(settings.seed)
    whole = len(seen.labels) - len(seen.labels) % settings.batch_size

    def losses() -> Iterator[Tensor]:
        for _ in range(settings.epochs):
            order = torch.randperm(len(seen.labels), generator=generator)
            for batch in order[:whole].split(settings.batch_size):
                recording: AbstractContextManager[list[Call]] = (
                    record(alone=True) if settings.aux else nullcontext([])
                )
                with recording as calls:
                    logits = net(seen.images[batch])
                loss = F.cross_entropy(logits, seen.labels[batch])
                if settings.aux:
                    loss = loss + settings.aux * sum(sum(call.aux.values()) for call in calls)
                yield loss if extra is None else loss + extra(net)

    steps = settings.epochs * (whole // settings.batch_size)
    return minimize(net, losses(), steps, settings.lr, settings.weight_decay)


@torch.no_grad()
def right(logits: Callable[[Tensor], Tensor], split: Split) -> float:
    """The share of test digits that ``logits``, a function of images, classifies correctly."""
    held_out = split.score(load_digits()[1])
    return float((logits(held_out.images).argmax(1) == held_out.labels).double().mean())
