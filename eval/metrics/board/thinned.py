"""Thinned fidelity: the score lost without some of the top pixels, minus the score lost without some of
the lowest.

    mean_{s, draws} [s_k(x without thin(lowest s)) - s_k(x without thin(highest s))]

thin(A) is a random share min(alpha, beta / s) of the pixels of A, where A covers the share s of the photo.
So few pixels are removed that photos stay close to the training photos, and the holes do not have the shape
of the map. Zheng et al. 2025, arXiv 2410.02970, fine-tune the network on photos that lack a random share
beta. Here, the network is used without fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from xattn.eval.fills import fill
from xattn.eval.metrics.base import (
    Column,
    Finish,
    MetricGroup,
    MetricInfo,
    MetricInputs,
    Request,
    Sample,
)
from xattn.eval.metrics.board.correlation import TableMetric
from xattn.eval.metrics.board.table import log_odds_of
from xattn.eval.metrics.curves import check_count, is_constant
from xattn.eval.metrics.mean_metric import MeanMetric


def thinned_share(share: float, alpha: float = 0.5, beta: float = 0.1) -> float:
    """Return the fraction of pixels to remove from a set that covers ``share`` of the photo.

    >>> [round(thinned_share(s), 2) for s in (0.1, 0.2, 0.5, 1.0)]
    [0.5, 0.5, 0.2, 0.1]
    """
    return min(alpha, beta / share)


def thinned_values(lowest: Tensor, highest: Tensor) -> Tensor:
    """Compute the mean score without the ``lowest`` pixels minus the mean score without the ``highest``,
    (B, T) each -> (B,)."""
    if lowest.ndim != 2 or lowest.shape != highest.shape:
        raise ValueError(
            f"lowest, highest: got {tuple(lowest.shape)} and {tuple(highest.shape)}; give two of (B, T)"
        )
    return (lowest.double() - highest.double()).mean(1)


@dataclass(frozen=True)
class ThinnedMetric(TableMetric):
    """Thinned fidelity. By default, it uses three sizes with four draws each, which takes 24 passes per
    map.

    Args:
        shares: s, fractions of the photo.
        draws: the number of draws for each size. All methods share the random numbers.
        alpha: the largest fraction of a set to remove.
        beta: the largest fraction of the photo to remove.
    """

    drops: ClassVar[bool] = False
    shares: tuple[float, ...] = (0.1, 0.3, 0.5)
    draws: int = 4
    alpha: float = 0.5
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("draws", self.draws)
        for name, values in {"shares": self.shares, "alpha, beta": (self.alpha, self.beta)}.items():
            if not values or not all(0 < value <= 1 for value in values):
                raise ValueError(f"{name}: got {values}; give fractions in (0, 1]")

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        flat = sample.raw.flatten()
        if is_constant(flat):
            return lambda scores: {self.columns[0]: math.nan}
        order = flat.argsort(descending=True, stable=True)
        generator = torch.Generator().manual_seed(sample.seed)
        every = torch.ones_like(sample.image[:1], dtype=torch.bool)
        behind = fill(sample.image, every, self.fill, mean=self.mean)
        for share in self.shares:
            size = max(1, round(share * len(flat)))
            gone = max(1, round(thinned_share(share, self.alpha, self.beta) * size))
            for _ in range(self.draws):
                luck = torch.rand(len(flat), generator=generator, device="cpu").to(flat.device)
                for key, part in (("lowest", order[-size:]), ("highest", order[:size])):
                    removed = torch.zeros_like(every)
                    removed.view(-1)[part[luck[part].argsort()[:gone]]] = True
                    yield Request(key, torch.where(removed, behind, sample.image), shared=False)

        def finish(scores: Mapping[str, Tensor]) -> dict[Column, float]:
            kind = sample.outcomes.scorer.score
            lowest, highest = (
                log_odds_of(scores[key], kind)[None] for key in ("lowest", "highest")
            )
            return {self.columns[0]: float(thinned_values(lowest, highest))}

        return finish


class Thinned(MeanMetric):
    """Mean thinned fidelity. ``update(lowest, highest, valid=None)`` takes (B, T) each."""

    metric = "thinned"
    higher_is_better = True
    values = thinned_values


GROUP = MetricGroup.single(
    ThinnedMetric,
    "thinned",
    MetricInfo(
        "log-odds lost without a random part of the highest pixels, minus the same for the lowest",
        True,
        -math.inf,
        math.inf,
        reads=MetricInputs("class", "thresholds of the map", "mean"),
        chance=0,
    ),
    "Thinned fidelity",
    "How much more the class loses without some of the most important pixels than of the least",
    classes=(Thinned,),
    cases=({"draws": 2, "fill": "black"},),
    by_name=True,
)
