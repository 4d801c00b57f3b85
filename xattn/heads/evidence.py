"""Evidence: class activation maps, corrected by a small network that reads what the taps show.

    S_k = a CAM_k + b contrast_k + theta . features + u(x) + g(x) CAM_k + h(x) contrast_k

CAM_k = w_k . f is the classifier's row of class k on the last map f, contrast_k the row w_k minus the mean
of the other classes' rows, weighted by their probabilities, on the same map. Features are the norms of all
taps and the texture of the first. All of these are standardised over each photo. u, g and h (B, 1, r, r)
come from a convolutional network on the principal components of the taps; they start at zero, so the
untrained head is CAM. Nothing in it belongs to a class or knows a place: classes that were never seen are
explained too, and maps do not lean towards the centre.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.backbone import Backbone, Taps
from xattn.heads.base import Head, register_head
from xattn.heads.class_reading import class_reading
from xattn.heads.fusion import class_rows, resize
from xattn.runtime.option_checks import Count

SIZE = 28  # cells of a side of the maps, at most
TINY = 1e-6
PARTS = ("contrast", "features", "u", "g", "h")


def standardised(maps: Tensor) -> Tensor:
    """Maps (..., h, w) with mean 0 and standard deviation 1 over space; 0 where a map is constant."""
    centred = maps - maps.mean((-2, -1), keepdim=True)
    scale = centred.square().mean((-2, -1), keepdim=True).sqrt()
    return centred / scale.clamp_min(TINY)


class Components(nn.Module):
    """Principal components of a tap: (B, C, h, w) -> (B, c, h, w), each of unit variance over the photos
    that :meth:`fit` saw. Before that, the first c channels as they are."""

    mean: Tensor
    basis: Tensor

    def __init__(self, channels: int, components: int) -> None:
        super().__init__()
        count = min(channels, components)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("basis", torch.eye(count, channels))

    def forward(self, f: Tensor) -> Tensor:
        centred = f - self.mean.to(f.dtype)[:, None, None]
        return torch.einsum("nc,bchw->bnhw", self.basis.to(f.dtype), centred)

    def fit(self, count: int, total: Tensor, square: Tensor) -> None:
        """Set mean and basis from ``count`` vectors with the sum ``total`` (C,) and the sum of outer
        products ``square`` (C, C)."""
        mean = total / count
        covariance = square / count - torch.outer(mean, mean)
        scale = covariance.diagonal().clamp_min(TINY).sqrt()  # channels of any size count alike
        values, vectors = torch.linalg.eigh(covariance / torch.outer(scale, scale))
        best = values.argsort(descending=True)[: len(self.basis)]
        basis = vectors[:, best] / values[best].clamp_min(1e-4).sqrt()
        largest = basis.abs().argmax(0)  # the sign of an eigenvector is arbitrary
        basis = basis * basis.gather(0, largest[None]).sign()
        self.mean.copy_(mean)
        self.basis.copy_((basis / scale[:, None]).t())


@register_head(
    "evidence",
    cases=({"components": 4, "hidden": 5}, {"parts": [], "explain_with": "scores"}),
    recipe="outcomes",
)
class Evidence(Head):
    """The evidence head on the taps of ``backbone``.

    Args:
        parts: which terms are added to a CAM_k: ``"contrast"``, ``"features"``, ``"u"``, ``"g"``, ``"h"``.
        components: principal components of each tap that the network reads, at most.
        hidden: width of the network.
        explain_with: show raw ``"scores"``, or the ``"mask"`` sigmoid(2 z + 1) of the scores z,
            standardised over the photo. Both rank pixels alike.
    """

    reads_statistics = True

    def __init__(
        self,
        backbone: Backbone,
        parts: Sequence[str] = PARTS,
        components: Count = 8,
        hidden: Count = 32,
        explain_with: Literal["scores", "mask"] = "mask",
    ) -> None:
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
        self.reading = class_reading(backbone)
        self.size = tuple(min(SIZE, max(sides)) for sides in zip(*backbone.tap_sizes, strict=True))
        self.cam = nn.Parameter(torch.ones(()))
        self.contrast = nn.Parameter(torch.zeros(()))
        self.features = nn.Parameter(torch.zeros(len(backbone.taps) + 1 + self.reading.extras))
        self.components = nn.ModuleList(Components(c, components) for c in backbone.channels)
        width = sum(len(component.basis) for component in self.components)  # type: ignore[arg-type]
        self.network = nn.Sequential(
            nn.Conv2d(width, hidden, 1),
            nn.GELU(),
            # Zeros around a map would tell the network where the border is.
            nn.Conv2d(hidden, hidden, 3, padding=1, padding_mode="replicate"),
            nn.GELU(),
            nn.Conv2d(hidden, 3, 1),
        )
        for parameter in self.network[-1].parameters():
            nn.init.zeros_(parameter)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Taps]) -> None:
        count = 0
        sums = [torch.zeros(())] * len(self.components)
        squares = [torch.zeros(())] * len(self.components)
        for taps in batches:
            vectors = [f.double().transpose(0, 1).flatten(1) for f in taps.maps]
            sums = [a.to(v) + v.sum(1) for a, v in zip(sums, vectors, strict=True)]
            squares = [a.to(v) + v @ v.t() for a, v in zip(squares, vectors, strict=True)]
            count += len(taps.logits)
        for component, total, square, f in zip(
            self.components, sums, squares, taps.maps, strict=True
        ):
            component.fit(count * f.shape[2] * f.shape[3], total, square)  # type: ignore[operator]

    def forward(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        last = taps.maps[-1]
        index = class_rows(class_index, self.num_classes, len(last))
        if index is not None:
            index = index.to(last.device).expand(len(last), -1)
        cam, contrast, extra = self.class_maps(taps, index)
        total = self.cam * cam
        if "contrast" in self.parts:
            total = total + self.contrast * contrast
        if "features" in self.parts:
            features = self.plain_features(taps, extra)
            total = total + torch.einsum("f,bfhw->bhw", self.features, features)[:, None]
        if self.parts & {"u", "g", "h"}:
            components = zip(self.components, taps.maps, strict=True)
            x = torch.cat([resize(component(f), self.size) for component, f in components], 1)
            for part, gate in zip("ugh", self.network(x).split(1, 1), strict=True):
                if part in self.parts:
                    total = total + {"u": gate, "g": gate * cam, "h": gate * contrast}[part]
        return total

    def class_maps(self, taps: Taps, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """CAM and contrast (B, M, r, r) of the classes ``index`` (B, M), or of all, standardised; and the
        reading's other maps."""
        logits = taps.logits
        p = logits.sigmoid() if self.backbone_task == "multilabel" else logits.softmax(1)
        found = self.reading(taps, index, p)
        own = p if index is None else p.gather(1, index)
        rest = (p.sum(1, keepdim=True) - own).clamp_min(TINY)[..., None, None]
        others = (found.mean - own[..., None, None] * found.own) / rest
        # A class of p = 1 leaves the others no weight: its contrast is its CAM.
        others = torch.where(rest > TINY, others, 0.0)
        maps = (standardised(resize(m, self.size)) for m in (found.own, found.own - others))
        return *maps, found.extra  # type: ignore[return-value]

    def plain_features(self, taps: Taps, extra: Tensor | None) -> Tensor:
        """Norms of all taps, texture of the first, the reading's ``extra``: (B, F, r, r), standardised."""
        first = taps.maps[0]
        smooth = F.avg_pool2d(F.pad(first, (1, 1, 1, 1), mode="replicate"), 3, 1)
        norms = [
            f.square().sum(1, keepdim=True).clamp_min(TINY).sqrt()
            for f in (*taps.maps, first - smooth)
        ]
        if extra is not None:
            norms.append(extra)
        return torch.cat([standardised(resize(n, self.size)) for n in norms], 1)

    def mask(self, scores: Tensor) -> Tensor:
        """sigmoid(2 z + 1) of the standardised scores z: about two thirds of the cells are above 1/2."""
        return (2 * standardised(scores) + 1).sigmoid()
