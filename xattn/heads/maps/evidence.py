"""Evidence: class activation maps, corrected by a small network that reads the taps.

    S_k = a CAM_k + b contrast_k + theta . features + u(x) + g(x) CAM_k + h(x) contrast_k

CAM_k = w_k . f applies the classifier's row of class k to the last map f. contrast_k applies w_k minus the
mean of the other classes' rows, weighted by their probabilities, to the same map. Features are the norms of
all taps and the texture of the first. All of these are standardised within each photo. u, g and h (B, 1, r,
r) come from a convolutional network on the principal components of the taps; they start at zero, so the
untrained head is CAM. Maps of clips have one more axis, for time. No part of the network depends on the
class or the position, so classes that were not in the training photos can be explained as well, and maps
have no bias towards the centre.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.backbone import Backbone, Taps
from xattn.heads.base import Head, register_head
from xattn.heads.class_reading import ClassReading, DetectionReading, TokenReading, class_reading
from xattn.heads.fusion import resize, row_index
from xattn.kernels.softmax.reference import widen
from xattn.runtime.option_checks import Count

SIZE = 28  # largest number of cells per side of the maps
TINY = 1e-6
SMALLEST = 1e-30
PARTS = ("contrast", "features", "u", "g", "h")


def standardise(maps: Tensor, axes: int = 2) -> Tensor:
    """Maps (..., h, w) with mean 0 and standard deviation 1 over space, the last ``axes``; 0 where a map is
    constant, up to rounding."""
    wide, cells = widen(maps), tuple(range(-axes, 0))
    centred = wide - wide.mean(cells, keepdim=True)
    least = TINY**2 * wide.square().mean(cells, keepdim=True) + SMALLEST
    variance = centred.square().mean(cells, keepdim=True)
    return torch.where(variance > least, centred / variance.clamp_min(least).sqrt(), 0).to(
        maps.dtype
    )


def standardised_mask(scores: Tensor) -> Tensor:
    """sigmoid(2 z + 1) of the standardised scores z, (..., h, w) or (B, M, t, h, w)."""
    return (2 * standardise(scores, 3 if scores.ndim == 5 else 2) + 1).sigmoid()


def grid_size(taps: Taps) -> tuple[int, ...]:
    """Cells (r, r') of the maps: the cells of the finest tap, at most 28 per side; (t, r, r') for clips."""
    sides = zip(*(f.shape[2:] for f in taps.maps), strict=True)
    return tuple(min(SIZE, max(counts)) for counts in sides)


class Components(nn.Module):
    """Principal components of a tap: (B, C, h, w) -> (B, c, h, w), each of unit variance over the photos
    given to :meth:`fit`. Until then it returns the first c channels unchanged."""

    mean: Tensor
    basis: Tensor

    def __init__(self, channels: int, components: int) -> None:
        super().__init__()
        count = min(channels, components)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("basis", torch.eye(count, channels))

    def forward(self, f: Tensor) -> Tensor:
        centred = f - self.mean.to(f.dtype).view(-1, *[1] * (f.ndim - 2))
        return torch.einsum("nc,bc...->bn...", self.basis.to(f.dtype), centred)

    def fit(self, count: int, total: Tensor, square: Tensor) -> None:
        """Set mean and basis from ``count`` vectors with the sum ``total`` (C,) and the sum of outer
        products ``square`` (C, C). Channels count equally, whatever their scale; constant ones are
        ignored."""
        mean = total / count
        covariance = square / count - torch.outer(mean, mean)
        scale = covariance.diagonal().clamp_min(0).sqrt()
        changes = scale > TINY * (mean.abs() + scale.max())
        inverse = torch.where(changes, 1 / scale.clamp_min(SMALLEST), 0)
        values, vectors = torch.linalg.eigh(covariance * torch.outer(inverse, inverse))
        best = values.argsort(descending=True)[: len(self.basis)]
        basis = vectors[:, best] / values[best].clamp_min(1e-4).sqrt()
        largest = basis.abs().argmax(0)  # fixes the arbitrary sign of an eigenvector
        basis = basis * basis.gather(0, largest[None]).sign()
        self.mean.copy_(mean)
        self.basis.copy_((basis * inverse[:, None]).t())


@register_head(
    "evidence",
    cases=({"components": 4, "hidden": 5}, {"parts": [], "explain_with": "scores"}),
    recipe="outcomes",
)
class Evidence(Head):
    """The evidence head on the taps of ``backbone``, or of a view whose classes are detections, where the
    terms CAM and contrast differ (:class:`~xattn.heads.class_reading.DetectionReading`).

    Args:
        parts: which terms are added to the first term, ``a CAM_k``: ``"contrast"``, ``"features"``,
            ``"u"``, ``"g"``, ``"h"``. By default, all are added; but if the network reads a class token,
            only contrast and features are, because there the convolutional network overfits the training
            photos (docs/results/evidence.md).
        components: largest number of principal components of each tap that the network reads.
        hidden: width of the network.
        explain_with: show raw ``"scores"``, or the ``"mask"`` sigmoid(2 z + 1) of the scores z,
            standardised over the photo. Both rank pixels in the same order.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> head = xattn.create_head("evidence", net)
        >>> scores = head(net(torch.rand(2, 3, 64, 64)), torch.tensor([3, 7]))
        >>> scores.shape, head.mask(scores).amax() <= 1
        (torch.Size([2, 1, 8, 8]), tensor(True))
    """

    reads_statistics = True
    clips = True
    # These few numbers are shared by all photos: they can and must learn faster than the network.
    learning_rates: ClassVar = {"cam": 3.0, "contrast": 3.0, "features": 3.0}

    def __init__(
        self,
        backbone: Backbone,
        parts: Sequence[str] | None = None,
        components: Count = 8,
        hidden: Count = 32,
        explain_with: Literal["scores", "mask"] = "mask",
    ) -> None:
        boxes = backbone.boxes
        reading: ClassReading = (
            class_reading(backbone) if boxes is None else DetectionReading(boxes)
        )
        if parts is None:
            parts = PARTS[:2] if isinstance(reading, TokenReading) else PARTS
        unknown = sorted(set(parts) - set(PARTS))
        if unknown:
            raise ValueError(f"parts: got {unknown}; choose among {', '.join(PARTS)}")
        options = {
            "parts": [part for part in PARTS if part in parts],
            "components": components,
            "hidden": hidden,
            "explain_with": explain_with,
        }
        super().__init__(backbone, options)
        self.parts = frozenset(parts)
        self.reading = reading
        self.cam = nn.Parameter(torch.ones(()))
        self.contrast = nn.Parameter(torch.zeros(()))
        self.features = nn.Parameter(torch.zeros(len(backbone.taps) + 1 + self.reading.extras))
        self.components, self.network = nn.ModuleList(), nn.Sequential()
        if not self.parts & {"u", "g", "h"}:
            return
        readers = [Components(channels, components) for channels in backbone.channels]
        self.components.extend(readers)
        width = sum(len(reader.basis) for reader in readers)
        convolution: Any = nn.Conv3d if backbone.reads_clips else nn.Conv2d
        self.network.extend(
            [
                convolution(width, hidden, 1),
                nn.GELU(),
                # Zero padding would tell the network where the border is.
                convolution(hidden, hidden, 3, padding=1, padding_mode="replicate"),
                nn.GELU(),
                convolution(hidden, 3, 1),
            ]
        )
        for parameter in self.network[-1].parameters():
            nn.init.zeros_(parameter)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Taps]) -> None:
        counts = [0] * len(self.components)
        sums = [torch.zeros(())] * len(self.components)
        squares = [torch.zeros(())] * len(self.components)
        if not self.components:
            return
        for taps in batches:
            for i, f in enumerate(taps.maps):
                vectors = f.double().transpose(0, 1).flatten(1)
                counts[i] += vectors.shape[1]
                sums[i] = sums[i].to(vectors) + vectors.sum(1)
                squares[i] = squares[i].to(vectors) + vectors @ vectors.t()
        for component, *found in zip(self.components, counts, sums, squares, strict=True):
            if found[0]:
                component.fit(*found)  # type: ignore[operator]

    def forward(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        size, index = grid_size(taps), row_index(class_index, self.num_classes, taps.logits)
        cam, contrast, extra = self.class_maps(taps, index)
        total = self.cam * cam
        if "contrast" in self.parts:
            total = total + self.contrast * contrast
        if "features" in self.parts:
            features = self.plain_features(taps, extra)
            total = total + torch.einsum("f,bf...->b...", self.features, features)[:, None]
        if self.components:
            components = zip(self.components, taps.maps, strict=True)
            x = torch.cat([resize(component(f), size) for component, f in components], 1)
            for part, gate in zip("ugh", self.network(x).split(1, 1), strict=True):
                if part in self.parts:
                    total = total + {"u": gate, "g": gate * cam, "h": gate * contrast}[part]
        return total

    def class_maps(self, taps: Taps, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The standardised CAM and contrast (B, M, r, r) of the classes ``index`` (B, M), or of all
        classes; and the other maps of the class reading."""
        found, size = self.reading(taps, index, self.backbone_task), grid_size(taps)
        own, contrast = (resize(m, size) for m in (found.own, found.own - found.others))
        return standardise(own, len(size)), standardise(contrast, len(size)), found.extra

    def plain_features(self, taps: Taps, extra: Tensor | None) -> Tensor:
        """Norms of all taps, texture of the first, and ``extra`` maps: (B, F, r, r), standardised."""
        first = taps.maps[0]
        pool: Any = F.avg_pool2d if first.ndim == 4 else F.avg_pool3d
        smooth = pool(F.pad(first, (1, 1) * (first.ndim - 2), mode="replicate"), 3, 1)
        norms = [
            f.square().sum(1, keepdim=True).clamp_min(TINY).sqrt()
            for f in (*taps.maps, first - smooth)
        ]
        if extra is not None:
            norms.append(extra)
        size = grid_size(taps)
        return torch.cat([standardise(resize(n, size), len(size)) for n in norms], 1)

    def mask(self, scores: Tensor) -> Tensor:
        """sigmoid(2 z + 1) of the standardised scores z: about two thirds of the cells are above 1/2."""
        return standardised_mask(scores)
