"""SaCo: do differences between groups of pixels in a map agree with the loss of score without each group?

    F = sum_{i < j} w_ij / sum_{i < j} |w_ij|,    w_ij = s_i - s_j if d_i >= d_j, else s_j - s_i

The pixels are ranked and split into K groups of equal size. s_i is the sum of the map over group i, and
d_i = p - p(group i at the photo's mean colour). Wu et al. 2024, CVPR. If the network does not react, all
d_i are equal. Such equality counts as agreement, so the value is 1.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.eval.metrics.base import (
    Column,
    Finish,
    MetricGroup,
    MetricInfo,
    MetricInputs,
    PerturbationMetric,
    Request,
    Sample,
)
from xattn.eval.metrics.mean_metric import MeanMetric


def saco_values(salience: Tensor, drops: Tensor) -> Tensor:
    """Compute SaCo, (B,) float64 in [-1, 1], from the salience of groups and the score lost without each.

    Both are (B, K), in descending order of salience. The result is NaN if all groups have the same
    salience.

    >>> saco_values(torch.tensor([[5.0, 4.0, 3.0, 2.0]]), torch.tensor([[4.0, 2.0, 3.0, 1.0]]))
    tensor([0.8000], dtype=torch.float64)

    Raises:
        ValueError: if the arguments are not two tensors (B, K) of the same shape.
    """
    if salience.ndim != 2 or salience.shape != drops.shape:
        raise ValueError(
            f"salience, drops: got {tuple(salience.shape)} and {tuple(drops.shape)}; give two of (B, K)"
        )
    s, d = salience.double(), drops.double()
    pairs = torch.ones(s.shape[1], s.shape[1], dtype=torch.bool, device=s.device).triu(1)
    distance = (s[:, :, None] - s[:, None])[:, pairs]
    agree = (d[:, :, None] >= d[:, None])[:, pairs]
    total = torch.where(agree, distance, -distance).sum(1) / distance.abs().sum(1)
    return torch.where(d.isfinite().all(1), total, torch.nan)


@dataclass(frozen=True)
class SaCoMetric(PerturbationMetric):
    """SaCo, in which pixels are divided into ``groups`` by rank, with one pass per group.

    Args:
        groups: K, the number of groups.
    """

    groups: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.groups, int) or self.groups < 2:
            raise ValueError(f"groups: got {self.groups!r}; give a whole number of at least 2")

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        flat = sample.raw.flatten().double()
        parts = flat.argsort(descending=True, stable=True).tensor_split(self.groups)
        colour = sample.image.mean((1, 2))[:, None]
        for part in parts:
            removed = sample.image.clone().flatten(1)
            removed[:, part] = colour
            yield Request("saco", removed.view_as(sample.image))
        salience = torch.stack([flat[part].sum() for part in parts])[None].cpu()

        def finish(scores: Mapping[str, Tensor]) -> dict[Column, float]:
            drops = sample.score - scores["saco"].double()[None]
            return {self.columns[0]: float(saco_values(salience, drops))}

        return finish


class SaCo(MeanMetric):
    """Mean SaCo. ``update(salience, drops, valid=None)`` takes (B, K) each."""

    metric = "saco"
    higher_is_better = True
    values = saco_values


GROUP = MetricGroup.single(
    SaCoMetric,
    "saco",
    MetricInfo(
        "agreement of the salience of groups of pixels and the score lost without each",
        True,
        -1,
        reads=MetricInputs("class", "thresholds of the map", "mean"),
    ),
    "Salience-guided faithfulness (SaCo)",
    "How well differences between groups of pixels agree with what the class loses without each",
    classes=(SaCo,),
    cases=({"groups": 4},),
    by_name=True,
)
