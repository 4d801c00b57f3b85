"""Class-semantic attention over time: actions in generated sequences, found with it and without.

    python -m xattn.eval.studies actions

Detectors that differ in one thing alone are trained on the same sequences: no attention, squeeze-and-
excitation, CSA on class evidence, evidence concatenated to the features, and concatenated with CSA. They
are tested on 200 other sequences by mean average precision at a tIoU of .5. Intervals resample the
sequences. Of CSA also its weights over time are measured: inside actions and outside.

Temporal average precision: segments found in time against segments that are there.

    tIoU(a, b) = |a n b| / |a u b|,     AP = sum_i (recall_i - recall_(i - 1)) max_(j >= i) precision_j

A segment found is right if its tIoU with one of its class that is there, and not yet taken by a segment of
higher score, is at least the threshold; of several it takes the one with the largest tIoU. The mean is over
the classes that are there. As in the evaluation of ActivityNet.

A detector of actions in sequences: every frame says which class it is in, and how far its ends are.

    (R, F) -> convolutions -> attention of one kind or none -> convolution -> class (K + 1), distances (2)

Frames within an action of training answer for it. In tests the segments of all frames are thinned out: of
those of one class that overlap, the surest stays.

Sequences with actions in them: frame features that show where, class evidence that shows which.

A sequence has one to four actions of K classes, apart from each other, 8 to 32 frames long. Its features
hold, in noise, a pattern at the start and one at the end that all classes share, one for the inside, and
the class itself, faintly. Class evidence is what a recognition network would give: the class of each
frame, clearer than in the features but averaged over 9 frames, so that borders are blurred. Some of
what looks like an action in the features is none (distractors), which only the evidence tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from xattn.eval.bootstrap import Interval, mean_interval
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.kept import Found, measure_rows, raw_rows, reported, spread
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.small_training import minimize
from xattn.heads.probing.csa import ClassSemanticAttention

CHANNELS = 16  # of the features
SHORTEST, LONGEST, MOST = 8, 32, 4
FEATURE_NOISE, EVIDENCE_NOISE, CLASS_SIZE = 1.3, 6.0, 0.5
DISTRACTED = 0.3  # share of the sequences with a distractor
BLUR = 9  # frames that evidence is averaged over


class Action(NamedTuple):
    """Frames ``start`` to below ``end``, and the class."""

    start: float
    end: float
    kind: int


class Sequences(NamedTuple):
    """``features`` (n, 16, T), ``evidence`` (n, K, T) and the actions of each sequence."""

    features: Tensor
    evidence: Tensor
    actions: list[list[Action]]


def draw_sequences(count: int, length: int, classes: int, seed: int) -> Sequences:
    """Sequence i is a function of ``seed`` and i alone; patterns of the features are the same for all."""
    patterns = torch.linalg.qr(_draw(CHANNELS, CHANNELS, seed=0))[0] * 2.0
    found = [_sequence(length, classes, patterns, 1_000_003 * seed + i) for i in range(count)]
    features, evidence, actions = zip(*found, strict=True)
    return Sequences(torch.stack(features), torch.stack(evidence), list(actions))


def inside(actions: list[list[Action]], length: int) -> Tensor:
    """(n, T): 1 in every frame whose middle is in an action."""
    middle = torch.arange(length) + 0.5
    found = torch.zeros(len(actions), length)
    for row, some in zip(found, actions, strict=True):
        for start, end, _ in some:
            row[(middle >= start) & (middle < end)] = 1
    return found


def _sequence(
    length: int, classes: int, patterns: Tensor, seed: int
) -> tuple[Tensor, Tensor, list[Action]]:
    draw = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> int:
        """From ``low`` to ``high``, both included."""
        return int(torch.randint(low, high + 1, (), generator=draw))

    wanted = whole(1, MOST)
    distracted = float(torch.rand((), generator=draw)) < DISTRACTED
    spans: list[tuple[int, int]] = []
    for _ in range(50):
        if len(spans) == wanted + distracted:
            break
        size = whole(SHORTEST, min(LONGEST, length // 2))
        start = whole(0, length - size)
        if all(start + size + 4 <= a or b + 4 <= start for a, b in spans):
            spans.append((start, start + size))
    actions = [Action(float(a), float(b), whole(0, classes - 1)) for a, b in spans[:wanted]]
    frames = torch.zeros(CHANNELS, length)
    which = torch.zeros(classes, length)
    for number, (a, b) in enumerate(spans):
        frames[:, a : a + 3] += patterns[0, :, None]
        frames[:, b - 3 : b] += patterns[1, :, None]
        frames[:, a:b] += 0.5 * patterns[2, :, None]
        if number < len(actions):
            kind = actions[number].kind
            frames[:, a:b] += CLASS_SIZE * patterns[3 + kind % (CHANNELS - 3), :, None]
            which[kind, a:b] = 3.0
    noise = torch.randn(CHANNELS + classes, length, generator=draw)
    evidence = which + EVIDENCE_NOISE * noise[CHANNELS:]
    evidence = F.avg_pool1d(evidence[None], BLUR, 1, BLUR // 2, count_include_pad=False)[0]
    return frames + FEATURE_NOISE * noise[:CHANNELS], evidence, sorted(actions)


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class ActionStudyConfig:
    """The sequences, and the detectors that are trained on them."""

    length: int = 128  # T, frames of a sequence.
    classes: int = 4  # Kinds of action.
    train: int = 800  # Sequences to train on.
    tests: int = 200  # Sequences to test on.
    steps: int = 350  # Of training.
    batch_size: int = 32  # Sequences a step.
    lr: float = 4e-3  # Peak learning rate of AdamW.
    width: int = 32  # Channels of the detector, C_f.
    seeds: int = 3  # Networks of each kind: seeds 0, 1, ...
    data_seed: int = 0  # Of the sequences.

    def quick(self) -> ActionStudyConfig:
        """A few steps on short sequences: no figure of it means anything."""
        return replace(self, length=64, train=16, tests=8, steps=4, batch_size=8, width=8, seeds=1)


Kind = Literal["none", "squeeze-excitation", "csa", "concatenated", "concatenated-csa"]
LEAST_SCORE, MOST_FOUND, OVERLAP = 0.02, 40, 0.4
UNIT = 8.0  # frames that a distance is counted in


class Detector(nn.Module):
    """``detector(features, evidence) -> (classes (B, K + 1, T), distances (B, 2, T))``.

    Args:
        kind: "none"; "squeeze-excitation" and "csa" weigh the encoded features; "concatenated" reads
            class evidence beside the features, and "concatenated-csa" does both.
    """

    def __init__(self, kind: Kind, classes: int, width: int) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.beside = kind.startswith("concatenated")
        first = CHANNELS + (classes if self.beside else 0)
        self.encoder = nn.Sequential(
            *_layer(first, width, 1), *_layer(width, width, 2), *_layer(width, width, 4)
        )
        self.attention: ClassSemanticAttention | None = None
        hidden = width // 4
        if kind == "squeeze-excitation":
            self.attention = ClassSemanticAttention(
                width, width, hidden, bins=1, branches="channel"
            )
        elif kind in ("csa", "concatenated-csa"):
            self.attention = ClassSemanticAttention(classes, width, hidden)
        self.decoder = nn.Sequential(*_layer(width, width, 1))
        self.classes = nn.Conv1d(width, classes + 1, 1)
        self.distances = nn.Conv1d(width, 2, 1)

    def forward(self, features: Tensor, evidence: Tensor) -> tuple[Tensor, Tensor]:
        x = self.encoder(torch.cat([features, evidence], 1) if self.beside else features)
        if self.attention is not None:
            x = self.attention(x if self.kind == "squeeze-excitation" else evidence, x)
        x = self.decoder(x)
        return self.classes(x), F.softplus(self.distances(x)) * UNIT


def _layer(first: int, width: int, dilation: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv1d(first, width, 5, padding=2 * dilation, dilation=dilation)
    return conv, nn.BatchNorm1d(width), nn.ReLU()


def targets(sequences: Sequences, classes: int) -> tuple[Tensor, Tensor]:
    """The class of every frame (n, T), K outside of actions, and its distances (n, 2, T) to the ends."""
    count, _, length = sequences.features.shape
    kinds, distances = torch.full((count, length), classes), torch.ones(count, 2, length)
    middle = torch.arange(length) + 0.5
    for i, actions in enumerate(sequences.actions):
        for start, end, kind in actions:
            frames = (middle >= start) & (middle < end)
            kinds[i, frames] = kind
            distances[i, :, frames] = torch.stack([middle - start, end - middle])[:, frames]
    return kinds, distances


def train(
    kind: Kind, sequences: Sequences, config: ActionStudyConfig, seed: int
) -> tuple[Detector, float]:
    """A trained detector and its CPU seconds; cross-entropy of the class plus 1 - tIoU of the segments of
    frames in actions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = Detector(kind, config.classes, config.width)
    draw = torch.Generator().manual_seed(seed)
    kinds, distances = targets(sequences, config.classes)

    def losses() -> Iterator[Tensor]:
        for _ in range(config.steps):
            batch = torch.randint(len(kinds), (config.batch_size,), generator=draw)
            classes, found = detector(sequences.features[batch], sequences.evidence[batch])
            frames = (kinds[batch] < config.classes)[:, None]
            near, far = (
                op(found, distances[batch]).sum(1, keepdim=True)
                for op in (torch.minimum, torch.maximum)
            )
            apart = ((1 - near / far) * frames).sum() / frames.sum().clamp_min(1)
            yield F.cross_entropy(classes, kinds[batch]) + apart

    return detector, minimize(detector, losses(), config.steps, config.lr, weight_decay=0.01)


