"""A small boundary-matching network (BMN, arXiv 1907.09702), with attention at three places or none.

    base        x = convolutions of the features                     (B, C, T)
    temporal    p_s, p_e = sigmoid(conv(relu(conv(x))))              each frame is a start, an end
    proposal    p_c, p_r = sigmoid(convs(match(relu(conv(x)))))      (B, D, T): frames t to t + d + 1

``match`` reads N points of each segment, widened by a quarter of its length on both sides, by
linear interpolation. Attention comes after the base, and after the first convolution of each other
module: squeeze-and-excitation (arXiv 1709.01507) or class-semantic attention (arXiv 2109.02613),
see :mod:`xattn.heads.probing.csa`. Labels and losses are those of BMN, except that groups of
segments are weighted instead of sampled. Sizes are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.eval.studies.models.action_sequences import Action
from xattn.heads.probing.csa import ClassSemanticAttention

Kind = Literal["none", "se", "csa"]
POINTS = 8  # N, points read from each segment
WIDEN = 0.25  # of the length, on either side
REGION = 1.5  # frames around a border that are labelled as border
BALANCED = (0.3, 0.7)  # tIoU limits between three groups of segments with equal weight
CONFIDENT = 0.9  # tIoU above which a segment is labelled an action


class Found(NamedTuple):
    """Probabilities: ``borders`` (B, 2, T), that a frame is a start or an end; ``segments`` (B, 2,
    D, T), that a segment is an action, and its predicted tIoU with one."""

    borders: Tensor
    segments: Tensor


class Placed(nn.Module):
    """Attention of one kind over features (B, C, T), computed from evidence (B, K, T)."""

    def __init__(self, kind: Kind, evidence: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        hidden = max(1, width // 4)
        self.attention: ClassSemanticAttention | None = None
        if kind == "se":
            self.attention = ClassSemanticAttention(
                width, width, hidden, bins=1, branches="channel"
            )
        elif kind == "csa":
            self.attention = ClassSemanticAttention(evidence, width, hidden)

    def forward(self, x: Tensor, evidence: Tensor) -> Tensor:
        if self.attention is None:
            return x
        attended: Tensor = self.attention(x if self.kind == "se" else evidence, x)
        return attended


class BoundaryMatching(nn.Module):
    """``net(x, evidence)`` of (B, channels, T) and (B, classes, T) -> :class:`Found`.

    Args:
        channels, classes: channels of x, and classes of the evidence, which attention "csa" reads.
        length: T; ``longest``: D, the length of the longest segment in frames.
        width: C; segments have half as many channels.
        kind: of the attention at the three places.
    """

    sampling: Tensor

    def __init__(
        self, channels: int, classes: int, length: int, longest: int, width: int, kind: Kind
    ) -> None:
        super().__init__()
        half = width // 2
        self.base = nn.Sequential(*_conv(channels, width), *_conv(width, width))
        self.temporal = nn.Sequential(*_conv(width, width))
        self.borders = nn.Conv1d(width, 2, 1)
        self.proposal = nn.Sequential(*_conv(width, half))
        self.matched = nn.Sequential(
            nn.Conv2d(half * POINTS, width, 1), nn.ReLU(),
            nn.Conv2d(width, half, 1), nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1), nn.ReLU(),
            nn.Conv2d(half, 2, 1),
        )  # fmt: skip
        self.places = nn.ModuleList(
            Placed(kind, classes, size) for size in (width, width, half)
        )  # last, so that all other weights start the same for every kind
        self.register_buffer("sampling", sampling(length, longest), persistent=False)

    def forward(self, x: Tensor, evidence: Tensor) -> Found:
        base, temporal, proposal = self.places
        x = base(self.base(x), evidence)
        borders = self.borders(temporal(self.temporal(x), evidence)).sigmoid()
        segments = match(proposal(self.proposal(x), evidence), self.sampling)
        return Found(borders, self.matched(segments).sigmoid())


def _conv(first: int, width: int) -> tuple[nn.Module, ...]:
    return nn.Conv1d(first, width, 5, padding=2), nn.BatchNorm1d(width), nn.ReLU()


def sampling(length: int, longest: int, points: int = POINTS) -> Tensor:
    """(T, N, D, T): weight of each frame at each point of each segment; 0 outside the sequence."""
    starts, sizes = torch.arange(length).double(), torch.arange(1, longest + 1).double()
    share = torch.linspace(-WIDEN, 1 + WIDEN, points, dtype=torch.float64)
    place = starts + share[:, None, None] * sizes[:, None] - 0.5  # the middle of frame t is t + .5
    frames = torch.arange(length).double()[:, None, None, None]
    return (1 - (place - frames).abs()).clamp_min(0).float()


def match(x: Tensor, weights: Tensor) -> Tensor:
    """Features (B, C, T) at the points of all segments, (B, C N, D, T)."""
    found = x @ weights.flatten(1)
    return found.unflatten(2, weights.shape[1:]).flatten(1, 2)


def fits(length: int, longest: int) -> Tensor:
    """(D, T): whether the segment of d + 1 frames from t ends within the sequence."""
    ends = torch.arange(length) + torch.arange(1, longest + 1)[:, None]
    return ends <= length


class Labels(NamedTuple):
    """``borders`` (n, 2, T), 0 or 1, and ``overlap`` (n, D, T), the largest tIoU with an action."""

    borders: Tensor
    overlap: Tensor


def labels(actions: Sequence[Sequence[Action]], length: int, longest: int) -> Labels:
    """The labels that :class:`BoundaryMatching` should predict for each sequence."""
    borders = torch.zeros(len(actions), 2, length)
    overlap = torch.zeros(len(actions), longest, length)
    frames = torch.arange(length).float()
    sizes = torch.arange(1, longest + 1).float()[:, None]
    for i, some in enumerate(actions):
        for start, end, _ in some:
            for row, border in zip(borders[i], (start, end), strict=True):
                low, high = (
                    frames.clamp_min(border - REGION),
                    (frames + 1).clamp_max(border + REGION),
                )
                row[high - low > 0.5] = 1
            shared = (frames + sizes).clamp_max(end) - frames.clamp_min(start)
            shared = shared.clamp_min(0)
            overlap[i] = torch.maximum(overlap[i], shared / (sizes + end - start - shared))
    return Labels(borders, overlap)


def loss(found: Found, truth: Labels, valid: Tensor) -> Tensor:
    """The loss of BMN: borders, 10 times the squared error of the tIoU, and actions."""
    borders = sum(balanced(found.borders[:, i], truth.borders[:, i] > 0.5) for i in range(2))
    confident, overlap = (part[:, valid] for part in found.segments.unbind(1))
    true = truth.overlap[:, valid]
    low, high = BALANCED
    groups = (true <= low, (true > low) & (true <= high), true > high)
    squared = (overlap - true).square()
    error = sum((squared * group).sum() / group.sum().clamp_min(1) for group in groups) / 3
    return borders + 10 * error + balanced(confident, true > CONFIDENT)


def balanced(found: Tensor, true: Tensor) -> Tensor:
    """Cross-entropy of probabilities in which positives and negatives have equal weight."""
    each = F.binary_cross_entropy(found, true.float(), reduction="none")
    parts = [(each * part).sum() / part.sum().clamp_min(1) for part in (true, ~true)]
    return (parts[0] + parts[1]) / 2
