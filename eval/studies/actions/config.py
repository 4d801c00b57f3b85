"""Settings of the study of actions, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class ActionStudyConfig:
    """The sequences, and the detectors that are trained on them."""

    length: int = 128
    """T, frames of a sequence."""
    classes: int = 4
    """Kinds of action."""
    train: int = 800
    """Sequences to train on."""
    tests: int = 200
    """Sequences to test on."""
    steps: int = 350
    """Of training."""
    batch_size: int = 32
    """Sequences a step."""
    lr: float = 4e-3
    """Peak learning rate of AdamW."""
    width: int = 32
    """Channels of the detector, C_f."""
    seeds: int = 3
    """Networks of each kind: seeds 0, 1, ..."""
    data_seed: int = 0
    """Of the sequences."""

    def __post_init__(self) -> None:
        least = {"length": 64, "classes": 2, "width": 8, "data_seed": 0}
        for name in (field.name for field in fields(self) if field.type == "int"):
            if getattr(self, name) < least.get(name, 1):
                raise ValueError(
                    f"{name}: got {getattr(self, name)}; give at least {least.get(name, 1)}"
                )
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr: got {self.lr}; give a positive number")

    def quick(self) -> ActionStudyConfig:
        """A few steps on short sequences: no figure of it means anything."""
        return replace(self, length=64, train=16, tests=8, steps=4, batch_size=8, width=8, seeds=1)
