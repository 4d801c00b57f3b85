"""Use detections as annotations. The mask of a detection marks its object; without a mask, its box does."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from xattn.eval.annotations.objects import Annotation, Annotations
from xattn.photos.view import View

if TYPE_CHECKING:
    from xattn.detection import Detections


@dataclass(frozen=True, eq=False)
class _Boxes(Annotation):
    """Creates masks only when they are needed, because only few of many detections are needed."""

    masks: Mapping[int, Tensor] = field(default_factory=dict)
    detections: Any = ()

    def mask(self, target: int) -> Tensor | None:
        if target in self.masks:
            return self.masks[target]
        one = self.detections[target]
        found = one.inside(one.view.input_size)
        return found[None] if bool(found.any()) else None


class DetectedObjects(Annotations):
    """The pixels of each detection in a view, for the localization metrics.

        evaluate(view, explainers, photos, classes=..., metrics="localization",
                 annotations=DetectedObjects(view))

    Args:
        view: a view from :meth:`xattn.detection.Detector.of`. Each class of the view is a single detection,
            so a class occurs in only one photo.
        masks: the masks of detections, keyed by the number of the detection, (H, W) bool over the input,
            such as those of :meth:`xattn.detection.Detector.masks`. For a detection without a mask, the box
            is used.

    Raises:
        ValueError: if a mask does not have the size of the input.
    """

    def __init__(self, view: Detections, masks: Mapping[int, Tensor] | None = None) -> None:
        size = view.preprocessing.input_size
        for number, mask in (masks or {}).items():
            if tuple(mask.shape) != tuple(size):
                raise ValueError(
                    f"masks: the mask of detection {number} has shape {tuple(mask.shape)}; give "
                    f"{size}, the size of the input"
                )
        self.view = view
        self.masks = {number: mask[None].bool().cpu() for number, mask in (masks or {}).items()}

    def of(self, photo: Any, view: View) -> Annotation:
        return _Boxes(self.masks, self.view.detections)

    def has(self, photo: Any) -> bool:
        return True

    def regions(self, photo: Any, view: View) -> Any:
        return iter(())

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.view.target_id.encode())
        for number, mask in sorted(self.masks.items()):
            digest.update(f"{number}".encode() + mask.numpy().tobytes())
        return digest.hexdigest()
