"""Settings of a training run: plain dataclasses, importable without torch, read by the CLI as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """How a head is trained.

    The loss weights, SGD with Nesterov momentum and OneCycle are those of T-TAME (arXiv 2403.04523).
    """

    epochs: int = 8
    """Passes over the data."""
    batch_size: int = 32
    """Images a step, per process."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum 0.9 as published, or AdamW."""
    lr: float = 1e-3
    """Peak learning rate of the OneCycle schedule."""
    weight_decay: float = 5e-4
    """On all tensors except biases."""
    class_mode: Literal["batch", "own", "top"] = "batch"
    """Maps that the area and variation terms see: of the batch's classes, the own class, the top ones."""
    cross_entropy: float = 1.5
    """Weight of the cross-entropy of the masked image."""
    area: float = 2.0
    """Weight of mean((A + 0.0005)^0.3)."""
    variation: float = 0.01
    """Weight of the variation term, a sum over space."""
    augment: bool = True
    """Random crop and flip; otherwise the centre crop."""
    workers: int = 2
    """Data-loader processes."""
    seed: int = 0
    """Order of the images and augmentation are pure functions of (seed, epoch, index)."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision."""
    checkpoint_every: int = 50
    """Steps between checkpoints; one is written at the end of every epoch, too."""
    max_pixels: int = 40_000_000
    """Larger photos are skipped as decompression bombs."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "checkpoint_every", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; give a positive number")
        if self.workers < 0:
            raise ValueError(f"workers: got {self.workers}; give 0 or more")
        if not self.lr > 0:
            raise ValueError(f"lr: got {self.lr}; give a positive learning rate")
        choices = {
            "optimizer": ("sgd", "adamw"),
            "class_mode": ("batch", "own", "top"),
            "precision": ("no", "fp16", "bf16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}; choose one of {', '.join(allowed)}"
                )
