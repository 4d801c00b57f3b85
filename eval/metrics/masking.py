"""AD, IC, ADD and AG: the probability of the class on the image under a mask and under its complement.

    q on x o m + b o (1 - m),    d on x o (1 - m) + b o m

The mask m is the grey map, thresholded at each level, and the image b replaces masked pixels. The formulas
are in :mod:`xattn.eval.functional`.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xattn.eval import functional
from xattn.eval.fills import COLOURED, KINDS, fill
from xattn.eval.metrics.base import (
    Column,
    Finish,
    MaskingChoices,
    MetricGroup,
    MetricInfo,
    MetricInputs,
    PerturbationMetric,
    Request,
    Sample,
)
from xattn.eval.metrics.mean_metric import MeanMetric

METRICS = ("AD", "IC", "ADD", "AG", "drop")
_READS = MetricInputs("class", "the map", "black")


@dataclass(frozen=True)
class MaskingMetric(PerturbationMetric):
    """AD, IC, ADD and AG at every level.

    At level 1, m is the grey map itself (as in LIFT-CAM's ADD). At lower levels, the map is thresholded.

    Args:
        levels, threshold, masked_value, ic_margin: see :class:`~xattn.eval.Protocol`.
        mean: (3,) the colour for ``masked_value="mean"`` and ``"rise"``, raw pixels in [0, 1].
        metrics: which of AD, IC, ADD, AG and drop to measure.
        bounded: whether scores are probabilities. For logits, only AD, IC and drop are defined.

    Example:
        >>> from xattn.eval import MaskingMetric
        >>> MaskingMetric(levels=(1.0, 0.5)).levels
        (1.0, 0.5)
    """

    clips = True

    levels: tuple[float, ...] = (1.0, 0.5, 0.15)
    threshold: str = "quantile"
    masked_value: str = "black"
    ic_margin: float = functional.IC_MARGIN
    mean: tuple[float, ...] | None = None
    metrics: tuple[str, ...] = METRICS[:4]
    bounded: bool = True

    def __post_init__(self) -> None:
        if self.masked_value not in KINDS:
            raise ValueError(
                f"masked_value: got {self.masked_value!r}; choose one of {', '.join(KINDS)}"
            )
        if self.masked_value in COLOURED and self.mean is None:
            raise ValueError(
                f"mean: None; masked_value={self.masked_value!r} needs the mean colour (3,)"
            )
        if not self.metrics or not set(self.metrics) <= set(METRICS):
            raise ValueError(f"metrics: got {self.metrics}; choose from {', '.join(METRICS)}")
        if not self.bounded and not set(self.metrics) <= {"AD", "IC", "drop"}:
            raise ValueError(
                f"metrics: got {self.metrics}; only AD, IC and drop are defined for logits"
            )

    @classmethod
    def protocol_options(cls, protocol: MaskingChoices) -> dict[str, Any]:
        names = ("levels", "threshold", "masked_value", "ic_margin")
        return {name: getattr(protocol, name) for name in names}

    def score_problem(self, score: str) -> str | None:
        if score not in ("logit", "value") or not self.bounded:
            return None
        if score == "value":
            return (
                "score: AD, ADD and AG need probabilities, but the target may be any number; give "
                "Target(function, p='sigmoid'), or p='probability' if it is in [0, 1], or other metrics, "
                "such as 'curves'"
            )
        return (
            "score: AD, ADD and AG need probabilities; for logits give MaskingMetric(bounded=False, "
            "metrics=('AD', 'IC')), or the preset torch-cam"
        )

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(Column(metric, level) for level in self.levels for metric in self.metrics)

    def column_options(self, column: Column) -> dict[str, Any]:
        names = ("threshold", "masked_value", "ic_margin")
        options = {"levels": [column.level], **{name: getattr(self, name) for name in names}}
        if self.masked_value in COLOURED:
            options["mean"] = list(self.mean or ())
        return options

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        for level in self.levels:
            mask = sample.mask(level, self.threshold)
            yield Request(f"q@{100 * level:g}", self._masked(sample, mask))
            if "ADD" in self.metrics:
                yield Request(f"d@{100 * level:g}", self._masked(sample, 1 - mask))
        p = torch.full((len(self.levels),), sample.score, dtype=torch.float64, device="cpu")

        def finish(scores: Mapping[str, Tensor]) -> dict[Column, float]:
            values = {}
            for metric in self.metrics:
                key = "d" if metric == "ADD" else "q"
                q = torch.cat([scores[f"{key}@{100 * level:g}"] for level in self.levels])
                options: dict[str, Any] = {"bounded": self.bounded}
                if metric == "IC":
                    options["margin"] = self.ic_margin
                found = functional.VALUES[metric](p, q, **options).tolist()
                values.update(
                    {Column(metric, level): v for level, v in zip(self.levels, found, strict=True)}
                )
            return {column: values[column] for column in self.columns}

        return finish

    def _masked(self, sample: Sample, mask: Tensor) -> Tensor:
        masked = sample.image * mask
        if self.masked_value == "black":
            return masked
        behind = fill(sample.image, mask == 0, self.masked_value, mean=self.mean, seed=sample.seed)
        return masked + behind * (1 - mask)


class _MaskingMetric(MeanMetric):
    """``update(p, q, valid=None)`` takes (B,) probabilities; for its arguments with a backbone, see
    :class:`~xattn.eval.metrics.MeanMetric`. ``compute()`` returns a percentage.

    Args:
        level: with a backbone, the fraction of pixels to keep. At 1, the image is multiplied by the grey
            map itself.
    """

    def __init__(self, backbone: Any = None, level: float = 1.0, **kwargs: Any) -> None:
        self.level = level
        super().__init__(backbone, **kwargs)

    def _default_metric(self) -> PerturbationMetric:
        return MaskingMetric(levels=(self.level,), metrics=(self.metric,))


class AverageDrop(_MaskingMetric):
    """AD, see :func:`xattn.eval.functional.average_drop`.

    Example:
        >>> import torch
        >>> from xattn.eval import AverageDrop
        >>> metric = AverageDrop()
        >>> metric.update(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.6]))
        >>> metric.compute()
        tensor(25., dtype=torch.float64)
    """

    metric = "AD"
    higher_is_better = False
    values = functional.average_drop_values


class IncreaseInConfidence(_MaskingMetric):
    """IC, see :func:`xattn.eval.functional.increase_in_confidence`.

    Example:
        >>> import torch
        >>> from xattn.eval import IncreaseInConfidence
        >>> metric = IncreaseInConfidence()
        >>> metric.update(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.6]))
        >>> metric.compute()
        tensor(50., dtype=torch.float64)
    """

    metric = "IC"
    higher_is_better = True

    def __init__(
        self,
        backbone: Any = None,
        level: float = 1.0,
        margin: float = functional.IC_MARGIN,
        **kwargs: Any,
    ) -> None:
        self.margin = margin
        super().__init__(backbone, level, **kwargs)

    def _default_metric(self) -> PerturbationMetric:
        return replace(super()._default_metric(), ic_margin=self.margin)  # type: ignore[type-var]

    def _values(self, p: Tensor, q: Tensor) -> Tensor:
        return functional.increase_in_confidence_values(p, q, self.margin)


class AverageDropInDeletion(_MaskingMetric):
    """ADD, see :func:`xattn.eval.functional.average_drop_in_deletion`. Here, ``q`` is d.

    Example:
        >>> import torch
        >>> from xattn.eval import AverageDropInDeletion
        >>> metric = AverageDropInDeletion()
        >>> metric.update(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.5]))
        >>> metric.compute()
        tensor(25., dtype=torch.float64)
    """

    metric = "ADD"
    higher_is_better = True
    values = functional.average_drop_in_deletion_values


class AverageGain(_MaskingMetric):
    """AG, see :func:`xattn.eval.functional.average_gain`.

    Example:
        >>> import torch
        >>> from xattn.eval import AverageGain
        >>> metric = AverageGain()
        >>> metric.update(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.75]))
        >>> metric.compute()
        tensor(25., dtype=torch.float64)
    """

    metric = "AG"
    higher_is_better = True
    values = functional.average_gain_values


GROUP = MetricGroup(
    "masking",
    MaskingMetric,
    {
        "AD": MetricInfo("100 mean max(0, p - q) / p", False, 0, 100, reads=_READS),
        "IC": MetricInfo("100 mean [q > p + margin max(p, q)]", True, 0, 100, reads=_READS),
        "ADD": MetricInfo("100 mean (p - d) / p, signed", True, -math.inf, 100, reads=_READS),
        "AG": MetricInfo("100 mean max(0, q - p) / (1 - p)", True, 0, 100, reads=_READS),
        "drop": MetricInfo("100 mean max(0, p - q)", False, 0, 100, reads=_READS),
    },
    words={
        "AD": ("Average drop", "How much confidence is lost when {kept} is kept"),
        "IC": ("Increase in confidence", "How often confidence rises when {kept} is kept"),
        "ADD": (
            "Average drop in deletion",
            "How much confidence is lost when {removed} is removed",
        ),
        "AG": ("Average gain", "How much of the missing confidence is gained when {kept} is kept"),
        "drop": ("Drop", "How many points of confidence are lost when {kept} is kept"),
    },
    classes=(AverageDrop, AverageDropInDeletion, AverageGain, IncreaseInConfidence),
)
