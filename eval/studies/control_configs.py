"""Settings of the study of controls, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf


@dataclass(frozen=True)
class ControlStudyConfig:
    """On how many photos controls are measured, whose maps are compared, and how long networks train."""

    photos: int = 500
    """How many photos, drawn by the seed, are classified."""
    fitted: int = 100
    """Of how many of these mean maps are made; the map of one photo is that of the first."""
    compared: int = 40
    """On how many of them maps are compared."""
    explainers: tuple[str, ...] = (
        "rollout",
        "raw_attention",
        "column_mass",
        "generic_relevance",
        "attn_lrp",
        "gradcam",
        "input_x_gradient",
    )
    """Whose maps are compared with those of permuted queries and keys."""
    permutations: int = 3
    """Of the weights of queries and keys."""
    digit_steps: int = 440
    """Of a network trained on digits."""
    digit_rates: tuple[float, ...] = (1e-3,)
    """Learning rates of networks trained on digits, a table each."""
    recall_steps: int = 500
    """Of a network trained on recall."""
    seeds: int = 1
    """Networks of each kind: seeds 0, 1, ..."""
    seed: int = 0
    """Of the photos and of what is permuted."""

    def __post_init__(self) -> None:
        least = {
            "photos": 2,
            "fitted": 1,
            "compared": 2,
            "permutations": 1,
            "digit_steps": 1,
            "recall_steps": 1,
            "seeds": 1,
        }
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}: got {getattr(self, name)}; give at least {value}")
        for name in ("explainers", "digit_rates"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name}: got {given}; give each once")
        if not self.digit_rates or not all(0 < rate < inf for rate in self.digit_rates):
            raise ValueError(
                f"digit_rates: got {self.digit_rates}; give one or more above 0, such as 0.001"
            )

    def quick(self) -> ControlStudyConfig:
        """A few photos and steps, to see that all runs: no figure of it means anything."""
        return replace(
            self,
            photos=6,
            fitted=3,
            compared=2,
            permutations=1,
            digit_steps=22,
            digit_rates=self.digit_rates[:1],
            recall_steps=3,
            seeds=1,
        )
