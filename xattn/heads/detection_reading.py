"""Maps of detections for the head ``evidence``: what resembles the object, and where its box is.

    CAM_k = mean over levels of <f - mean f, v_k> / its deviation,    v_k = mean of f - mean f in box k
    box_k = the share of each cell that is inside box k, which takes the place of contrast_k

f (C, h, w) is a feature map of the detector, and k a detection. A detection has no row of a classifier, and
the heads of the families have no part in common, so the mean feature of the box takes the row's place: it
is known after one pass, for any family and for boxes that were never seen. The outcomes are the
probabilities of a view, :class:`~xattn.detection.Detections`, on masked photos, so the usual table and
objective train the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.backbone import Taps
from xattn.detection.detector import Detections
from xattn.heads.class_reading import ClassReading, ReadMaps
from xattn.heads.fusion import resize
from xattn.kernels.softmax.reference import widen

TINY = 1e-12


class DetectionReading(ClassReading):
    """Reads the maps of the detections of ``view``; it has no weights."""

    boxes: Tensor  # (K, 4), x0 y0 x1 y1 as shares of the input's sides

    def __init__(self, view: Detections) -> None:
        super().__init__()
        height, width = view.preprocessing.input_size
        places = torch.tensor([one.place for one in view.detections])
        self.register_buffer("boxes", places / torch.tensor([width, height] * 2), persistent=False)

    def forward(self, taps: Taps, index: Tensor | None, task: str) -> ReadMaps:
        boxes = self.boxes[None] if index is None else self.boxes[index]
        boxes = boxes.expand(len(taps.logits), -1, -1)
        size = max((tuple(f.shape[2:]) for f in taps.maps), key=lambda s: s[0] * s[1])
        own = torch.stack([resize(_likeness(widen(f), boxes), size) for f in taps.maps]).mean(0)
        return ReadMaps(own, own - covered(boxes, size))

    def own(self, taps: Taps, index: Tensor) -> Tensor:
        return self(taps, index, "multilabel").own


def _likeness(f: Tensor, boxes: Tensor) -> Tensor:
    """(B, M, h, w) with mean 0 and deviation 1: products of the centred f (B, C, h, w) with its means in
    ``boxes`` (B, M, 4)."""
    centred = f - f.mean((2, 3), keepdim=True)
    inside = covered(boxes, f.shape[2:]).to(f.dtype)
    means = torch.einsum("bmhw,bchw->bmc", inside, centred)
    means = means / inside.sum((2, 3)).clamp_min(TINY)[..., None]
    maps = torch.einsum("bmc,bchw->bmhw", means, centred)
    return maps / maps.square().mean((2, 3), keepdim=True).sqrt().clamp_min(TINY)


def covered(boxes: Tensor, size: tuple[int, ...]) -> Tensor:
    """The share (B, M, h, w) of each cell of a grid of ``size`` (h, w) that is inside each of ``boxes`` (B,
    M, 4).

    >>> covered(torch.tensor([[[0.0, 0.0, 0.5, 0.75]]]), (2, 2))
    tensor([[[[1.0000, 0.0000],
              [0.5000, 0.0000]]]])
    """
    x, y = (
        (
            torch.minimum(boxes[..., axis + 2, None] * count, cells + 1)
            - torch.maximum(boxes[..., axis, None] * count, cells)
        ).clamp_min(0)
        for axis, count in enumerate(size[::-1])
        for cells in (torch.arange(count, device=boxes.device),)
    )
    return y[..., :, None] * x[..., None, :]
