"""Maps that know the box of a detection and nothing of the detector; a method must beat them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.detection.detector import require_detections
from xattn.explainers.base import Explainer, register_explainer
from xattn.runtime.option_checks import Positive


@register_explainer("box", title="The box itself", networks=("detector",))
class Box(Explainer):
    """Baseline: 1 inside the box of the detection, 0 outside; a map (B, 1, H, W)."""

    forwards = 0
    per_class = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_detections(self.backbone, self.name)

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        detections = require_detections(self.backbone, self.name).detections
        maps = [
            self._map(*detections[number].place, *images.shape[-2:]) for number in target.tolist()
        ]
        return torch.stack(maps)[:, None].to(images)

    def _map(self, x0: float, y0: float, x1: float, y1: float, height: int, width: int) -> Tensor:
        y, x = (torch.arange(n, device="cpu") + 0.5 for n in (height, width))
        inside = ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))
        return inside.float()


@register_explainer("box_centre", title="Centre of the box", networks=("detector",))
@dataclass(kw_only=True, eq=False, repr=False)
class BoxCentre(Box):
    """Baseline: a Gaussian around the centre of the detection's box.

    Args:
        sigma: standard deviation, as a fraction of the box's height and width.
    """

    sigma: Positive = 0.25

    def _map(self, x0: float, y0: float, x1: float, y1: float, height: int, width: int) -> Tensor:
        y, x = (
            (
                (torch.arange(n, device="cpu") + 0.5 - (low + high) / 2) / max(high - low, 1.0)
            ).square()
            for n, low, high in ((height, y0, y1), (width, x0, x1))
        )
        return torch.exp(-(y[:, None] + x[None]) / (2 * self.sigma**2))
