"""Settings of the studies on scikit-learn's digits, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal


def _check_counts(config: Any) -> None:
    """Raise a ``ValueError`` unless every whole number of a config is at least 1."""
    for name in (field.name for field in fields(config) if field.type == "int"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: got {getattr(config, name)}; give at least 1")


@dataclass(frozen=True)
class ExactRolloutConfig:
    """What the study of exact rollout trains, and on how many digits it deletes tokens."""

    seeds: int = 3
    """Networks of each kind: seeds 0, 1, ..."""
    epochs: int = 20
    """Passes over the 1,437 digits."""
    lr: float = 1e-2
    """Of AdamW; rises for a tenth of the steps, then falls to 0."""
    residual: Literal["average", "plain"] = "average"
    """(x + A x) / 2, or x + A x."""
    digits: int = 100
    """Of the 360 held out, whose tokens are deleted one by one."""

    def __post_init__(self) -> None:
        _check_counts(self)
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr: got {self.lr}; give a positive number")

    def quick(self) -> ExactRolloutConfig:
        """One short training of each: no figure of it means anything."""
        return replace(self, seeds=1, epochs=1, digits=8)


@dataclass(frozen=True)
class BlockStudyConfig:
    """What the study of blocks trains."""

    seeds: int = 3
    """Networks of each kind: seeds 0, 1, ..."""
    ninformer_epochs: int = 20
    """Passes over the 1,437 digits, with a gate and without."""
    hyperzzw_epochs: int = 25
    """Also of the stem alone."""
    shrp_epochs: int = 45
    """With the penalty and without."""
    usage_entropy: float = 0.3
    """Weight of the penalty of SHRP's routers."""
    slow_loss: float = 0.0
    """Weight of the difference of HyperZZW's kernels."""

    def __post_init__(self) -> None:
        _check_counts(self)
        for name in ("usage_entropy", "slow_loss"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: got {getattr(self, name)}; give at least 0")

    def quick(self) -> BlockStudyConfig:
        """One short training of each: no figure of it means anything."""
        return replace(self, seeds=1, ninformer_epochs=1, hyperzzw_epochs=1, shrp_epochs=1)
