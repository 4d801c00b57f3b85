"""The common interface of detectors: a module that returns candidates and the feature maps behind them.

    forward_candidates(x) -> (candidates, maps)     x (B, 3, H, W) normalised, maps (B, C_i, h_i, w_i)

Used as a classifier, the module returns the log-odds of the best candidate for each class, so that a
detector alone is a multilabel backbone. The detector families are in the modules beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.detection.candidates import Candidates, Suppression, log_odds
from xattn.photos.preprocessing import Preprocessing


class DetectionNetwork(nn.Module):
    """A :class:`~xattn.backbone.TapModule`; each family defines :meth:`parts`.

    Args:
        net: the detector.
        num_classes: K, the classes as the detector numbers them.
        preprocessing: preprocessing of photos.
        suppression: how candidates become detections.
        levels: number of feature maps.

    Attributes:
        points: for each feature map, an identity that the map passes through and that CAM methods read.

    Example:
        >>> import torch, xattn
        >>> from xattn.detection import DetectionNetwork
        >>> detector = xattn.load_detector("torchvision/ssdlite320_mobilenet_v3_large", None)
        >>> isinstance(detector.model, DetectionNetwork), detector.model.default_task
        (True, 'multilabel')
    """

    default_task = "multilabel"
    proposes = False  # whether :meth:`again` returns candidates

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        preprocessing: Preprocessing,
        suppression: Suppression,
        levels: int,
    ) -> None:
        super().__init__()
        self.net = net
        self.num_classes = num_classes
        self.preprocessing = preprocessing
        self.suppression = suppression
        self.points = nn.ModuleList(nn.Identity() for _ in range(levels))
        self.tap_names = [f"level.{i}" for i in range(levels)]

    @property
    def gradcam_layer(self) -> nn.Module | None:
        """The coarsest map; None if the detector returns no maps."""
        return self.points[-1] if len(self.points) else None

    @property
    def gradcam_layers(self) -> tuple[nn.Module, ...]:
        """All maps, which methods that read a layer combine by default."""
        return tuple(self.points)

    def parts(self, x: Tensor) -> tuple[list[Candidates], tuple[Tensor, ...]]:
        """The candidates, in parts, and the maps. If there are as many parts as maps, part i comes only
        from map i; otherwise each part may come from all maps."""
        raise NotImplementedError

    def again(self, maps: Sequence[Tensor], image: int, number: int) -> Candidates | None:
        """Compute one candidate of the last call of :meth:`parts` again from ``maps``, as candidates of
        shape (1, 1). It is the candidate ``number`` of the given image. Return None if this
        would save nothing."""
        return None

    def forward_candidates(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """:meth:`Candidates.pack <xattn.detection.Candidates.pack>`, (B, N, D), and the maps."""
        parts, maps = self.parts(x)
        return torch.cat([part.pack() for part in parts], 1), maps

    def forward_taps(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The log-odds (B, K) of the best candidate for each class, and the maps."""
        packed, maps = self.forward_candidates(x)
        return log_odds(Candidates.of(packed, self.num_classes).classes.amax(1)), maps

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_taps(x)[0]

    def through(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The maps after each of them has passed through its identity in ``points``."""
        return tuple(point(one) for point, one in zip(self.points, maps, strict=True))


class CallableDetector(DetectionNetwork):
    """Any function that returns boxes, labels and scores; only for black-box methods and metrics.

    Args:
        function: receives images (B, 3, H, W) in [0, 1] and returns for each of them a dict with ``boxes``
            (n, 4), x0 y0 x1 y1 in pixels of the input, ``labels`` (n,) and ``scores`` (n,) in [0, 1], or a
            tuple of these three. The dict may also contain ``probabilities`` (n, K).

    Example:
        >>> import torch
        >>> from xattn.detection import CallableDetector
        >>> from xattn import Preprocessing
        >>> def squares(images):
        ...     return [([[8.0, 8, 24, 24]], [1], [0.9]) for _ in images]
        >>> net = CallableDetector(squares, 2, Preprocessing((32, 32)))
        >>> candidates, maps = net.parts(torch.rand(1, 3, 32, 32))
        >>> candidates[0].classes.shape
        torch.Size([1, 1, 2])
    """

    def __init__(
        self, function: Callable[[Tensor], Any], num_classes: int, preprocessing: Preprocessing
    ) -> None:
        net = function if isinstance(function, nn.Module) else nn.Identity()
        super().__init__(net, num_classes, preprocessing, Suppression(0.0, None, 300), 0)
        self.function = function
        self.tap_names = ["pixels"]

    @torch.no_grad()
    def parts(self, x: Tensor) -> tuple[list[Candidates], tuple[Tensor, ...]]:
        answer = self.function(x)
        alone = len(x) == 1 and isinstance(answer, Sequence) and len(answer) == 3
        answer = [answer] if alone or isinstance(answer, dict) else answer
        if not isinstance(answer, Sequence) or len(answer) != len(x):
            raise _not_understood(answer, f"for {len(x)} images")
        each = [self._one(one, x) for one in answer]
        most = max(1, *(len(scores) for _, scores in each))
        boxes = torch.stack([F.pad(b, (0, 0, 0, most - len(b))) for b, _ in each])
        classes = torch.stack([F.pad(s, (0, 0, 0, most - len(s))) for _, s in each])
        return [Candidates(boxes[:, :, None], classes.amax(2), classes)], (
            F.adaptive_avg_pool2d(x, 14),
        )

    def _one(self, answer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (n, 4) and class scores (n, K) of one image."""
        if isinstance(answer, dict):
            missing = {"boxes", "labels", "scores"} - set(answer)
            if missing:
                raise _not_understood(answer, f"without {', '.join(sorted(missing))}")
            given: Any = [answer[key] for key in ("boxes", "labels", "scores")]
        else:
            given = answer
        if not isinstance(given, Sequence) or len(given) != 3:
            raise _not_understood(answer, "for one image")
        boxes, labels, scores = (torch.as_tensor(v, device=x.device) for v in given)
        boxes = boxes.to(x).reshape(-1, 4) if boxes.numel() == 0 else boxes.to(x)
        if boxes.shape != (len(scores), 4) or labels.shape != scores.shape:
            shapes = ", ".join(str(tuple(v.shape)) for v in (boxes, labels, scores))
            raise _not_understood(answer, f"of shapes {shapes}")
        if len(scores) and not bool(((scores >= 0) & (scores <= 1)).all()):
            raise _not_understood(answer, f"with scores up to {float(scores.max()):g}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"class_names: the detector answered class {int(labels.max())}, and there are "
                f"{self.num_classes} names; give one a class, from 0"
            )
        if isinstance(answer, dict) and "probabilities" in answer:
            every = torch.as_tensor(answer["probabilities"], device=x.device).to(x)
            if every.shape != (len(scores), self.num_classes):
                shapes = f"{tuple(every.shape)}, not {(len(scores), self.num_classes)}"
                raise _not_understood(answer, f"with probabilities of shape {shapes}")
            return boxes, every
        return boxes, F.one_hot(labels.long(), self.num_classes).to(x) * scores.to(x)[:, None]


def _not_understood(answer: Any, what: str) -> ValueError:
    return ValueError(
        f"model: its answer is not understood, a {type(answer).__name__} {what}; return for each image a "
        f"dict with boxes (n, 4) as x0 y0 x1 y1 in pixels, labels (n,) and scores (n,) in [0, 1]"
    )
