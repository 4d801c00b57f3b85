"""Tasks of any length for the length study: what is asked, how an answer is scored, and what chance gives.

    recall       ... k1 v1 ... . k2 v2 . ... | . k2 . . k1 ...      at a key that comes again: its value
    regression   x1 y1 x2 y2 ...,  y = w . x / sqrt(D) + noise      at every x: its y

``recall`` is multi-query associative recall as in Zoology (Arora et al., arXiv 2312.04927): each key of a
sequence comes with its value once, is asked for once, and its value is never written there. Pairs stand at
random places of the first half, queries at random places of the second, and what is left is filler, words
of its own. Zoology puts all pairs first and most queries soon after; here gaps grow with the length.
``regression`` draws w and x from N(0, 1) anew for each sequence (Garg et al., arXiv 2208.01066).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIXED, GROWING = "fixed", "growing"


class Batch(NamedTuple):
    """Sequences and what is asked in them."""

    tokens: Tensor
    """(B, N) words, or (B, N, C)."""
    asked: Tensor
    """(B, N) bool: the tokens at which there is a question, as many in each sequence."""
    targets: Tensor
    """(B, Q): the answers, in order."""


class Task(Protocol):
    """What a network is trained for and tested on."""

    name: ClassVar[str]
    higher_is_better: ClassVar[bool]

    @property
    def outputs(self) -> int:
        """Numbers that the network gives at each token."""

    def forms(self) -> tuple[str, ...]:
        """In which ways sequences become longer."""

    def tokens_in(self, width: int) -> nn.Module:
        """What makes vectors (B, N, ``width``) of tokens."""

    def draw(self, length: int, count: int, seed: int, form: str = FIXED) -> Batch:
        """``count`` sequences, a pure function of the arguments; for training."""

    def draw_test(self, length: int, count: int, seed: int, form: str = FIXED) -> Batch:
        """The same for tests."""

    def loss(self, found: Tensor, targets: Tensor) -> Tensor:
        """Of outputs (B, Q, outputs), a scalar."""

    def scores(self, found: Tensor, targets: Tensor) -> Tensor:
        """(B,): of each sequence, so that their mean is the score."""

    def baselines(self, batch: Batch) -> dict[str, float]:
        """Scores without a network."""


@dataclass(frozen=True)
class Recall:
    """Multi-query associative recall; scored by the share of right answers.

    Args:
        pairs: of a key and its value in ``per`` tokens. With more tokens there are as many in the form
            "fixed", and more in proportion in the form "growing".
        keys, values, fillers: numbers of words of each kind.
    """

    pairs: int = 16
    per: int = 256
    keys: int = 1024
    values: int = 64
    fillers: int = 64
    name: ClassVar[str] = "recall"
    higher_is_better: ClassVar[bool] = True

    @property
    def outputs(self) -> int:
        return self.values

    def forms(self) -> tuple[str, ...]:
        return FIXED, GROWING

    def tokens_in(self, width: int) -> nn.Module:
        return nn.Embedding(self.keys + self.values + self.fillers, width)

    def count(self, length: int, form: str) -> int:
        """Pairs in a sequence.

        Raises:
            ValueError: they do not fit into its first half, or there are not as many keys.
        """
        pairs = self.pairs if form == FIXED else self.pairs * length // self.per
        if not 1 <= pairs <= length // 4:
            raise ValueError(
                f"pairs: got {pairs} for {length} tokens; give 1 to a quarter, {length // 4}"
            )
        if pairs > self.keys:
            raise ValueError(
                f"pairs: got {pairs} of {self.keys} keys; give fewer, or shorter lengths"
            )
        return pairs

    def draw(self, length: int, count: int, seed: int, form: str = FIXED) -> Batch:
        pairs, half = self.count(length, form), length // 2
        random = torch.Generator().manual_seed(seed)
        first_filler = self.keys + self.values
        tokens = torch.randint(
            first_filler, first_filler + self.fillers, (count, length), generator=random
        )
        keys = _distinct(self.keys, pairs, count, random)
        values = torch.randint(self.values, (count, pairs), generator=random)
        places = 2 * _distinct(half // 2, pairs, count, random)
        tokens.scatter_(1, places, keys).scatter_(1, places + 1, self.keys + values)
        places = half + _distinct(length - half, pairs, count, random)
        tokens.scatter_(1, places, keys)
        order = places.argsort(1)
        asked = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, places, True)
        return Batch(tokens, asked, values.gather(1, order))

    draw_test = draw

    def loss(self, found: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(found.flatten(0, 1), targets.flatten())

    def scores(self, found: Tensor, targets: Tensor) -> Tensor:
        return (found.argmax(2) == targets).double().mean(1)

    def baselines(self, batch: Batch) -> dict[str, float]:
        """``chance``: any value, as often right as any other."""
        return {"chance": 1 / self.values}


@dataclass(frozen=True)
class Regression:
    """Linear regression in context; scored by the squared error, in units of the variance of w . x.

    Args:
        width: D, numbers in an x.
        noise: standard deviation of what is added to y, whose own is 1.
        tested: the last questions of a sequence, which alone count in a test. They ask for w . x, which
            has no noise.
    """

    width: int = 8
    noise: float = 0.5
    tested: int = 32
    name: ClassVar[str] = "regression"
    higher_is_better: ClassVar[bool] = False

    @property
    def outputs(self) -> int:
        return 1

    def forms(self) -> tuple[str, ...]:
        return (FIXED,)

    def tokens_in(self, width: int) -> nn.Module:
        return nn.Linear(self.width + 2, width)

    def draw(self, length: int, count: int, seed: int, form: str = FIXED) -> Batch:
        return self._draw(length, count, seed, test=False)

    def draw_test(self, length: int, count: int, seed: int, form: str = FIXED) -> Batch:
        return self._draw(length, count, seed, test=True)

    def _draw(self, length: int, count: int, seed: int, test: bool) -> Batch:
        """Tokens (B, N, D + 2) are (x, 0, 0) and (0, y, 1) by turns."""
        if length < 4 or length % 2:
            raise ValueError(f"lengths: got {length}; give even numbers of 4 or more, x and y")
        random = torch.Generator().manual_seed(seed)
        examples = length // 2
        weight = torch.randn(count, self.width, 1, generator=random)
        x = torch.randn(count, examples, self.width, generator=random)
        clean = (x @ weight)[..., 0] / math.sqrt(self.width)
        y = clean + self.noise * torch.randn(count, examples, generator=random)
        tokens = torch.zeros(count, examples, 2, self.width + 2)
        tokens[:, :, 0, : self.width] = x
        tokens[:, :, 1, self.width] = y
        tokens[:, :, 1, self.width + 1] = 1
        asked = torch.zeros(count, length, dtype=torch.bool)
        first = max(0, examples - self.tested) if test else 0
        asked[:, 2 * first :: 2] = True
        return Batch(tokens.flatten(1, 2), asked, (clean if test else y)[:, first:])

    def loss(self, found: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(found[..., 0], targets)

    def scores(self, found: Tensor, targets: Tensor) -> Tensor:
        errors = (found[..., 0].double() - targets.double()).square().mean(1)
        return errors / targets.double().square().mean()

    def baselines(self, batch: Batch) -> dict[str, float]:
        """``mean``: the answer 0. ``ridge``: the fit to all earlier examples with the ridge
        D noise^2, the best that any method can expect."""
        examples = batch.tokens.double().unflatten(1, (-1, 2))
        x, y = examples[:, :, 0, : self.width], examples[:, :, 1, self.width]
        first = x.shape[1] - batch.targets.shape[1]
        start = x[:, :first]
        moment = start.mT @ start + self.width * self.noise**2 * torch.eye(self.width).double()
        sums = start.mT @ y[:, :first, None]
        found = []
        for i in range(first, x.shape[1]):
            row = x[:, i, :, None]
            found.append((row.mT @ torch.linalg.solve(moment, sums))[:, :, 0])
            moment, sums = moment + row @ row.mT, sums + row * y[:, i, None, None]
        ridge = self.scores(torch.stack(found, 1), batch.targets)
        return {"mean": 1.0, "ridge": float(ridge.mean())}


def _distinct(of: int, some: int, count: int, random: torch.Generator) -> Tensor:
    """(count, some): different whole numbers below ``of`` in random order."""
    return torch.rand(count, of, generator=random).argsort(1)[:, :some]