@torch.no_grad()
def detect(detector: Detector, sequences: Sequences) -> list[list[Detections]]:
    """The segments found in each sequence, best first."""
    classes, distances = detector(sequences.features, sequences.evidence)
    scores = classes.softmax(1)[:, :-1]
    length = scores.shape[2]
    middle = torch.arange(length) + 0.5
    starts, ends = middle - distances[:, 0], middle + distances[:, 1]
    found = []
    for i in range(len(scores)):
        kinds, frames = (scores[i] >= LEAST_SCORE).nonzero(as_tuple=True)
        segments = [
            Detections(max(a, 0.0), min(b, float(length)), kind, score)
            for a, b, kind, score in zip(
                starts[i, frames].tolist(),
                ends[i, frames].tolist(),
                kinds.tolist(),
                scores[i, kinds, frames].tolist(),
                strict=True,
            )
        ]
        found.append(thinned(segments))
    return found


def thinned(segments: list[Detections]) -> list[Detections]:
    """The surest of those that overlap, by class; at most 40 in all."""
    kept: list[Detections] = []
    for segment in sorted(segments, key=lambda s: -s.score):
        if len(kept) == MOST_FOUND:
            break
        if all(k.kind != segment.kind or tiou(k, segment) <= OVERLAP for k in kept):
            kept.append(segment)
    return kept


