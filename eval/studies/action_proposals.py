"""Class-semantic attention (CSA) in a boundary-matching network: action proposals with and without it.

    python -m xattn.eval.studies action-proposals

Networks that differ only in their attention are trained on the same sequences: plain BMN, BMN with
squeeze-and-excitation, and BMN with CSA (arXiv 2109.02613) at its three places. The control is CSA
on the evidence of another sequence, which has the same size but carries no information. All of
these read class evidence beside the features, as BMN reads class scores; two more rows read the
features alone. Every seed draws new sequences, so that the Student's t intervals over the seeds
cover both data and training.

AR@n is the share of actions that the best n proposals of a sequence find, averaged over tIoU
thresholds from .5 to .95:

    tIoU(a, b) = |a n b| / |a u b|,     AP = sum_i (recall_i - recall_(i - 1)) max_(j >= i) precision_j

As in the evaluation of ActivityNet, a predicted segment is right if its tIoU with a true action of
its class is at least the threshold, and no segment with a higher score has matched that action
already. Among several such actions it matches the one with the largest tIoU. mAP is the mean over
the classes that occur. In every row, the class of a proposal is the one with the largest mean
evidence in it, and the probability of that class multiplies the score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xattn.eval.bootstrap import t_interval
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.models import bmn
from xattn.eval.studies.models.action_sequences import (
    CHANNELS,
    LONGEST,
    Action,
    Sequences,
    draw_sequences,
)
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import Found, measure_rows, raw_rows, reported
from xattn.eval.studies.small_training import minimize

THRESHOLDS = tuple(np.arange(10, 20) / 20)  # tIoU .5, .55 ... .95
NUMBERS = (1, 2, 5, 10, 40)  # of proposals, in AR@n
CANDIDATES, MOST_FOUND = 200, 40  # segments per sequence, before and after suppression
SPREAD = 0.4  # of soft suppression: a score is multiplied by exp(-tIoU^2 / SPREAD)

Row = Literal["bmn", "bmn-se", "bmn-csa", "bmn-csa-other", "features", "features-csa"]
PAIRS: tuple[tuple[Row, Row], ...] = (
    ("bmn-se", "bmn"),
    ("bmn-csa", "bmn"),
    ("bmn-csa-other", "bmn"),
    ("bmn-csa", "bmn-csa-other"),
    ("bmn", "features"),
    ("features-csa", "features"),
)
"""Pairs of rows whose metrics are compared, the first minus the second, seed by seed."""


class Proposal(NamedTuple):
    """Frames ``start`` to ``end``, the class, and how sure the network is."""

    start: float
    end: float
    kind: int
    score: float


@dataclass(frozen=True)
class ProposalStudyConfig:
    """The sequences, and the networks that are trained on them."""

    length: int = 64  # T, frames of a sequence.
    classes: int = 4  # Kinds of action.
    train: int = 400  # Sequences to train on.
    tests: int = 200  # Sequences to test on.
    steps: int = 150  # Training steps.
    batch_size: int = 16  # Sequences per step.
    lr: float = 4e-3  # Peak learning rate of AdamW.
    width: int = 32  # Channels of the network.
    seeds: int = 5  # Networks of each kind, each with its own sequences: seeds 0, 1, ...
    first_seed: int = 0  # The first seed of the sequences.

    def quick(self) -> ProposalStudyConfig:
        """A few steps on a few sequences; its figures mean nothing."""
        return replace(self, train=12, tests=6, steps=3, batch_size=4, width=8, seeds=2)


DEFAULTS = ProposalStudyConfig()


# ---------------------------------------------------------------------- networks


class Proposer(torch.nn.Module):
    """``net(features, evidence)`` -> what :class:`~xattn.eval.studies.models.bmn.BoundaryMatching` finds.

    Args:
        row: "bmn" rows read evidence beside the features; the rest of the name is the attention.
            "bmn-csa-other" attends by the evidence of the previous sequence in the batch.
    """

    def __init__(self, row: Row, config: ProposalStudyConfig) -> None:
        super().__init__()
        self.beside, self.other = row.startswith("bmn"), row.endswith("-other")
        kind: bmn.Kind = "se" if "-se" in row else "csa" if "-csa" in row else "none"
        channels = CHANNELS + (config.classes if self.beside else 0)
        self.net = bmn.BoundaryMatching(
            channels, config.classes, config.length, LONGEST, config.width, kind
        )

    def forward(self, features: Tensor, evidence: Tensor) -> bmn.Found:
        x = torch.cat([features, evidence], 1) if self.beside else features
        found: bmn.Found = self.net(x, evidence.roll(1, 0) if self.other else evidence)
        return found


def train(
    row: Row, sequences: Sequences, config: ProposalStudyConfig, seed: int
) -> tuple[Proposer, float]:
    """Train a network; return it with the CPU seconds of its training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Proposer(row, config)
    draw = torch.Generator().manual_seed(seed)
    truth = bmn.labels(sequences.actions, config.length, LONGEST)
    valid = bmn.fits(config.length, LONGEST)

    def losses() -> Iterator[Tensor]:
        for _ in range(config.steps):
            batch = torch.randint(len(truth.borders), (config.batch_size,), generator=draw)
            found = net(sequences.features[batch], sequences.evidence[batch])
            yield bmn.loss(found, bmn.Labels(*(part[batch] for part in truth)), valid)

    return net, minimize(net, losses(), config.steps, config.lr, weight_decay=0.01)


