"""Settings of a training run: plain dataclasses, importable without torch, read by the CLI as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

# What a setting is when it is not given. "published" is T-TAME's (arXiv 2403.04523) for ImageNet;
# "small" was tuned for the classifier fusion on a few hundred photos, see docs/results.md.
RECIPES: dict[str, dict[str, Any]] = {
    "published": {
        "epochs": 8,
        "batch_size": 32,
        "optimizer": "sgd",
        "lr": 1e-3,
        "weight_decay": 5e-4,
        "class_mode": "batch",
        "area": 2.0,
    },
    "small": {
        "epochs": 14,
        "batch_size": 16,
        "optimizer": "adamw",
        "lr": 3e-4,
        "weight_decay": 0.01,
        "class_mode": "own",
        "area": 1.0,
    },
}


# Left out (None) until the recipe fills it in, and never None afterwards.
Optimizer = Literal["sgd", "adamw"]
ClassMode = Literal["batch", "own", "top"]
if TYPE_CHECKING:
    Int: TypeAlias = int
    Float: TypeAlias = float
    OptimizerName: TypeAlias = Optimizer
    ClassModeName: TypeAlias = ClassMode
else:
    Int, Float, OptimizerName, ClassModeName = (
        t | None for t in (int, float, Optimizer, ClassMode)
    )


@dataclass(frozen=True)
class TrainConfig:
    """How a head is trained; settings left out come from the recipe.

    "published" is T-TAME's, for ImageNet; "small" is for a few hundred photos.
    """

    recipe: Literal["published", "small"] = "published"
    """Where the settings come from that are not given."""
    epochs: Int = None  # type: ignore[assignment]
    """Passes over the data (published 8, small 14)."""
    batch_size: Int = None  # type: ignore[assignment]
    """Images a step, per process (published 32, small 16)."""
    optimizer: OptimizerName = None  # type: ignore[assignment]
    """SGD with Nesterov momentum, cycled .95 to .85 by OneCycle (published), or AdamW (small)."""
    lr: Float = None  # type: ignore[assignment]
    """Peak learning rate of the OneCycle schedule (published 1e-3, small 3e-4)."""
    weight_decay: Float = None  # type: ignore[assignment]
    """On all tensors except biases (published 5e-4, small 0.01)."""
    class_mode: ClassModeName = None  # type: ignore[assignment]
    """Whose maps the area and variation terms see: batch's classes (published), own (small), top."""
    cross_entropy: float = 1.5
    """Weight of the cross-entropy of the masked image."""
    area: Float = None  # type: ignore[assignment]
    """Weight of mean((A + 0.0005)^0.3) (published 2, small 1)."""
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
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe: got {self.recipe!r}; choose one of {', '.join(RECIPES)}")
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
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
