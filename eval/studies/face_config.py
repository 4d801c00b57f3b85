"""Settings of the study of faces, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class FaceStudyConfig:
    """The generated faces, and the networks that are trained on them."""

    train: int = 1500
    """Faces to train on."""
    tests: int = 500
    """Faces to test on; their labels are true."""
    blends: float = 0.35
    """Share of faces with two expressions."""
    false_labels: float = 0.1
    """Share of the labels to train on that are wrong."""
    epochs: int = 15
    """Passes over the faces."""
    batch_size: int = 64
    """Faces a step."""
    lr: float = 2e-3
    """Peak learning rate of AdamW."""
    anchors: int = 8
    """Of a class, where predictions are balanced."""
    seeds: int = 3
    """Networks of each kind: seeds 0, 1, ..."""
    data_seed: int = 0
    """Of the faces."""

    def __post_init__(self) -> None:
        least = {"data_seed": 0, "batch_size": 2, "tests": 2}
        for name in (field.name for field in fields(self) if field.type == "int"):
            if getattr(self, name) < least.get(name, 1):
                raise ValueError(
                    f"{name}: got {getattr(self, name)}; give at least {least.get(name, 1)}"
                )
        if self.train < self.batch_size:
            raise ValueError(f"train: got {self.train}; give at least a batch, {self.batch_size}")
        for name in ("blends", "false_labels"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; give a share from 0 to 1")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr: got {self.lr}; give a positive number")

    def quick(self) -> FaceStudyConfig:
        """A short training of each: no figure of it means anything."""
        return replace(self, train=32, tests=24, epochs=1, batch_size=16, seeds=1)