# ---------------------------------------------------------------------- proposals


@torch.no_grad()
def propose(net: Callable[..., bmn.Found], sequences: Sequences) -> list[list[Proposal]]:
    """The segments found in each sequence, at most 40, in descending order of score."""
    found = net(sequences.features, sequences.evidence)
    total = torch.nn.functional.pad(sequences.evidence.double().cumsum(2), (1, 0))
    proposals = []
    for borders, segments, evidence in zip(*found, total, strict=True):
        starts, ends, scores = candidates(borders, segments)
        kept, scores = suppress(starts, ends, scores)
        starts, ends = starts[kept], ends[kept]
        mean = (evidence[:, ends] - evidence[:, starts]) / (ends - starts)
        sure, kinds = mean.softmax(0).max(0)
        scores = scores * sure.numpy()
        columns = starts.tolist(), ends.tolist(), kinds.tolist(), scores.tolist()
        some = [Proposal(float(a), float(b), k, s) for a, b, k, s in zip(*columns, strict=True)]
        proposals.append(sorted(some, key=lambda p: -p.score))
    return proposals


def candidates(borders: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
    """Starts, ends and scores p_s p_e sqrt(p_c p_r) of the best 200 segments (2, D, T).

    The ``borders`` (2, T) of these segments are peaks or more than half of the largest. If no segment
    qualifies, only the best one is returned."""
    longest, length = segments.shape[1:]
    around = torch.nn.functional.pad(borders, (1, 1), value=-1.0)
    peak = (borders > around[:, :-2]) & (borders > around[:, 2:])
    peak |= borders > 0.5 * borders.amax(1, keepdim=True)
    valid = bmn.fits(length, longest)
    last = (torch.arange(length) + torch.arange(longest)[:, None]).clamp_max(length - 1)
    scores = borders[0] * borders[1][last] * segments.prod(0).sqrt()
    scores = scores.masked_fill(~(valid & peak[0] & peak[1][last]), -1.0).flatten()
    best, index = scores.topk(min(CANDIDATES, len(scores)))
    index = index[best > 0] if (best > 0).any() else index[:1]
    starts = index % length
    ends = starts + index // length + 1
    return starts, ends.clamp_max(length), scores[index].clamp_min(0).double().numpy()


def suppress(
    starts: Tensor, ends: Tensor, scores: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Soft suppression: the 40 segments that are kept, and their scores, lowered where they overlap
    better ones."""
    a, b = starts.numpy().astype(float), ends.numpy().astype(float)
    shared = np.minimum(b[:, None], b) - np.maximum(a[:, None], a)
    overlap = shared.clip(0) / (np.maximum(b[:, None], b) - np.minimum(a[:, None], a))
    left, kept, final = scores.copy(), [], []
    for _ in range(min(MOST_FOUND, len(scores))):
        best = int(left.argmax())
        kept.append(best)
        final.append(left[best])
        left *= np.exp(-(overlap[best] ** 2) / SPREAD)
        left[best] = -1.0
    return np.array(kept), np.array(final)


# ---------------------------------------------------------------------- metrics


def tiou(a: Action | Proposal, b: Action | Proposal) -> float:
    """Temporal IoU: the time that both share over the time that either covers."""
    shared = min(a.end, b.end) - max(a.start, b.start)
    return max(shared, 0.0) / (max(a.end, b.end) - min(a.start, b.start)) if shared > 0 else 0.0


def average_recall(
    found: Sequence[Sequence[Proposal]], there: Sequence[Sequence[Action]], number: int
) -> float:
    """AR@number: the share of actions that the first ``number`` proposals of their sequence find,
    whatever the class, averaged over the thresholds."""
    best = [
        max((tiou(proposal, action) for proposal in some[:number]), default=0.0)
        for some, actions in zip(found, there, strict=True)
        for action in actions
    ]
    return float(np.mean([np.array(best) >= threshold for threshold in THRESHOLDS]))


def mean_average_precision(
    found: Sequence[Sequence[Proposal]],
    there: Sequence[Sequence[Action]],
    classes: int,
    threshold: float = 0.5,
) -> float:
    """The mean AP over the classes that occur; NaN if none does."""
    values = []
    for kind in range(classes):
        total, rows = 0, []
        for some, truth in zip(found, there, strict=True):
            left = [action for action in truth if action.kind == kind]
            total += len(left)
            for segment in sorted(some, key=lambda s: -s.score):
                if segment.kind != kind:
                    continue
                best = max(left, key=lambda action: tiou(segment, action), default=None)
                right = best is not None and tiou(segment, best) >= threshold
                if best is not None and right:
                    left.remove(best)
                rows.append((segment.score, right))
        rows.sort(key=lambda row: -row[0])
        right_ones = np.array([right for _, right in rows], float)
        precision = right_ones.cumsum() / np.arange(1, len(rows) + 1)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        if total:
            values.append(float((right_ones * envelope).sum() / total))
    return float(np.mean(values)) if values else float("nan")


# ---------------------------------------------------------------------- study


def study(
    output: OutputAt = "runs/study-action-proposals",
    config: ProposalStudyConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Train and measure what is not finished yet, write report.md, and yield its lines."""
    config = config.quick() if quick else config
    rows: dict[str, Callable[[Split, int], dict[str, Any]]] = {
        row: partial(measure, row, config) for row in get_args(Row)
    }
    settings = {key: value for key, value in asdict(config).items() if key != "seeds"}
    found = measure_rows(Path(output), settings, rows, config.seeds)
    yield from reported(Path(output), [*_report(found, config)], {"values": raw_rows(found)})


def measure(row: Row, config: ProposalStudyConfig, split: Split, seed: int) -> dict[str, Any]:
    """Train a network on the training sequences of ``seed``, and test it on others."""
    learned, tested = (
        draw_sequences(count, config.length, config.classes, 2 * (config.first_seed + seed) + part)
        for part, count in enumerate((config.train, config.tests))
    )
    net, seconds = train(row, split.fit(learned), config, seed)
    tested = split.score(tested)
    proposals, there = propose(net, tested), tested.actions
    precise = [
        mean_average_precision(proposals, there, config.classes, threshold)
        for threshold in THRESHOLDS
    ]
    return {
        "seconds": seconds,
        "parameters": sum(p.numel() for p in net.parameters()),
        **{f"AR@{number}": average_recall(proposals, there, number) for number in NUMBERS},
        "mAP": float(np.mean(precise)),
        **{
            f"mAP@{threshold:.2f}": value
            for threshold, value in zip(THRESHOLDS, precise, strict=True)
        },
    }


def _report(found: Found, config: ProposalStudyConfig) -> Iterator[str]:
    yield (
        f"{config.train} sequences of {config.length} frames to train on, {config.tests} to test, "
        f"{config.classes} classes; {config.steps} steps, {config.seeds} seeds"
    )
    shown = ("AR@1", "AR@2", "AR@5", "AR@10", "AR@40", "mAP", "mAP@0.50", "mAP@0.75", "mAP@0.95")
    yield f"\n| network | {' | '.join(shown)} |"
    yield f"| :-- |{' --: |' * len(shown)}"
    for row in get_args(Row):
        means = [t_interval([run[name] for run in found[row]]).text(3) for name in shown]
        yield f"| {row} | {' | '.join(means)} |"
    compared = ("AR@1", "AR@2", "AR@5", "AR@40", "mAP", "mAP@0.50")
    yield f"\n| network | less | {' | '.join(compared)} | mAP, relative |"
    yield f"| :-- | :-- |{' --: |' * (len(compared) + 1)}"
    for row, control in PAIRS:
        cells = [_less(found, row, control, name) for name in compared]
        ratio = t_interval(
            [100 * (a["mAP"] / max(b["mAP"], 1e-9) - 1) for a, b in _pairs(found, row, control)]
        )
        relative = f"{ratio.mean:+.1f} % [{ratio.lo:+.1f}, {ratio.hi:+.1f}]"
        yield f"| {row} | {control} | {' | '.join([*cells, relative])} |"
    yield "\n| network | parameters | CPU seconds |"
    yield "| :-- | --: | --: |"
    for row in get_args(Row):
        seconds = t_interval([run["seconds"] for run in found[row]])
        yield f"| {row} | {found[row][0]['parameters']:,} | {seconds.mean:.1f} |"


def _pairs(found: Found, row: str, control: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    return zip(found[row], found[control], strict=True)


def _less(found: Found, row: str, control: str, name: str) -> str:
    gap = t_interval([a[name] - b[name] for a, b in _pairs(found, row, control)])
    return f"{gap.mean:+.3f} [{gap.lo:+.3f}, {gap.hi:+.3f}]"
