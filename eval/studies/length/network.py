"""The network of the length study: one layer of causal attention, whose keys are mixed with the two before.

    z = e(tokens),   k_i = sum_(m = 0, 1, 2) w_m * (W z + b)_(i - m),   outputs = O (z + attention)

w_m has a number for each channel: a depthwise causal convolution of width 3. So the key of a value can be
that of the token before it, and one layer can look values up. There is no other encoding of positions,
no norm and no network behind. Fu et al., arXiv 2212.14052, shift keys for the same reason.

Tasks of any length for the length study: what is asked, how an answer is scored, and what chance gives.

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
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from xattn.attention import create_attention
from xattn.attention.model.spec import parse_mechanism
from xattn.eval.evaluation.split import Split
from xattn.training.optimizers import share_of_peak

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
        """Pairs in a sequence."""
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


LengthTask = Literal["recall", "regression"]


@dataclass(frozen=True)
class LengthStudyConfig:
    """What the length study trains, how long, and at which lengths it tests."""

    mechanisms: tuple[str, ...] = (
        "softmax",
        "flow",
        "hedgehog",
        "based",
        "lla",
        "lssar",
        "lssar:power=3",
        "nsa",
    )
    """Mechanisms with a causal form, as NAME:option=value,..."""
    tasks: tuple[LengthTask, ...] = ("recall", "regression")
    """Associative recall of many queries, and linear regression in context."""
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384)
    """Tokens of the sequences that are tested."""
    longest: dict[str, int] = field(default_factory=lambda: {"lla": 4096})
    """The most tokens that a mechanism is tested at, by its name."""
    train_length: int = 256  # Tokens of the sequences that are trained on.
    steps: int = 300  # Of training.
    minutes: float = 2.0
    """Of processor time, after which a training ends before its last step; the report then says so."""
    batch_size: int = 8  # Sequences a step.
    learning_rates: tuple[float, ...] = (0.005, 0.02)
    """Peaks to choose from, for each mechanism and task, by other sequences and another seed."""
    seeds: int = 3  # Networks of each mechanism and task.
    width: int = 64  # Channels.
    heads: int = 1  # Heads of attention.
    pairs: int = 16  # Of keys and values in a sequence as long as in training.
    test_tokens: int = 32768  # Tokens of all sequences of a test, at least.
    least_sequences: int = 4  # The fewest sequences of a test.

    def sequences(self, length: int) -> int:
        """How many are tested at a length."""
        return max(self.least_sequences, -(-self.test_tokens // length))

    def quick(self) -> LengthStudyConfig:
        """A few steps on short sequences, to see that all runs: no figure of it means anything."""
        return replace(
            self, lengths=(32, 64), train_length=32, steps=4, batch_size=2, seeds=1,
            learning_rates=self.learning_rates[:1], width=16, pairs=2, test_tokens=64,
            least_sequences=2,
        )  # fmt: skip


TAPS = 3  # of the convolution
LONGEST_GRADIENT = 1.0
STREAMS = {
    "training": 0,
    "validation": 1,
    "test": 2,
}  # of random numbers, so that none is used twice
AT_ONCE = 16_384  # tokens that are tested at once


class ShortConvolution(nn.Module):
    """y_i = sum_m w_m * x_(i - m), a number for each channel and each of the last three tokens."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        bound = TAPS**-0.5
        self.weight = nn.Parameter(torch.empty(TAPS, heads, 1, width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N, D) -> (B, H, N, D)."""
        before = F.pad(x, (0, 0, TAPS - 1, 0))
        y = x * self.weight[0]
        for m in range(1, TAPS):
            shifted = before[:, :, TAPS - 1 - m :][:, :, : x.shape[2]]
            y = torch.addcmul(y, shifted, self.weight[m])
        return y


class LengthNetwork(nn.Module):
    """One layer of attention between embedded tokens and a linear map; see the module.

    Args:
        mechanism: NAME:option=value,..., with a causal form.
    """

    def __init__(self, mechanism: str, task: Task, width: int, heads: int) -> None:
        super().__init__()
        name, options = parse_mechanism(mechanism)
        self.tokens = task.tokens_in(width)
        self.attention = create_attention(name, width, heads, **options)
        if not self.attention.mechanism.entry.causal:
            raise ValueError(f"mechanisms: {name} has no causal form; choose others")
        self.attention.k_norm = ShortConvolution(heads, width // heads)  # what keys go through
        self.outputs = nn.Linear(width, task.outputs)

    def forward(self, batch: Batch) -> Tensor:
        """(B, Q, outputs) at the tokens where there is a question."""
        z = self.tokens(batch.tokens)
        y = z + self.attention(z, grid=(z.shape[1],), causal=True)
        return self.outputs(y[batch.asked].unflatten(0, (len(z), -1)))  # type: ignore[no-any-return]


class Training(NamedTuple):
    """How a training went."""

    steps: int
    seconds: float
    """Of processor time."""
    loss: float
    """Mean over the last twentieth of the steps."""


def made(mechanism: str, task: Task, seed: int, config: LengthStudyConfig) -> LengthNetwork:
    """An untrained network; the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LengthNetwork(mechanism, task, config.width, config.heads)


def train(
    network: LengthNetwork,
    task: Task,
    lr: float,
    seeds: Sequence[int],
    config: LengthStudyConfig,
    title: str = "",
    progress: bool = True,
) -> Training:
    """Train in place, a step for each of ``seeds``, or until ``config.minutes`` of CPU time are over."""
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    start, losses = time.process_time(), []
    with tqdm(total=config.steps, desc=title, unit="step", disable=not progress) as bar:
        for step, seed in enumerate(seeds):
            for group in optimizer.param_groups:
                group["lr"] = lr * share_of_peak(step, config.steps)
            batch = task.draw(config.train_length, config.batch_size, seed)
            loss = task.loss(network(batch), batch.targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), LONGEST_GRADIENT)
            optimizer.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"{title}: the loss of step {step} is {losses[-1]}")
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update()
            if time.process_time() - start >= 60 * config.minutes:
                break
    seconds = time.process_time() - start
    last = losses[-max(1, len(losses) // 20) :]
    return Training(len(losses), seconds, sum(last) / len(last))


def training_seeds(seed: int, config: LengthStudyConfig) -> list[int]:
    """Of the sequences of each step, for a network of ``seed``."""
    return [_seed("training", seed, step) for step in range(config.steps)]


def held_out(
    task: Task, stream: str, length: int, config: LengthStudyConfig, split: Split, form: str = FIXED
) -> Batch:
    """Sequences that no network is trained on, the same for all mechanisms and seeds: of the stream "test",
    or of "validation", by which learning rates are chosen."""
    take = split.choose if stream == "validation" else split.score
    (seed,) = take([_seed(stream, 0, length)])
    return task.draw_test(length, config.sequences(length), seed, form)


@torch.no_grad()
def scores(network: LengthNetwork, task: Task, batch: Batch) -> Tensor:
    """(B,): of each sequence."""
    some = max(1, AT_ONCE // batch.tokens.shape[1])
    parts = zip(*(x.split(some) for x in batch), strict=True)
    found = torch.cat([network(Batch(*part)) for part in parts])
    return task.scores(found, batch.targets)


def _seed(stream: str, seed: int, step: int) -> int:
    return (STREAMS[stream] * 10_007 + seed) * 1_000_003 + step
