"""Detectors of ultralytics (YOLO), used by duck typing: the package, which is AGPL, is never imported.

    load_detector(YOLO("yolo11n.pt"))

Candidates are the head's outputs before suppression: P the sigmoids of the classes, O = max P. For a model
that needs no suppression (``end2end``), the candidates are its 300 outputs, each of which has a score for
a single class. The feature maps are those that the head reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xattn.detection.candidates import Candidates, Suppression, full
from xattn.detection.networks import DetectionNetwork
from xattn.photos.preprocessing import Preprocessing
from xattn.runtime.copies import frozen_copy


def is_ultralytics(model: Any) -> bool:
    """Whether ``model`` is a ``YOLO(...)`` with a torch network."""
    own = all(hasattr(model, name) for name in ("predict", "names"))
    return own and isinstance(getattr(model, "model", None), nn.Module)


class UltralyticsDetector(DetectionNetwork):
    """The network of a ``YOLO``; if it also predicts masks or keypoints, only the boxes are used.

    Args:
        yolo: see :func:`is_ultralytics`.
        size: (H, W) of its input, by default 640 pixels per side.

    Raises:
        ValueError: the model has no detection head, or a side is not a multiple of its strides.
    """

    def __init__(self, yolo: Any, size: tuple[int, int] | None = None) -> None:
        # Only the network, because train(False) of a YOLO starts a training run.
        net: Any = frozen_copy(yolo.model)
        layers = getattr(net, "model", None)
        head: Any = layers[-1] if isinstance(layers, nn.Sequential) else None
        if not all(hasattr(head, name) for name in ("nc", "nl")):
            raise ValueError(
                f"model: a {type(yolo).__name__} of {type(net).__name__} has no detection head; give one "
                f"whose task is detect"
            )
        size, step = size or (640, 640), int(net.stride.max())
        if size[0] % step or size[1] % step:
            raise ValueError(f"input_size: got {size}; give multiples of {step}")
        photos = Preprocessing(size, (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0, "border")
        self.ends = bool(getattr(head, "end2end", False))
        kept = Suppression(0.25, None if self.ends else 0.7, 300, one_class=True)
        super().__init__(net, int(head.nc), photos, kept, int(head.nl))
        names = yolo.names
        self.class_names = [str(n) for n in (names.values() if isinstance(names, dict) else names)]
        self.maps: tuple[Tensor, ...] = ()  # from the last pass
        head.register_forward_pre_hook(self._lead)

    def _lead(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The head's inputs, passed through the points."""
        self.maps = self.through(inputs[0])
        return (list(self.maps), *inputs[1:])

    def parts(self, x: Tensor) -> tuple[list[Candidates], tuple[Tensor, ...]]:
        answer = self.net(x)
        while isinstance(answer, tuple | list):
            answer = answer[0]
        own = full(answer)
        maps, self.maps = self.maps, ()
        if self.ends:  # (B, 300, 6): corners, score, class
            numbers = torch.arange(self.num_classes, device=x.device)
            classes = own[..., 4:5] * (own[..., 5:6] == numbers)
            boxes = own[..., :4]
        else:  # (B, 4 + K + ..., N): centre, width, height
            own = own.transpose(1, 2)
            centre, half = own[..., :2], own[..., 2:4] / 2
            boxes = torch.cat([centre - half, centre + half], -1)
            classes = own[..., 4 : 4 + self.num_classes]
        return [Candidates(boxes[:, :, None], classes.amax(-1), classes)], maps
