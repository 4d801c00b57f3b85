"""Network contrast: does the map fit the network's outcomes better than a map computed with random weights?

    S(phi_f, T_f) - S(phi_g, T_f)

g is f with random weights, and S is ``squares`` (or ``single-deletion``). A map that ignores the network
scores 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xattn.eval.metrics.base import MetricGroup, MetricInfo, MetricInputs, Sample
from xattn.eval.metrics.board.class_contrast import ContrastMetric


@dataclass(frozen=True)
class NetworkContrastMetric(ContrastMetric):
    """Compares the map with the method's map of the same class on a network whose weights are all
    random."""

    compares: ClassVar[str] = "network"
    explains_randomized: ClassVar[bool] = True

    def value(self, sample: Sample) -> float:
        random = sample.cohort.on_random_weights(sample.place)
        own, other = (
            self.agreement(sample.outcomes, raw, sample.target) for raw in (sample.raw, random)
        )
        return own - other


GROUP = MetricGroup.single(
    NetworkContrastMetric,
    "network-contrast",
    MetricInfo(
        "how much better the map fits the network's outcomes than its map of random weights",
        True,
        -2,
        2,
        reads=MetricInputs("class", "squares", "mean"),
        chance=0,
    ),
    "Network contrast",
    "How much better the map goes with this network than the method's map of random weights",
    cases=({"fill": "black"},),
    by_name=True,
)
