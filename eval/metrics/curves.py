"""Insertion and deletion: area under the score as pixels are added or removed in order of relevance.

    AUC = (sum_t s_t - s_0 / 2 - s_T / 2) / T,    t = 0..T,    T = ceil(HW / step)

s_t is the score after t steps of ``step`` pixels each, in the order of the grey map (RISE, arXiv
1806.07421). Deletion replaces pixels of the image by a fill. Insertion starts from the fill and puts pixels
of the image back. The last step may have fewer pixels but counts as a whole step, as in RISE.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xattn.eval.fills import COLOURED, KINDS, fill
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

# The other fills are computed from the pixels that remain, so each step needs a new fill.
FIXED_FILLS = ("black", "mean", "blur", "rise", "noise")


def auc(scores: Tensor) -> Tensor:
    """Compute the area under scores (..., T + 1) at equal steps over [0, 1], (...) float64.

    It is between the smallest and the largest score.

    >>> auc(torch.tensor([1.0, 0.5, 0.0]))
    tensor(0.5000, dtype=torch.float64)

    Raises:
        ValueError: if there are fewer than two scores.
    """
    s = check_curve(scores)
    ends = (s[..., 0] + s[..., -1]) / 2
    return (s.sum(-1) - ends) / (s.shape[-1] - 1)


def check_curve(scores: Tensor) -> Tensor:
    """Return scores (..., T + 1) in float64. Raise a ValueError if there are fewer than two."""
    if scores.ndim == 0 or scores.shape[-1] < 2:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}; give (..., T + 1) with T >= 1")
    return scores.double()


def curves(scores: Mapping[str, Tensor], clean: float) -> dict[str, Tensor]:
    """Return both curves, (T + 1,) float64, from the scores (T,) of the metric's requests.

    The clean image is not requested, because its score is known. It is the start of deletion and the end of
    insertion.
    """
    end = scores["deletion"].new_full((1,), clean, dtype=torch.float64)
    return {
        "deletion": torch.cat([end, scores["deletion"].double()]),
        "insertion": torch.cat([scores["insertion"].double(), end]),
    }


@dataclass(frozen=True)
class InsertionDeletionMetric(PerturbationMetric):
    """Insertion (higher is better) and deletion (lower is better), each with T forward passes.

    Pixels are taken in descending order of the grey map, and pixels of equal value in row-major order. Only
    the order of a map's values matters. A constant map has no order, so both values are NaN. For a clip,
    the pixels of all frames are ranked together.

    Args:
        step: the number of pixels per step (RISE: the width of the image). None means ceil(HW / ``steps``).
        steps: the number of steps if ``step`` is None. Because the number of pixels per step is rounded up,
            there may be fewer steps than this.
        deletion_fill: what replaces a pixel: ``"black"``, the data set's ``"mean"`` colour (RISE:
            0 after normalisation), ``"blur"``, ``"rise"``, ``"noise"``, or an estimate from the
            remaining pixels, ``"inpaint"`` or ``"road"``.
        insertion_fill: the image into which pixels are inserted (RISE: its own blur, ``"rise"``). With
            ``"inpaint"`` and ``"road"``, missing pixels are estimated from the pixels inserted so far.
        mean: (3,) the colour for ``"mean"`` and ``"rise"``, raw pixels in [0, 1].

    If no pixels remain, ``"inpaint"`` and ``"road"`` use the image's own mean colour. They compute a new
    fill at every step, which can take longer than the forward pass.
    """

    clips = True

    step: int | None = None
    steps: int = 56
    deletion_fill: str = "black"
    insertion_fill: str = "blur"
    mean: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        if self.step is not None:
            check_count("step", self.step)
        check_fill("deletion_fill", self.deletion_fill, self.mean)
        check_fill("insertion_fill", self.insertion_fill, self.mean)

    def column_options(self, column: Column) -> dict[str, Any]:
        kind = self.deletion_fill if column.metric == "deletion" else self.insertion_fill
        size = {"steps": self.steps} if self.step is None else {"step": self.step}
        return {**size, **fill_options(kind, self.mean)}

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        grey = sample.grey.flatten()
        if is_constant(grey):
            return lambda scores: dict.fromkeys(self.columns, math.nan)
        order = grey.argsort(descending=True, stable=True)
        parts = order.split(self.step or -(-len(order) // self.steps))
        options: dict[str, Any] = {"mean": self.mean, "seed": sample.seed}
        images = removals(sample.image, parts, self.deletion_fill, **options)
        for t, image in enumerate(images, start=1):
            yield Request("deletion", image, shared=t == len(parts))
        images = insertions(sample.image, parts[:-1], self.insertion_fill, **options)
        for t, image in enumerate(images):
            yield Request("insertion", image, shared=t == 0)

        def finish(scores: Mapping[str, Tensor]) -> dict[Column, float]:
            both = curves(scores, sample.score)
            return {column: float(auc(both[column.metric])) for column in self.columns}

        return finish


class _Area(MeanMetric):
    """``update(scores, valid=None)`` takes curves (B, T + 1). ``compute()`` returns the mean AUC."""

    values = auc


class Deletion(_Area):
    """Mean area under deletion curves, in [0, 1] for probabilities."""

    metric = "deletion"
    higher_is_better = False


class Insertion(_Area):
    """Mean area under insertion curves, in [0, 1] for probabilities."""

    metric = "insertion"
    higher_is_better = True


# ---------------------------------------------------------------- replacing step by step


def removals(
    image: Tensor,
    parts: Iterable[Tensor],
    kind: str,
    *,
    mean: Sequence[float] | None = None,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yield ``image`` (3, H, W) without parts 1..t, for t = 1, 2, .... ``parts`` are flat pixel indices.

    If the fill allows it, every image is the previous tensor, changed in place.
    """
    removed = torch.zeros_like(image[:1], dtype=torch.bool)
    if kind in FIXED_FILLS:
        behind = fill(image, ~removed, kind, mean=mean, seed=seed)
        yield from _paste(behind, image, parts)
        return
    for part in parts:
        removed.view(-1)[part] = True
        yield _estimate(image, removed, kind, mean, seed)


