"""What heads learn of a teacher's orders: sequences of cells with their end, or weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.backbone import Backbone
from xattn.correlation import ranks
from xattn.eval.studies.small_training import minimize
from xattn.heads.pointer import Cells, Pointer


@dataclass(frozen=True)
class OrderStudyConfig:
    """Photos, the teacher of orders, and the heads that learn from it."""

    photos: int = 400
    """To learn from, at most."""
    tested: int = 100
    """Others, which are tested and have two independent teachers."""
    cells: int = 7
    """Of a side; a divisor of the ViT's grid."""
    passes: int = 120
    """Of the network with cells left out for each photo, half of them complements."""
    ridge: float = 10.0
    """Of the regression."""
    target: Literal["p", "logit"] = "p"
    """What is regressed and the order goes by: p of the predicted class, or its centred logit."""
    draws: int = 3
    """Heads of each kind: seeds 0, 1, ..."""
    epochs: int = 10
    """Passes over the photos' orders."""
    seed: int = 0
    """Of the draw of photos."""

    def quick(self) -> OrderStudyConfig:
        """A few photos: no figure of it means anything."""
        return replace(self, photos=4, tested=2, draws=1, epochs=1)


BATCH, LR = 32, 1e-3
KINDS = ("pointer", "likelihood", "likelihood, memory", "regression")
"""A pointer head by the expected area of insertion, if weights add up, and the end symbol by whether each
cell comes before it; by the likelihood of the teacher's sequences, without memory and with it; and the same
network by the squared error of standardised weights, which has no end."""


class Lessons(NamedTuple):
    """Of photos (n,) to learn from: what a head reads, the teacher's ``weights`` (n, N), and ``kept`` (n,),
    the fewest cells of its order that restore the prediction."""

    cells: Cells
    weights: Tensor
    kept: Tensor

    @property
    def sequences(self) -> Tensor:
        """(n, N + 1): the cells by falling weight, the end symbol N behind those that are kept."""
        return with_end(self.weights.argsort(dim=1, descending=True, stable=True), self.kept)

    @property
    def mean_ranks(self) -> Tensor:
        """(N,): of the weights; the mean order is that of falling ones."""
        return ranks(self.weights).nanmean(0)


class Learned(NamedTuple):
    """A trained ``head`` and the CPU ``seconds`` of its training."""

    head: Pointer
    seconds: float


def with_end(orders: Tensor, kept: Tensor) -> Tensor:
    """``orders`` (n, N) with the end symbol N behind the first ``kept`` (n,) cells, (n, N + 1).

    >>> with_end(torch.tensor([[2, 0, 1]]), torch.tensor([1]))
    tensor([[2, 3, 0, 1]])
    """
    place = torch.arange(orders.shape[1] + 1, device=orders.device).expand(len(orders), -1)
    before = (place - (place > kept[:, None]).long()).clamp_max(orders.shape[1] - 1)
    return torch.where(place == kept[:, None], orders.shape[1], orders.gather(1, before))


def learn(
    kind: str, backbone: Backbone, lessons: Lessons, config: OrderStudyConfig, seed: int
) -> Learned:
    """A head of one of :data:`KINDS`, trained on ``lessons``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Pointer(backbone, config.cells, memory=kind == "likelihood, memory")
    cells, sequences = lessons.cells, lessons.sequences
    aims = lessons.weights.float()
    aims = aims - aims.mean(1, keepdim=True)
    scale = aims.std(1, keepdim=True)
    before_end = sequences.argsort(1)[:, :-1] < lessons.kept[:, None]

    def likelihood(index: Tensor) -> Tensor:
        return -head.log_likelihood(cells.of(index), sequences[index]).mean()

    def error(index: Tensor) -> Tensor:
        return F.mse_loss(head.scores(cells.of(index))[:, 0, :-1], aims[index] / scale[index])

    def area(index: Tensor) -> Tensor:
        scores = head.scores(cells.of(index))[:, 0]
        lost = (aims[index] / scale.mean() * expected_places(scores[:, :-1])).sum(1).mean()
        above = scores[:, :-1].detach() - scores[:, -1:]
        ends = F.binary_cross_entropy_with_logits(above, before_end[index].to(above.dtype))
        return lost / aims.shape[1] + ends

    losses = {"pointer": area, "regression": error}
    return Learned(head, fit(head, losses.get(kind, likelihood), len(aims), config.epochs, seed))


def expected_places(scores: Tensor) -> Tensor:
    """(B, N): how many elements come before each, in the mean over orders of Plackett and Luce with
    ``scores`` (B, N). Of two elements j comes before i with probability sigmoid(s_j - s_i).

    >>> expected_places(torch.tensor([[50.0, 0.0, 0.0]]))
    tensor([[0.0000, 1.5000, 1.5000]])
    """
    return (scores[:, None] - scores[:, :, None]).sigmoid().sum(2) - 0.5


def fit(
    head: Pointer, loss: Callable[[Tensor], Tensor], count: int, epochs: int, seed: int
) -> float:
    """Train ``head`` by ``loss`` of some of ``count`` photos, by number, and give the CPU seconds."""
    generator = torch.Generator().manual_seed(seed)
    losses = (
        loss(index)
        for _ in range(epochs)
        for index in torch.randperm(count, generator=generator).split(BATCH)
    )
    steps = epochs * -(-count // BATCH) + 1
    return minimize(head, losses, steps, LR, weight_decay=0.05, rise=0.3)


def kept_cells(sequences: Tensor) -> Tensor:
    """How many cells stand before the end symbol of (n, N + 1), (n,), at least 1."""
    return (sequences == sequences.shape[1] - 1).long().argmax(1).clamp_min(1)


def without_end(sequences: Tensor) -> Tensor:
    """The cells (n, N) of (n, N + 1) alone, in order."""
    count = sequences.shape[1] - 1
    return sequences[sequences != count].view(len(sequences), count)


def first_that_suffices(same: Sequence[bool], steps: Sequence[int]) -> int:
    """The first of ``steps`` at which the prediction is ``same``, at least 1 cell."""
    return max(1, next(k for k, found in zip(steps, same, strict=True) if found))
