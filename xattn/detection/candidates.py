"""Candidates of a detector: its boxes before suppression, with objectness and class scores.

    similarity(t, j) = IoU(b_t, b_j) cos(P_t, P_j) O_j        D-RISE, Petsiuk et al., arXiv 2006.03204

b_j is a box, P_j its class scores and O_j its objectness, the probability that it shows any object. The
objectness is one minus the probability of the background or, for a detector whose classes are sigmoids, the
largest class score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LEAST, MOST = 1e-12, 1 - 1e-7  # limits of scores before taking log-odds


class Candidates(NamedTuple):
    """N candidates for each of B images: ``boxes`` (B, N, K or 1, 4), x0 y0 x1 y1 in pixels of the input,
    either one box per class or one for all classes; ``objectness`` (B, N) and ``classes`` (B, N, K) in [0,
    1]. Unused entries have scores of 0.

    Example:
        >>> import torch
        >>> from xattn.detection import Candidates
        >>> boxes, classes = torch.tensor([[[[0.0, 0, 8, 8]]]]), torch.tensor([[[0.9, 0.1]]])
        >>> one = Candidates(boxes, torch.ones(1, 1), classes)
        >>> one.boxes.shape, one.classes.shape  # one image, one candidate, two classes
        (torch.Size([1, 1, 1, 4]), torch.Size([1, 1, 2]))
    """

    boxes: Tensor
    objectness: Tensor
    classes: Tensor

    def pack(self) -> Tensor:
        """Concatenate all fields into one tensor (B, N, 4 (K or 1) + 1 + K)."""
        parts = (self.boxes.flatten(2), self.objectness[..., None], self.classes)
        return torch.cat(parts, 2)

    @classmethod
    def of(cls, packed: Tensor, classes: int) -> Candidates:
        """The inverse of :meth:`pack`, for K ``classes``."""
        boxes, objectness, scores = full(packed).split(
            [packed.shape[2] - 1 - classes, 1, classes], 2
        )
        return cls(boxes.unflatten(2, (-1, 4)), objectness[..., 0], scores)

    def boxes_of(self, labels: Tensor) -> Tensor:
        """Boxes (B, N, m, 4) for the classes (m,), or (B, N, 1, 4) if all classes share a box."""
        return self.boxes[:, :, labels] if self.boxes.shape[2] > 1 else self.boxes


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union (...) of ``boxes`` and ``others``, (..., 4); 0 for boxes without area."""
    low = torch.maximum(boxes[..., :2], others[..., :2])
    high = torch.minimum(boxes[..., 2:], others[..., 2:])
    both = (high - low).clamp_min(0).prod(-1)
    one, two = ((b[..., 2:] - b[..., :2]).clamp_min(0).prod(-1) for b in (boxes, others))
    return both / (one + two - both).clamp_min(1e-12)


def full(values: Tensor) -> Tensor:
    """``values`` in single precision or better: areas and log-odds exceed the range of half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def log_odds(scores: Tensor) -> Tensor:
    """log(s / (1 - s)), finite even for s = 0 and s = 1."""
    s = scores.clamp(LEAST, MOST)
    return s.log() - torch.log1p(-s)


@dataclass(frozen=True)
class Suppression:
    """How a detector turns candidates into detections.

    Args:
        threshold: a detection needs a score above this.
        overlap: IoU above which the weaker of two boxes of one class is removed; None keeps both.
        most: largest number of detections.
        one_class: whether each candidate counts only for its most probable class, as in DETR; otherwise it
            counts for every class.
        smallest: smallest side of a box in pixels.
        strongest: how many candidates per class enter the comparison of boxes; None means all.

    Example:
        >>> import torch
        >>> from xattn.detection import Candidates, Suppression
        >>> boxes = torch.tensor([[[[0.0, 0, 10, 10]], [[1.0, 0, 11, 10]], [[40.0, 0, 50, 10]]]])
        >>> scores = torch.tensor([[[0.9], [0.8], [0.7]]])  # the second box overlaps the first
        >>> found = Candidates(boxes, torch.ones(1, 3), scores)
        >>> [one.number for one in Suppression(overlap=0.5).kept(found)]
        [0, 2]
    """

    threshold: float = 0.05
    overlap: float | None = 0.5
    most: int = 100
    one_class: bool = False
    smallest: float = 0.0
    strongest: int | None = None

    def kept(self, found: Candidates, threshold: float | None = None) -> list[Found]:
        """The detections in the first image with scores above ``threshold``, best first."""
        scores = found.classes[0]  # (N, K)
        if self.one_class:
            top = scores.max(1, keepdim=True)
            scores = torch.where(scores == top.values, scores, 0.0)
        if self.strongest is not None and self.strongest < len(scores):
            least = scores.topk(self.strongest, 0).values[-1]
            scores = torch.where(scores >= least, scores, 0.0)
        level = self.threshold if threshold is None else threshold
        index, label = (scores > level).nonzero(as_tuple=True)
        value = scores[index, label]
        boxes = _boxes(found, index, label)
        whole = ((boxes[:, 2:] - boxes[:, :2]) >= self.smallest).all(1)
        index, label, value, boxes = index[whole], label[whole], value[whole], boxes[whole]
        if self.overlap is None:
            order = value.argsort(descending=True, stable=True)
        else:
            from torchvision.ops import batched_nms

            order = batched_nms(boxes.float(), value.float(), label, self.overlap)
        return [
            Found(int(index[i]), int(label[i]), float(value[i]), tuple(boxes[i].tolist()))
            for i in order[: self.most]
        ]


class Found(NamedTuple):
    """A candidate's number, its class, its score, and its box in pixels of the input."""

    number: int
    label: int
    score: float
    box: tuple[float, ...]


def _boxes(found: Candidates, index: Tensor, label: Tensor) -> Tensor:
    """(n, 4) for the first image."""
    own = label if found.boxes.shape[2] > 1 else torch.zeros_like(label)
    return found.boxes[0, index, own]


def best(found: Candidates, most: int = 1) -> list[Found]:
    """The ``most`` highest-scoring candidates in the first image, over all classes; scores of 0 and empty
    boxes are left out."""
    sides = found.boxes[0, ..., 2:] - found.boxes[0, ..., :2]  # (N, K or 1, 2)
    scores = found.classes[0] * (sides.amin(2) > 0)
    value, place = scores.flatten().topk(min(most, scores.numel()))
    index, label = place // scores.shape[1], place % scores.shape[1]
    boxes = _boxes(found, index, label)
    return [
        Found(int(i), int(k), float(v), tuple(b.tolist()))
        for i, k, v, b in zip(index, label, value, boxes, strict=True)
        if v > 0
    ]