def insertions(
    image: Tensor,
    parts: Iterable[Tensor],
    kind: str,
    *,
    mean: Sequence[float] | None = None,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yield the fill alone, and then the fill with parts 1..t of ``image`` inserted, for t = 1, 2, ...; see
    :func:`removals`."""
    removed = torch.ones_like(image[:1], dtype=torch.bool)
    if kind in FIXED_FILLS:
        behind = fill(image, removed, kind, mean=mean, seed=seed)
        yield behind
        yield from _paste(image, behind, parts)
        return
    yield _estimate(image, removed, kind, mean, seed)
    for part in parts:
        removed.view(-1)[part] = False
        yield _estimate(image, removed, kind, mean, seed)


def _paste(source: Tensor, onto: Tensor, parts: Iterable[Tensor]) -> Iterator[Tensor]:
    pixels, current = source.flatten(1), onto.clone(memory_format=torch.contiguous_format)
    flat = current.view(len(current), -1)
    for part in parts:
        flat.index_copy_(1, part, pixels.index_select(1, part))
        yield current


def _estimate(
    image: Tensor, removed: Tensor, kind: str, mean: Sequence[float] | None, seed: int
) -> Tensor:
    if removed.all():
        return image.mean((1, 2), keepdim=True).expand_as(image)
    return torch.where(removed, fill(image, removed, kind, mean=mean, seed=seed), image)


def is_constant(values: Tensor) -> bool:
    """Return whether all values are equal, so that they define no order."""
    return bool(values.amin() == values.amax())


def check_count(name: str, value: int) -> None:
    """Raise a ValueError unless ``value`` is a whole number of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}; give a whole number, at least 1")


def check_fill(name: str, kind: str, mean: Sequence[float] | None) -> None:
    """Raise a ValueError if ``kind`` is not a fill, or if it needs a mean colour and there is none."""
    if kind not in KINDS:
        raise ValueError(f"{name}: got {kind!r}; choose one of {', '.join(KINDS)}")
    if kind in COLOURED and mean is None:
        raise ValueError(f"mean: None; {name}={kind!r} needs the mean colour (3,)")


def fill_options(kind: str, mean: Sequence[float] | None) -> dict[str, Any]:
    """Return what a fill depends on: its kind, and the mean colour if it uses one."""
    return {"fill": kind, "mean": list(mean)} if kind in COLOURED and mean else {"fill": kind}


GROUP = MetricGroup(
    "insertion-deletion",
    InsertionDeletionMetric,
    {
        "deletion": MetricInfo(
            "area under the score while pixels are removed by rank",
            False,
            reads=MetricInputs("class", "thresholds of the map", "black"),
        ),
        "insertion": MetricInfo(
            "area under the score while pixels are inserted by rank",
            True,
            reads=MetricInputs("class", "thresholds of the map", "blur"),
        ),
    },
    words={
        "deletion": (
            "Deletion",
            "How much confidence is left while pixels are removed, the most important first",
        ),
        "insertion": (
            "Insertion",
            "How much confidence there is while pixels come back, the most important first",
        ),
    },
    classes=(Deletion, Insertion),
    cases=({"steps": 6},),
)
