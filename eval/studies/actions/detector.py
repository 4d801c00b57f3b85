"""A detector of actions in sequences: every frame says which class it is in, and how far its ends are.

    (R, F) -> convolutions -> attention of one kind or none -> convolution -> class (K + 1), distances (2)

Frames within an action of training answer for it. In tests the segments of all frames are thinned out: of
those of one class that overlap, the surest stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.eval.studies.actions.precision import Found, tiou
from xattn.eval.studies.actions.sequences import CHANNELS, Sequences
from xattn.eval.studies.small_training import minimize
from xattn.heads.csa import ClassSemanticAttention


@dataclass(frozen=True)
class ActionStudyConfig:
    """The sequences, and the detectors that are trained on them."""

    length: int = 128
    """T, frames of a sequence."""
    classes: int = 4
    """Kinds of action."""
    train: int = 800
    """Sequences to train on."""
    tests: int = 200
    """Sequences to test on."""
    steps: int = 350
    """Of training."""
    batch_size: int = 32
    """Sequences a step."""
    lr: float = 4e-3
    """Peak learning rate of AdamW."""
    width: int = 32
    """Channels of the detector, C_f."""
    seeds: int = 3
    """Networks of each kind: seeds 0, 1, ..."""
    data_seed: int = 0
    """Of the sequences."""

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
def detect(detector: Detector, sequences: Sequences) -> list[list[Found]]:
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
            Found(max(a, 0.0), min(b, float(length)), kind, score)
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


def thinned(segments: list[Found]) -> list[Found]:
    """The surest of those that overlap, by class; at most 40 in all."""
    kept: list[Found] = []
    for segment in sorted(segments, key=lambda s: -s.score):
        if len(kept) == MOST_FOUND:
            break
        if all(k.kind != segment.kind or tiou(k, segment) <= OVERLAP for k in kept):
            kept.append(segment)
    return kept
