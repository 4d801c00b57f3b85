"""The network of the length study: one layer of causal attention, whose keys are mixed with the two before.

    z = e(tokens),   k_i = sum_(m = 0, 1, 2) w_m * (W z + b)_(i - m),   outputs = O (z + attention)

w_m has a number for each channel: a depthwise causal convolution of width 3. So the key of a value can be
that of the token before it, and one layer can look values up. There is no other encoding of positions,
no norm and no network behind. Fu et al., arXiv 2212.14052, shift keys for the same reason.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from xattn.attention import create_attention
from xattn.attention.model.spec import parse_mechanism
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.length.tasks import FIXED, Batch, Task
from xattn.training.distilling import share_of_peak

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
    train_length: int = 256
    """Tokens of the sequences that are trained on."""
    steps: int = 300
    """Of training."""
    minutes: float = 2.0
    """Of processor time, after which a training ends before its last step; the report then says so."""
    batch_size: int = 8
    """Sequences a step."""
    learning_rates: tuple[float, ...] = (0.005, 0.02)
    """Peaks to choose from, for each mechanism and task, by other sequences and another seed."""
    seeds: int = 3
    """Networks of each mechanism and task."""
    width: int = 64
    """Channels."""
    heads: int = 1
    """Heads of attention."""
    pairs: int = 16
    """Of keys and values in a sequence as long as in training."""
    test_tokens: int = 32768
    """Tokens of all sequences of a test, at least."""
    least_sequences: int = 4
    """The fewest sequences of a test."""

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

    Raises:
        ValueError: no such mechanism or option, or it has no causal form.
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
    """Train in place, a step for each of ``seeds``, or until ``config.minutes`` of processor time are over.

    Raises:
        RuntimeError: a loss that is not finite.
    """
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
