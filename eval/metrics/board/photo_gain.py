"""Photo gain: how much better does a map fit its own photo than the method's map of another photo does?

    A(phi(x), x) - A(phi(x'), x),    A = mean of squares, subsets and monotonicity

x' is the next photo with a different predicted class. A map that ignores the photo scores exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Self

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
from xattn.eval.metrics.board.correlation import TableMetric, cells_for
from xattn.eval.metrics.board.squares import SquaresMetric
from xattn.eval.metrics.board.subsets import SubsetsMetric
from xattn.eval.metrics.monotonicity import MonotonicityMetric


@dataclass(frozen=True)
class PhotoGainMetric(TableMetric):
    """Photo gain, from ``squares``, ``subsets`` and ``monotonicity`` with their default options.

    An undefined correlation counts as 0.

    Args:
        cells: the number of cells per side of the grid of ``subsets``, with the same default as there.
        patch: side of the squares of ``monotonicity``, in pixels.
    """

    cells: int | None = None
    patch: int = 32
    compares: ClassVar[str] = "photo"

    def for_network(self, network: Any) -> Self:
        made = super().for_network(network)
        return replace(made, cells=made.cells or cells_for(network, made.fill))

    def _parts(self) -> tuple[PerturbationMetric, ...]:
        shared = {"fill": self.fill, "score": self.score, "mean": self.mean}
        return (
            SquaresMetric(**shared),  # type: ignore[arg-type]
            SubsetsMetric(**shared, cells=self.cells),  # type: ignore[arg-type]
            MonotonicityMetric(self.patch),
        )

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        maps = {"own": sample.raw, "other": sample.cohort.of_next_photo(sample.place)}
        found: list[tuple[str, Finish]] = []
        for part in self._parts():
            for side, raw in maps.items():
                if raw is not None:
                    requests = part.measure(replace(sample, raw=raw))
                    found.append((side, (yield from _named(requests, side))))

        def finish(scores: Mapping[str, Tensor]) -> dict[Column, float]:
            total = {"own": 0.0, "other": 0.0}
            for side, of_part in found:
                own = {k[len(side) :]: v for k, v in scores.items() if k.startswith(side)}
                (value,) = of_part(own).values()
                total[side] += 0.0 if math.isnan(value) else value
            return {self.columns[0]: (total["own"] - total["other"]) / len(self._parts())}

        return finish


def _named(
    requests: Generator[Request, None, Finish], side: str
) -> Generator[Request, None, Finish]:
    """Yield the same requests, with ``side`` as a prefix of their keys."""
    while True:
        try:
            request = next(requests)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        yield request._replace(key=side + request.key)


GROUP = MetricGroup.single(
    PhotoGainMetric,
    "photo-gain",
    MetricInfo(
        "mean of squares, subsets and monotonicity, minus the same mean for the method's map of "
        "another photo",
        True,
        -2,
        2,
        reads=MetricInputs("class", "squares", "mean"),
        chance=0,
    ),
    "Gain over another photo's map",
    "How much better the map is for its photo than the method's map of another photo",
    cases=({"cells": 5, "patch": 6, "fill": "black"},),
    by_name=True,
)
