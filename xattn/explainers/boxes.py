"""Baseline maps that use only the box of a detection and ignore the detector; a method must beat
them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.detection.detector import Detection, require_detections
from xattn.explainers.base import Explainer, register_explainer
from xattn.runtime.option_checks import Positive


@register_explainer("box", title="The box itself", networks=("detector",))
class Box(Explainer):
    """Baseline: 1 inside the box of the detection, 0 outside; a map (B, 1, H, W).

    Example:
        >>> import torch, xattn
        >>> from xattn.detection import Detections
        >>> def squares(images):
        ...     return [([[8.0, 8, 24, 24]], [1], [0.9]) for _ in images]
        >>> detector = xattn.load_detector(squares, class_names=["cat", "dog"], input_size=32)
        >>> photo = torch.rand(3, 32, 32)
        >>> view = Detections(detector, detector.detect(photo))
        >>> xattn.create_explainer("box", view).attribute(photo[None], target=0).sum()
        tensor(256.)
    """

    forwards = 0
    per_class = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_detections(self.backbone, self.name)

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        detections = require_detections(self.backbone, self.name).detections
        height, width = images.shape[-2:]
        maps = [self._map(detections[number], (height, width)) for number in target.tolist()]
        return torch.stack(maps)[:, None].to(images)

    def _map(self, detection: Detection, size: tuple[int, int]) -> Tensor:
        return detection.inside(size).float()


@register_explainer("box_centre", title="Centre of the box", networks=("detector",))
@dataclass(kw_only=True, eq=False, repr=False)
class BoxCentre(Box):
    """Baseline: a Gaussian around the centre of the detection's box.

    Args:
        sigma: standard deviation, as a fraction of the box's height and width.

    Example:
        >>> import torch, xattn
        >>> from xattn.detection import Detections
        >>> def squares(images):
        ...     return [([[8.0, 8, 24, 24]], [1], [0.9]) for _ in images]
        >>> detector = xattn.load_detector(squares, class_names=["cat", "dog"], input_size=32)
        >>> photo = torch.rand(3, 32, 32)
        >>> view = Detections(detector, detector.detect(photo))
        >>> xattn.create_explainer("box_centre", view).attribute(photo[None], target=0).shape
        torch.Size([1, 1, 32, 32])
    """

    sigma: Positive = 0.25

    def _map(self, detection: Detection, size: tuple[int, int]) -> Tensor:
        (x0, y0, x1, y1), (height, width) = detection.place, size
        y, x = (
            (
                (torch.arange(n, device="cpu") + 0.5 - (low + high) / 2) / max(high - low, 1.0)
            ).square()
            for n, low, high in ((height, y0, y1), (width, x0, x1))
        )
        return torch.exp(-(y[:, None] + x[None]) / (2 * self.sigma**2))