class Detections(NamedTuple):
    """Frames ``start`` to ``end``, the class, and how sure the detector is."""

    start: float
    end: float
    kind: int
    score: float


class Matches(NamedTuple):
    """One row for each segment found, best first: the sequence, its class, whether it is right; and how
    many of each class are there in each sequence, (n, K)."""

    sequence: NDArray[np.int64]
    kind: NDArray[np.int64]
    right: NDArray[np.bool_]
    there: NDArray[np.int64]


def tiou(a: Action | Detections, b: Action | Detections) -> float:
    """Shared time over time in either."""
    shared = min(a.end, b.end) - max(a.start, b.start)
    return max(shared, 0.0) / (max(a.end, b.end) - min(a.start, b.start)) if shared > 0 else 0.0


def match(
    found: Sequence[Sequence[Detections]],
    there: Sequence[Sequence[Action]],
    classes: int,
    threshold: float = 0.5,
) -> Matches:
    """Segments found in each sequence, best first, against those that are there."""
    rows, counts = [], np.zeros((len(there), classes), np.int64)
    for i, (some, truth) in enumerate(zip(found, there, strict=True)):
        np.add.at(counts[i], [action.kind for action in truth], 1)
        left = list(truth)
        for segment in sorted(some, key=lambda s: -s.score):
            same = [action for action in left if action.kind == segment.kind]
            best = max(same, key=lambda action: tiou(segment, action), default=None)
            right = best is not None and tiou(segment, best) >= threshold
            if best is not None and right:
                left.remove(best)
            rows.append((segment.score, i, segment.kind, right))
    rows.sort(key=lambda row: -row[0])
    columns = np.array([row[1:] for row in rows], np.int64).reshape(-1, 3).T
    return Matches(columns[0], columns[1], columns[2].astype(bool), counts)


def mean_average_precision(matches: Matches, weights: ArrayLike | None = None) -> float:
    """Mean of AP over the classes that are there; ``weights`` (n,) say how often each sequence counts,
    for resampling. NaN where nothing is there."""
    times = np.ones(len(matches.there)) if weights is None else np.asarray(weights, np.float64)
    values = []
    for kind, total in enumerate(times @ matches.there):
        rows = matches.kind == kind
        counted = times[matches.sequence[rows]]
        hits = np.cumsum(counted * matches.right[rows])
        precision = hits / np.maximum(np.cumsum(counted), 1e-12)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        if total > 0:
            values.append(float((np.diff(hits, prepend=0.0) * envelope).sum() / total))
    return float(np.mean(values)) if values else float("nan")


DEFAULTS = ActionStudyConfig()
RESAMPLES = 1000
CONTROLS: dict[Kind, Kind] = {
    "squeeze-excitation": "none",
    "csa": "none",
    "concatenated": "none",
    "concatenated-csa": "concatenated",
}
AIMS: dict[Kind, str] = {
    "none": "at least .85",
    "csa": "within .02 of its control",
    "concatenated": "at least .90",
    "concatenated-csa": "within .02 of its control",
}


