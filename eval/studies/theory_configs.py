"""Settings of the studies of small theory: plain dataclasses, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class InContextConfig:
    """The prompts and the training of in-context regression."""

    width: int = 5
    """d, the number of inputs x of an example."""
    examples: int = 40
    """L, the number of examples of a prompt."""
    heads: int = 2
    """Of the network whose circuit is read; beside it one with a single head is trained."""
    noise: float = 0.1
    """Variance of y around its mean."""
    steps: int = 40_000
    """Of Adam; the last quarter with a tenth of the learning rate."""
    batch_size: int = 256
    """Prompts a step, all of them new."""
    lr: float = 2e-3
    """Learning rate of Adam."""
    tests: int = 65_536
    """Prompts of each test."""
    longer: int = 160
    """Examples of a prompt in the test of longer prompts."""
    slack: float = 1.0
    """Factor of all thresholds."""
    seed: int = 0
    """Of weights and prompts."""

    def __post_init__(self) -> None:
        least = {"width": 1, "heads": 2, "examples": 2, "longer": 2, "steps": 4, "batch_size": 1}
        for name, value in {**least, "tests": 2}.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}: got {getattr(self, name)}; give at least {value}")
        for name in ("noise", "lr", "slack"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: got {getattr(self, name)}; give a positive number")

    def quick(self) -> InContextConfig:
        """6,000 steps, and thresholds that are three times as wide."""
        return replace(self, steps=6_000, tests=8_192, slack=3.0)


@dataclass(frozen=True)
class RandomFeatureConfig:
    """What the study of random features fits, to photos and to functions that are known."""

    heads: int = 1000
    """M, the random heads."""
    queries: tuple[str, ...] = ("constant", "gap", "cls")
    """Of the head random_feature; cls needs a backbone with a class token."""
    components: int | None = None
    """Principal components of the patches; None keeps all channels."""
    biased: bool = False
    """Draw W around the identity (BRFA) where the query is not constant."""
    folds: int = 4
    """Parts of the photos; each is tested once."""
    seeds: int = 2
    """Draws of the random heads: seeds 0, 1, ..."""
    seed: int = 0
    """Of the folds."""
    scaling: bool = True
    """Also fit functions of random tokens by more and more examples."""
    examples: tuple[int, ...] = (100, 200, 400, 800, 1600)
    """n, the examples to fit such a function by."""
    tests: int = 500
    """Examples to test it on."""
    width: int = 16
    """d of the random tokens."""
    tokens: int = 16
    """N of the random tokens, beside the query."""

    def __post_init__(self) -> None:
        for name, value in {
            "heads": 1,
            "folds": 2,
            "seeds": 1,
            "tests": 2,
            "width": 1,
            "tokens": 1,
        }.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}: got {getattr(self, name)}; give at least {value}")
        if not self.queries or not set(self.queries) <= {"constant", "gap", "cls"}:
            raise ValueError(f"queries: got {self.queries}; choose among constant, gap and cls")
        if len(set(self.queries)) < len(self.queries):
            raise ValueError(f"queries: got one twice in {self.queries}; give each once")
        if (
            not self.examples
            or min(self.examples) < 2
            or list(self.examples) != sorted(set(self.examples))
        ):
            raise ValueError(f"examples: got {self.examples}; give numbers of at least 2 that rise")

    def quick(self) -> RandomFeatureConfig:
        """Few heads, seeds and examples, to see that all runs: no figure of it means anything."""
        return replace(
            self, heads=min(self.heads, 20), folds=2, seeds=2, examples=(20, 40), tests=50
        )
