"""Settings of the studies: plain dataclasses, importable without torch, read by the CLI as they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Method = Literal["none", "random", "at", "iat", "vat", "ivat"]
Attention = Literal["additive", "dot"]


@dataclass(frozen=True)
class TextStudyConfig:
    """What is trained, and how often."""

    methods: tuple[Method, ...] = ("none", "random", "at", "iat", "vat", "ivat")
    """none is the vanilla model, which the others are compared with."""
    attention: tuple[Attention, ...] = ("additive", "dot")
    """Scores v . tanh(W h + b), or w . h / sqrt(width of h)."""
    seeds: int = 5
    """Runs of each method with its chosen epsilon: seeds 0, 1, ..."""
    epsilons: tuple[float, ...] = (0.5, 2.0, 8.0, 30.0)
    """Norms of the perturbation to choose from."""
    grid_seeds: int = 1
    """Runs of each epsilon that the choice is made from."""
    epochs: int = 2
    """Passes over the training sentences; the held-out tenth chooses the best."""
    batch_size: int = 64
    """Sentences a step."""
    lr: float = 5e-3
    """Of Adam with AMSGrad."""
    embedding: int = 100
    """Width of the word vectors, which are trained."""
    width: int = 64
    """Hidden units of the BiLSTM in each direction."""
    weight: float = 1.0
    """Of the loss at the perturbed scores beside the clean loss."""
    vectors: Path | None = None
    """Word vectors to start from, a text file as fastText writes it; random ones by default."""

    def __post_init__(self) -> None:
        for name in ("seeds", "grid_seeds", "epochs", "batch_size", "embedding", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; give a positive number")
        if self.grid_seeds > self.seeds:
            raise ValueError(
                f"grid_seeds: got {self.grid_seeds}; give at most seeds = {self.seeds}"
            )
        unknown = set(self.methods) - set(get_args(Method))
        if unknown or "none" not in self.methods:
            raise ValueError(
                f"methods: got {', '.join(self.methods)}; give 'none', which the others are compared "
                f"with, and choose from {', '.join(get_args(Method))}"
            )
        if not self.epsilons or min(self.epsilons) <= 0:
            raise ValueError(f"epsilons: got {self.epsilons}; give positive norms")