def study(
    output: OutputAt = "runs/study-actions",
    config: ActionStudyConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Train and measure what is not finished yet, write report.md, and give its lines."""
    config = config.quick() if quick else config
    output = Path(output)
    learned, tested = (
        draw_sequences(count, config.length, config.classes, 2 * config.data_seed + part)
        for part, count in enumerate((config.train, config.tests))
    )
    rows: dict[str, Callable[[Split, int], dict[str, Any]]] = {
        kind: partial(measure, kind, learned, tested, config) for kind in get_args(Kind)
    }
    settings = {key: value for key, value in asdict(config).items() if key != "seeds"}
    found = measure_rows(output, settings, rows, config.seeds)
    yield from reported(output, [*_report(found, config)], {"values": raw_rows(found)})


def measure(
    kind: Kind,
    learned: Sequences,
    tested: Sequences,
    config: ActionStudyConfig,
    split: Split,
    seed: int,
) -> dict[str, Any]:
    """Train a detector, and test it: its ``matches`` as lists, and where it has them the means of its
    weights over time, ``inside`` and ``outside`` of the actions of each sequence."""
    detector, seconds = train(kind, split.fit(learned), config, seed)
    tested = split.score(tested)
    matches = match(detect(detector, tested), tested.actions, config.classes)
    parameters = sum(p.numel() for p in detector.parameters())
    found: dict[str, Any] = {"seconds": seconds, "parameters": parameters}
    weights = _weights(detector, tested)
    if weights is not None:
        within = inside(tested.actions, config.length)
        for name, share in (("inside", within), ("outside", 1 - within)):
            found[name] = ((weights * share).sum(1) / share.sum(1)).tolist()
    return {**found, "matches": [column.tolist() for column in matches]}


@torch.no_grad()
def _weights(detector: Detector, tested: Sequences) -> torch.Tensor | None:
    """The weights over time (n, T) that evidence gives, or None."""
    if detector.attention is None or detector.attention.places is None:
        return None
    places = detector.attention.scores(tested.evidence)[1]
    assert places is not None
    return places[:, 0].sigmoid()


def resampled(runs: list[dict[str, Any]], count: int = RESAMPLES) -> NDArray[np.float64]:
    """Mean average precision, mean over the seeds, of the sequences as they are and of ``count``
    resamples, the same for every row: (1 + count,)."""
    matches = [_matches(run) for run in runs]
    n = len(matches[0].there)
    rng = np.random.default_rng(0)
    times = [np.ones(n), *(np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(count))]
    return np.array(
        [np.mean([mean_average_precision(m, weights) for m in matches]) for weights in times]
    )


def _matches(run: dict[str, Any]) -> Matches:
    sequence, kind, right, there = run["matches"]
    return Matches(
        np.array(sequence, np.int64), np.array(kind, np.int64), np.array(right, bool),
        np.array(there, np.int64),
    )  # fmt: skip


def _interval(values: NDArray[np.float64]) -> Interval:
    lo, hi = np.nanquantile(values[1:], (0.025, 0.975))
    return Interval(float(values[0]), float(lo), float(hi), len(values) - 1)


def _report(found: Found, config: ActionStudyConfig) -> Iterator[str]:
    yield (
        f"{config.train} sequences of {config.length} frames to train on, {config.tests} to test, "
        f"{config.classes} classes; {config.steps} steps, {config.seeds} seeds"
    )
    yield "\n| detector | mAP at tIoU .5 | by seed | less its control | aim | parameters | seconds |"
    yield "| :-- | --: | --: | --: | :-- | --: | --: |"
    values = {kind: resampled(found[kind]) for kind in get_args(Kind)}
    for kind in get_args(Kind):
        own = _interval(values[kind])
        seeds = [mean_average_precision(_matches(run)) for run in found[kind]]
        less = ""
        if kind in CONTROLS:
            gap = _interval(values[kind] - values[CONTROLS[kind]])
            less = f"{gap.mean:+.3f} [{gap.lo:+.3f}, {gap.hi:+.3f}]"
        yield (
            f"| {kind} | {own.text(3)} | {spread(seeds)} | {less} | "
            f"{AIMS.get(kind, '')} | {found[kind][0]['parameters']:,} | "
            f"{spread([run['seconds'] for run in found[kind]], 1)} |"
        )
    yield "\n| weights over time | inside actions | outside | inside less outside |"
    yield "| :-- | --: | --: | --: |"
    for kind in ("csa", "concatenated-csa"):
        means = {
            name: np.mean([run[name] for run in found[kind]], 0) for name in ("inside", "outside")
        }
        gap = mean_interval(means["inside"] - means["outside"])
        cells = " | ".join(f"{np.nanmean(mean):.3f}" for mean in means.values())
        yield f"| {kind} | {cells} | {gap.mean:+.3f} [{gap.lo:+.3f}, {gap.hi:+.3f}] |"
