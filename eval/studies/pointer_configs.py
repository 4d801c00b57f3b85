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
    batch_size: int = 64
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


@dataclass(frozen=True)
class OrderStudyConfig:
    """Photos, the teacher of orders, and the heads that learn from it."""

    photos: int = 400
    """To learn from, at most."""
    tested: int = 100
    """Others, which are tested and have two independent teachers."""
    cells: int = 7
    """Of a side; a divisor of the ViT's grid."""
    passes: int = 120
    """Of the network with cells left out for each photo, half of them complements."""
    ridge: float = 10.0
    """Of the regression."""
    target: Literal["p", "logit"] = "p"
    """What is regressed and the order goes by: p of the predicted class, or its centred logit."""
    draws: int = 3
    """Heads of each kind: seeds 0, 1, ..."""
    epochs: int = 10
    """Passes over the photos' orders."""
    seed: int = 0
    """Of the draw of photos."""

    def __post_init__(self) -> None:
        for name, least in (
            ("photos", 4),
            ("tested", 2),
            ("draws", 1),
            ("epochs", 1),
            ("cells", 2),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}; give at least {least}")

    def quick(self) -> OrderStudyConfig:
        """A few photos: no figure of it means anything."""
        return replace(self, photos=4, tested=2, draws=1, epochs=1)
