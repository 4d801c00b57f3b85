"""Heads trained on outcomes with random labels, which a sound head has to beat.

Of a table of masked outcomes the masks and the photos stay, but photo i is trained with what belongs to
photo p(i), p a random cycle through all photos:

    classes     the outcomes are its own, the names of its classes are p(i)'s, rank by rank
    outcomes    the outcomes are those of p(i), which was seen under other masks

A head that is as faithful after the first does not tell classes apart; after the second nothing is left to
learn but where photos have their objects. After Adebayo et al. 2018 (arXiv 1810.03292), section 4.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from xattn.training.outcome_table import OutcomeBatch, Outcomes

Labels = Literal["classes", "outcomes"]


@dataclass(frozen=True, eq=False)
class RandomOutcomes(Outcomes):
    """A table whose batches have random ``labels``; what is random is a pure function of ``seed``."""

    labels: Labels = "classes"
    seed: int = 0

    @classmethod
    def of(cls, table: Outcomes, labels: Labels, seed: int = 0) -> RandomOutcomes:
        """``table`` with random labels, under a key of its own.

        Raises:
            ValueError: unknown ``labels``, or a table of one photo.
        """
        if labels not in ("classes", "outcomes"):
            raise ValueError(f"labels: got {labels!r}; choose 'classes' or 'outcomes'")
        if len(table) < 2:
            raise ValueError(
                "table: got one photo; random labels are those of another, give two or more"
            )
        own = {field.name: getattr(table, field.name) for field in fields(Outcomes)}
        own["key"] = {**table.key, "random": [labels, seed]}
        return cls(**own, labels=labels, seed=seed)

    def batch(self, index: Sequence[int] | Tensor, crop: int | Tensor = 0) -> OutcomeBatch:
        """As :meth:`Outcomes.batch`, with labels of other photos."""
        partner = cycle(len(self), self.seed)[np.asarray(index, dtype=np.int64)]
        own, other = super().batch(index, crop), super().batch(partner.tolist(), crop)
        if self.labels == "outcomes":
            return replace(own, logits=other.logits, classes=other.classes, rest=other.rest)
        return renamed(own, other)


def renamed(own: OutcomeBatch, other: OutcomeBatch) -> OutcomeBatch:
    """``own`` with its most probable class called as that of ``other``, and so on to the least probable."""
    mine, theirs = (
        batch.logits[:, 0].argsort(dim=1, descending=True, stable=True) for batch in (own, other)
    )
    if own.classes is not None and other.classes is not None:
        names = other.classes.gather(1, theirs)
        return replace(own, classes=torch.empty_like(names).scatter_(1, mine, names))
    mine, theirs = (order[:, None].expand_as(own.logits) for order in (mine, theirs))
    logits = torch.empty_like(own.logits).scatter_(2, theirs, own.logits.gather(2, mine))
    return replace(own, logits=logits)


def cycle(count: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """A partner for each of ``count`` photos, none its own: one random cycle through all, (count,)."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    partner = np.empty(count, dtype=np.int64)
    partner[order] = np.roll(order, -1)
    return partner
