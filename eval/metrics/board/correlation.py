"""Base classes of metrics on a table of outcomes: correlate a map's sums with the drops of the score.

    mean over lists of r_I(sum_{u in I} phi(u), s_k(x) - s_k(x without I))

r is Pearson's or Spearman's correlation over the masks I of a list. If the masks of a list differ in area,
for example because cells do not divide the photo evenly, sums and drops are divided by the area. A constant
map therefore earns nothing, and the area that a map covers does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from xattn.backbone import Backbone
from xattn.backbone.dropped import droppable_grid
from xattn.correlation import pearson, spearman
from xattn.eval.metrics.base import Column, Finish, PerturbationMetric, Request, Sample
from xattn.eval.metrics.board.masks import MaskList
from xattn.eval.metrics.board.table import SCORES, OutcomeTable, Replacement
from xattn.eval.metrics.curves import check_fill
from xattn.training.outcome_rows import DROP

AUTO = "auto"


def can_drop(network: Any) -> bool:
    """Return whether patches can be left out of the input sequence of ``network``."""
    if not isinstance(network, Backbone):
        return False
    try:
        droppable_grid(network)
    except ValueError:
        return False
    return True


def cells_for(network: Any, fill: str, most: int = 14) -> int:
    """Return the default number of cells per side: ``most``, or the number of patches per side if patches
    are dropped and ``network`` has fewer than ``most`` per side."""
    return min(most, *droppable_grid(network)) if fill == DROP else most


def correlation_values(sums: Tensor, drops: Tensor, ranks: bool = False) -> Tensor:
    """Compute the correlation r, (B,) float64 in [-1, 1], of a map's sums (B, I) and the drops of the score
    (B, I).

    The result is NaN if the sums or the drops are equal for all masks or are not finite.

    >>> correlation_values(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[2.0, 4.0, 8.0]]))
    tensor([1.], dtype=torch.float64)

    Args:
        ranks: whether to use Spearman's correlation instead of Pearson's.

    Raises:
        ValueError: if the arguments are not two tensors (B, I) of the same shape.
    """
    if sums.ndim != 2 or sums.shape != drops.shape:
        raise ValueError(
            f"sums, drops: got {tuple(sums.shape)} and {tuple(drops.shape)}; give two of (B, I)"
        )
    value = spearman(sums, drops) if ranks else pearson(_centred(sums), _centred(drops))
    return torch.where(value.isfinite(), value, torch.nan)


def _centred(values: Tensor) -> Tensor:
    """Subtract the mean from (B, I), in float64. Return 0 if only rounding errors remain."""
    values = values.double()
    centred = values - values.mean(1, keepdim=True)
    largest = values.abs().amax(1, keepdim=True)
    return torch.where(centred.abs().amax(1, keepdim=True) > 1e-9 * largest, centred, 0.0)


@dataclass(frozen=True)
class TableMetric(PerturbationMetric):
    """A metric that reads a table of outcomes.

    Args:
        fill: what replaces a removed part: ``"mean"``, ``"black"`` or ``"blur"``, or ``"drop"``, which
            leaves patches out of a ViT's sequence. ``"auto"`` is ``"drop"`` if possible, else ``"mean"``.
        score: ``"log-odds"`` or ``"logit"`` of the class.
        mean: (3,) the data set's mean colour in [0, 1].
    """

    drops: ClassVar[bool] = True
    fill: str = AUTO
    score: str = "log-odds"
    mean: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score: got {self.score!r}; choose one of {', '.join(SCORES)}")
        if self.fill not in (AUTO, DROP):
            check_fill("fill", self.fill, self.mean)

    def for_network(self, network: Any) -> Self:
        """Return the same metric with a fill that ``network`` allows.

        Raises:
            ValueError: if the network cannot drop patches, or the mean colour is unknown.
        """
        if self.fill == DROP and not (self.drops and can_drop(network)):
            raise ValueError(
                "fill: drop works only for timm's ViTs that read a class token; give mean, black or blur"
            )
        if self.fill != AUTO:
            return self
        own = getattr(getattr(network, "preprocessing", None), "mean", None)
        mean = self.mean or (own and tuple(float(value) for value in own))
        kind = DROP if self.drops and can_drop(network) else "mean"
        return replace(self, fill=kind, mean=mean)

    @property
    def behind(self) -> Replacement:
        """What replaces a removed part."""
        return Replacement(self.fill, self.mean if self.fill == "mean" else None)

    def options(self) -> dict[str, Any]:
        given = super().options()
        if self.fill != "mean":
            given.pop("mean")
        return given


@dataclass(frozen=True)
class CorrelationMetric(TableMetric):
    """The mean correlation over the lists of masks that a subclass defines."""

    ranks: ClassVar[bool] = False

    def lists(self) -> tuple[MaskList, ...]:
        """Return the lists of masks."""
        raise NotImplementedError

    def agreement(self, table: OutcomeTable, raw: Tensor, target: int) -> float:
        """Compute the value of a map ``raw`` (1, H, W) of class ``target``; NaN if it is undefined."""
        values = []
        for masks in self.lists():
            sums, drops = table.sums_and_drops(masks, self.behind, raw[0], target, self.score)
            values.append(correlation_values(sums[None], drops[None], self.ranks))
        return float(torch.cat(values).mean())

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        yield from ()
        value = self.agreement(sample.outcomes, sample.raw, sample.target)

        def finish(scores: Mapping[str, Tensor]) -> dict[Column, float]:
            return {self.columns[0]: value if math.isfinite(value) else math.nan}

        return finish
