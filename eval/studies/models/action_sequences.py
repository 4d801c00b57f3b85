"""Generated sequences with actions: frame features show where they are, class evidence shows which.

A sequence has one to four separate actions of K classes, 8 to 24 frames long. Its features are
noisy patterns: one for the start, one for the end and one for the inside of an action, shared by
all classes, and a weak one for the class. Class evidence is what a recognition network would
return: the class of each frame, clearer than in the features but averaged over 9 frames, so that
borders are blurred. Some patterns in the features look like actions but are not (distractors); only
the evidence tells them apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS = 16  # of the features
SHORTEST, LONGEST, MOST = 8, 24, 4
FEATURE_NOISE, EVIDENCE_NOISE, CLASS_SIZE = 1.3, 6.0, 0.5
DISTRACTED = 0.3  # share of the sequences with a distractor
BLUR = 9  # frames that evidence is averaged over


class Action(NamedTuple):
    """The frames from ``start`` up to, but not including, ``end``; and the class."""

    start: float
    end: float
    kind: int


class Sequences(NamedTuple):
    """``features`` (n, 16, T), ``evidence`` (n, K, T) and the actions of each sequence."""

    features: Tensor
    evidence: Tensor
    actions: list[list[Action]]


def draw_sequences(count: int, length: int, classes: int, seed: int) -> Sequences:
    """Draw sequences; sequence i depends only on ``seed`` and i, feature patterns on neither."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=generator))[0] * 2.0
    found = [_sequence(length, classes, patterns, 1_000_003 * seed + i) for i in range(count)]
    features, evidence, actions = zip(*found, strict=True)
    return Sequences(torch.stack(features), torch.stack(evidence), list(actions))


def _sequence(
    length: int, classes: int, patterns: Tensor, seed: int
) -> tuple[Tensor, Tensor, list[Action]]:
    draw = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> int:
        """A random integer from ``low`` to ``high``, inclusive."""
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
