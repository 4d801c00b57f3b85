"""The network of the length study: one layer of causal attention that mixes each key with the two before.

    z = e(tokens),   k_i = sum_(m = 0, 1, 2) w_m * (W z + b)_(i - m),   outputs = O (z + attention)

w_m has one number per channel: a depthwise causal convolution of width 3. It lets a value's key be that
of the token before it, so that one layer can look values up. There is no other encoding of positions,
no norm and no MLP. Fu et al., arXiv 2212.14052, shift keys for the same reason.

The tasks can have any length. Each defines its questions, the score of an answer, and chance:

    recall       ... k1 v1 ... . k2 v2 . ... | . k2 . . k1 ...      at a repeated key: its value
    regression   x1 y1 x2 y2 ...,  y = w . x / sqrt(D) + noise      at every x: its y

``recall`` is multi-query associative recall as in Zoology (Arora et al., arXiv 2312.04927): each key of
a sequence occurs once with its value and once as a query, without the value. Pairs are at random
places in the first half, queries at random places in the second; the other places have filler words,
which are neither keys nor values. Zoology puts all pairs first and most queries soon after; here gaps
grow with the length. ``regression`` draws w and x from N(0, 1) anew for each sequence (Garg et al.,
arXiv 2208.01066).
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
    """Sequences, and the questions in them."""

    tokens: Tensor
    """(B, N) words, or (B, N, C)."""
    asked: Tensor
    """(B, N) bool: the tokens at which there is a question, equally many in each sequence."""
    targets: Tensor
    """(B, Q): the answers, in order."""


class Task(Protocol):
    """A task that a network is trained and tested on."""

    name: ClassVar[str]
    higher_is_better: ClassVar[bool]

    @property
    def outputs(self) -> int:
        """How many numbers the network outputs at each token."""

    def forms(self) -> tuple[str, ...]:
        """The ways in which sequences become longer."""

    def tokens_in(self, width: int) -> nn.Module:
        """A module that turns tokens into vectors (B, N, ``width``)."""

    def draw(self, length: int, count: int, seed: int, form: str = FIXED) -> Batch:
        """``count`` sequences for training, a pure function of the arguments."""

    def draw_test(self, length: int, count: int, seed: int, form: str = FIXED) -> Batch:
        """``count`` sequences for testing, likewise."""

    def loss(self, found: Tensor, targets: Tensor) -> Tensor:
        """The loss of outputs ``found`` (B, Q, outputs), a scalar."""

    def scores(self, found: Tensor, targets: Tensor) -> Tensor:
        """(B,): the score of each sequence; their mean is the score of the task."""

    def baselines(self, batch: Batch) -> dict[str, float]:
        """The scores of answers that need no network, by name."""


@dataclass(frozen=True)
class Recall:
    """Multi-query associative recall, scored by the share of right answers.

    Args:
        pairs: the number of pairs of a key and its value in ``per`` tokens. In longer sequences it
            stays the same in the form "fixed", and grows in proportion in the form "growing".
        keys, values, fillers: the number of words of each kind.
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
        """The number of pairs in a sequence."""
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
        """``chance``: a guess among all values, which are equally likely."""
        return {"chance": 1 / self.values}


@dataclass(frozen=True)
class Regression:
    """In-context linear regression, scored by the squared error in units of the variance of w . x.

    Args:
        width: D, the number of inputs in an x.
        noise: standard deviation of the noise on y; without noise, y has standard deviation 1.
        tested: how many questions at the end of a sequence count in a test; they ask for w . x
            without noise.
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
        """Sequences whose tokens (B, N, D + 2) are (x, 0, 0) and (0, y, 1) in turn."""
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
        """``mean``: the answer 0. ``ridge``: the fit to all earlier examples with ridge D noise^2, which
        is the best that any method can expect."""
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
    """(count, some): distinct whole numbers below ``of`` in random order."""
    return torch.rand(count, of, generator=random).argsort(1)[:, :some]


LengthTask = Literal["recall", "regression"]


@dataclass(frozen=True)
class LengthStudyConfig:
    """Which networks the length study trains, for how long, and at which lengths it tests them."""

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
    """Multi-query associative recall, and in-context linear regression."""
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384)
    """The lengths, in tokens, of the test sequences."""
    longest: dict[str, int] = field(default_factory=lambda: {"lla": 4096})
    """The greatest length at which a mechanism is tested, by its name."""
    train_length: int = 256  # Tokens of a training sequence.
    steps: int = 300  # Training steps.
    minutes: float = 2.0
    """Limit of processor time, after which training stops early; the report then says so."""
    batch_size: int = 8  # Sequences per step.
    learning_rates: tuple[float, ...] = (0.005, 0.02)
    """Peak rates to choose from for each mechanism and task, on other sequences and with another seed."""
    seeds: int = 3  # Networks of each mechanism and task.
    width: int = 64  # Channels.
    heads: int = 1  # Heads of attention.
    pairs: int = 16  # Pairs of keys and values in a training sequence.
    test_tokens: int = 32768  # Tokens of all sequences in a test, at least.
    least_sequences: int = 4  # The fewest sequences in a test.

    def sequences(self, length: int) -> int:
        """The number of test sequences at a length."""
        return max(self.least_sequences, -(-self.test_tokens // length))

    def quick(self) -> LengthStudyConfig:
        """A few steps on short sequences, to see that everything runs; its figures mean nothing."""
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
    """y_i = sum_m w_m * x_(i - m), with a weight per channel for each of the last three tokens."""

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
        self.attention.k_norm = ShortConvolution(heads, width // heads)  # keys pass through it
        self.outputs = nn.Linear(width, task.outputs)

    def forward(self, batch: Batch) -> Tensor:
        """(B, Q, outputs): the outputs at the tokens where there is a question."""
        z = self.tokens(batch.tokens)
        y = z + self.attention(z, grid=(z.shape[1],), causal=True)
        return self.outputs(y[batch.asked].unflatten(0, (len(z), -1)))  # type: ignore[no-any-return]


class Training(NamedTuple):
    """Facts about a training run."""

    steps: int
    seconds: float
    """Of processor time."""
    loss: float
    """The mean loss over the last twentieth of the steps."""


def made(mechanism: str, task: Task, seed: int, config: LengthStudyConfig) -> LengthNetwork:
    """An untrained network, which depends only on the arguments."""
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
    """Train in place, with a step for each of ``seeds``, for at most ``config.minutes`` of CPU time."""
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
    """The seeds for the sequences of each step, for a network with ``seed``."""
    return [_seed("training", seed, step) for step in range(config.steps)]


def held_out(
    task: Task, stream: str, length: int, config: LengthStudyConfig, split: Split, form: str = FIXED
) -> Batch:
    """Sequences that no network is trained on, the same for all mechanisms and seeds. ``stream`` is
    "test", or "validation" for choosing learning rates."""
    take = split.choose if stream == "validation" else split.score
    (seed,) = take([_seed(stream, 0, length)])
    return task.draw_test(length, config.sequences(length), seed, form)


@torch.no_grad()
def scores(network: LengthNetwork, task: Task, batch: Batch) -> Tensor:
    """(B,): the score of each sequence."""
    some = max(1, AT_ONCE // batch.tokens.shape[1])
    parts = zip(*(x.split(some) for x in batch), strict=True)
    found = torch.cat([network(Batch(*part)) for part in parts])
    return task.scores(found, batch.targets)


def _seed(stream: str, seed: int, step: int) -> int:
    return (STREAMS[stream] * 10_007 + seed) * 1_000_003 + step
