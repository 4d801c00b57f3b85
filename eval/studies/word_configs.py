"""Settings of the study of words: a plain dataclass, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class WordStudyConfig:
    """The head of words, how it is trained by captions, and on which tokens."""

    tokens: tuple[str, ...] = ()
    """Taps that are compared, such as block.7 and head; by default inner tokens, those that enter the last
    third of the blocks, and final ones."""
    caption: int = 4
    """Words of a caption: that of the photo, and others that are drawn."""
    width: int = 32
    """Of the table of words."""
    heads: int = 3
    """Of the attention to words."""
    steps: int = 150
    """Of AdamW; the rate rises for a tenth of them, then half a cosine to 0."""
    lr: float = 4e-3
    """Its peak learning rate."""
    weight_decay: float = 0.05
    """Of all weights."""
    batch_size: int = 32
    """Photos a step."""
    folds: int = 4
    """Parts of the photos; each is tested once by heads that learn from the others."""
    seeds: int = 3
    """Heads of each fold, and of all photos for the maps."""
    seed: int = 0
    """Of the folds, and of the captions that are tested."""

    def __post_init__(self) -> None:
        least = {"caption": 2, "folds": 2}
        for name in ("width", "heads", "steps", "batch_size", "seeds"):
            least[name] = 1
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}: got {getattr(self, name)}; give at least {value}")
        if not 0 < self.lr < float("inf") or not 0 <= self.weight_decay < float("inf"):
            raise ValueError(
                f"lr, weight_decay: got {self.lr}, {self.weight_decay}; give a positive number, and one "
                f"of 0 or more"
            )
        if len(set(self.tokens)) < len(self.tokens):
            raise ValueError(f"tokens: got one twice in {self.tokens}; give each once")

    def quick(self) -> WordStudyConfig:
        """A few steps, to see that all runs: no figure of it means anything."""
        return replace(self, steps=min(self.steps, 3), folds=2, seeds=1)
