"""Settings of the studies of pointers, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal


def _check_counts(config: Any) -> None:
    """Raise a ``ValueError`` unless every whole number of a config is at least 1."""
    for name in (field.name for field in fields(config) if field.type == "int"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: got {getattr(config, name)}; give at least 1")


@dataclass(frozen=True)
class PointStudyConfig:
    """What the pointer networks of the study are trained on, and how they are tested."""

    seeds: int = 3
    """Networks of each kind: seeds 0, 1, ..."""
    samples: int = 72_000
    """Drawn to train one network on, each once."""
    batch_size: int = 128
    """Samples a step, all with as many points."""
    width: int = 96
    """Of the vectors of every network."""
    lr: float = 2e-3
    """Of AdamW; rises for a tenth of the steps, then half a cosine to 0."""
    tests: int = 1_000
    """Samples of each test."""
    beam: int = 4
    """Sequences that the search of tours keeps."""

    def __post_init__(self) -> None:
        _check_counts(self)
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr: got {self.lr}; give a positive number")

    def quick(self) -> PointStudyConfig:
        """A few steps of each: no figure of it means anything."""
        return replace(self, seeds=1, samples=512, tests=20, width=16)
