"""Settings of the study of lesions, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

Part = Literal["slices", "faint", "volumes"]


@dataclass(frozen=True)
class LesionConfig:
    """What the study of lesions trains and tests; training samples have the seed 0, others 1 and 2."""

    parts: tuple[Part, ...] = ("slices", "faint", "volumes")
    """Plain lesions in slices, faint ones, and volumes; those that are left out may be added later."""
    seeds: int = 3
    """Networks of each kind on slices: seeds 0, 1, ..."""
    volume_seeds: int = 1
    """On volumes."""
    slices: int = 1_300
    """To train on."""
    tests: int = 200
    """Slices to test on, and others to choose the threshold, and a level and sign of the gates, by."""
    epochs: int = 4
    """Passes over the slices."""
    batch_size: int = 8
    """Slices a step."""
    lr: float = 1e-2
    """Of AdamW; rises for a tenth of the steps, then falls to 0."""
    volumes: int = 90
    """To train on."""
    volume_tests: int = 20
    """Volumes to test on, and others to choose the threshold by."""
    steps: int = 400
    """Of four patches of 32 x 32 x 32 voxels, two of them on a lesion."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.type == "int"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; give at least 1")
        for name in ("tests", "slices", "volumes"):
            if getattr(self, name) < 4:
                raise ValueError(f"{name}: got {getattr(self, name)}; give at least 4")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr: got {self.lr}; give a positive number")
        known = ("slices", "faint", "volumes")
        if not self.parts or not set(self.parts) <= set(known):
            raise ValueError(f"parts: got {self.parts}; choose among {', '.join(known)}")

    def quick(self) -> LesionConfig:
        """A few steps on a few samples: no figure of it means anything."""
        return replace(
            self, seeds=1, slices=32, tests=24, epochs=1, volumes=4, volume_tests=2, steps=1
        )
