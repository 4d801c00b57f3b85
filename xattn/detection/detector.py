"""Detectors: their detections in a photo, and the views whose classes are detections.

    detector = load_detector("torchvision/retinanet_resnet50_fpn_v2", weights="DEFAULT")
    found = detector.detect("photo.jpg")                 after suppression
    missed = detector.missed("photo.jpg", "dog", (40, 60, 220, 300))
    view = detector.of([*found, missed])                 a backbone whose classes are these

Boxes are x0 y0 x1 y1 in pixels of the photo. The input shows the whole photo, with borders if its aspect
ratio differs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.backbone import Backbone
from xattn.backbone.scored import BackboneView
from xattn.backbone.taps import Taps
from xattn.detection.candidates import LEAST, Candidates, Found, best, iou, log_odds
from xattn.detection.networks import DetectionNetwork
from xattn.photos.arrays import array_images, is_array
from xattn.photos.images import MAX_PIXELS, load_image
from xattn.photos.preprocessing import Preprocessing
from xattn.photos.view import View, prepare

Box = tuple[float, float, float, float]
Score = Literal["similarity", "class"]
Kind = Literal["found", "candidate", "missed", "false"]
OVERLAP = 0.5  # boxes with at least this IoU show the same object
AT_ONCE = 1 << 24  # number of candidate-detection pairs compared at once
# The requested detections of a view, if not all are; the others get the logit of p = 0.
WANTED: ContextVar[range | None] = ContextVar("wanted", default=None)


@dataclass(frozen=True)
class Detection:
    """One box of one photo.

    Attributes:
        place: x0, y0, x1, y1 in pixels of the detector's input, which may include padding.
        label: the class as the detector numbers it, and its ``name``.
        score: score of that class, in [0, 1].
        kind: ``"found"`` after suppression, ``"false"`` if there is no true object, ``"missed"`` for an
            object that was asked for, or ``"candidate"`` before suppression.
        view: how the photo became the detector's input.
        classes: (K,) scores of all classes, which D-RISE compares.

    Example:
        >>> import torch, xattn
        >>> def squares(images):
        ...     return [([[8.0, 8, 24, 24]], [1], [0.9]) for _ in images]
        >>> detector = xattn.load_detector(squares, class_names=["cat", "dog"], input_size=32)
        >>> one = detector.detect(torch.rand(3, 32, 32))[0]
        >>> one.name, one.place
        ('dog', (8.0, 8.0, 24.0, 24.0))
    """

    place: Box
    label: int
    name: str
    score: float
    kind: Kind
    view: View = field(repr=False)
    classes: Tensor = field(repr=False, compare=False)

    @property
    def box(self) -> Box:
        """x0, y0, x1, y1 in pixels of the photo, clipped to it."""
        return _to_photo(self.place, self.view)

    @property
    def title(self) -> str:
        """A title such as ``"dog 0.93"`` or ``"missed dog 0.08"``."""
        before = "" if self.kind == "found" else f"{self.kind} "
        return f"{before}{self.name} {self.score:.2f}"

    def inside(self, size: tuple[int, int]) -> Tensor:
        """(H, W) bool: the pixels of the input whose centres are inside the box."""
        x0, y0, x1, y1 = self.place
        y, x = (torch.arange(n, device="cpu") + 0.5 for n in size)
        return ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))

    def record(self) -> dict[str, Any]:
        """Box, class, score and kind, for packs."""
        box = [round(v, 2) for v in self.box]
        about = {"label": self.label, "name": self.name, "kind": self.kind}
        return {"box": box, "score": float(f"{self.score:.6g}"), **about}


class Detector(Backbone):
    """A frozen detector; created by :func:`~xattn.detection.loading.load_detector`.

    By itself it is a multilabel classifier: its logits (B, K) are the log-odds of the best candidate for
    each class.

    Example:
        >>> import torch, xattn
        >>> def squares(images):
        ...     return [([[8.0, 8, 24, 24]], [1], [0.9]) for _ in images]
        >>> detector = xattn.load_detector(squares, class_names=["cat", "dog"], input_size=32)
        >>> [(d.name, round(d.score, 2)) for d in detector.detect(torch.rand(3, 32, 32))]
        [('dog', 0.9)]
    """

    model: DetectionNetwork

    def __init__(
        self,
        model: DetectionNetwork,
        name: str,
        preprocessing: Preprocessing,
        class_names: Sequence[str],
    ) -> None:
        super().__init__(model, name, preprocessing, None, class_names, "multilabel")

    def with_preprocessing(self, preprocessing: Preprocessing) -> Detector:
        other = Detector(self.model, self.name, preprocessing, self.class_names)
        self._share_fingerprint(other)
        return other

    # ------------------------------------------------------------------ photos

    @torch.no_grad()
    def candidates(self, photo: Any) -> tuple[Candidates, View]:
        """All candidates before suppression, in pixels of the input, and the photo's view.

        Args:
            photo: a path, a PIL image, or a tensor (3, H, W) or an array (H, W, 3) in [0, 1].
        """
        x, view = self._input(photo)
        with self._passing(x):
            packed, _ = self.model.forward_candidates(x)
        return Candidates.of(packed, self.num_classes), view

    def detect(
        self, photo: Any, threshold: float | None = 0.5, most: int | None = None
    ) -> list[Detection]:
        """The detections after the detector's own suppression, best first.

        Args:
            threshold: detections need a score above this; None uses the detector's own.
            most: largest number of detections.

        Raises:
            ValueError: the threshold is outside [0, 1], or the photo cannot be read.
        """
        check_threshold(threshold)
        found, view = self.candidates(photo)
        kept = self.model.suppression.kept(found, threshold)
        return [self._detection(one, found, view, "found") for one in kept[:most]]

    def detect_all(
        self,
        data: Any,
        threshold: float | None = 0.5,
        most: int | None = 10,
        max_pixels: int | None = MAX_PIXELS,
    ) -> list[Detection]:
        """The detections in all photos of ``data`` (as in :func:`xattn.fit`), such as those that a head is
        trained on; photos that cannot be read are left out.

        Raises:
            ValueError: as in :meth:`detect`, or nothing is detected in any photo.
        """
        from xattn.photos.sources import open_photos

        check_threshold(threshold)
        photos, found = open_photos(data), list[Detection]()
        for stored in photos:
            try:
                photo = stored.load(max_pixels)
            except (ValueError, OSError):
                continue
            found += self.detect(photo, threshold, most)
        if not found:
            raise ValueError(
                f"threshold: no detection above {threshold} in {len(photos)} photos; give a lower one"
            )
        return found

    def best_candidates(self, photo: Any, most: int = 1) -> list[Detection]:
        """The ``most`` candidates with the highest scores, before suppression."""
        found, view = self.candidates(photo)
        return [self._detection(one, found, view, "candidate") for one in best(found, most)]

    def missed(self, photo: Any, label: int | str, box: Sequence[float]) -> Detection:
        """The best candidate for an object that the detector does not find: among candidates with an IoU
        of at least 0.5 with ``box``, the one with the highest score for the class; if there is none, the
        one with the highest IoU x score.

        Its ``classes`` are 1 for the requested class and 0 for all others.

        Raises:
            ValueError: the class is unknown, the box is outside the photo, or no candidate overlaps it.
        """
        index = self.class_index(label)
        found, view = self.candidates(photo)
        asked = check_box(box, view)
        own = torch.tensor(_to_input(asked, view)).to(found.boxes)
        boxes = found.boxes_of(torch.tensor([index]))[0, :, 0]
        overlaps = iou(boxes, own)
        scores = found.classes[0, :, index]
        near = overlaps >= OVERLAP
        value = torch.where(near, scores, -1.0)
        if not near.any():
            value = overlaps * scores.clamp_min(LEAST)
        at = int(value.argmax())
        if not float(overlaps[at]):
            raise ValueError(
                f"box: no candidate for {self.class_names[index]!r} overlaps "
                f"{tuple(round(v) for v in asked)}; give a larger box"
            )
        one = Found(at, index, float(scores[at]), tuple(boxes[at].tolist()))
        made = self._detection(one, found, view, "missed")
        return replace(made, classes=torch.eye(self.num_classes, device="cpu")[index])

    def judged(
        self, photo: Any, truth: Sequence[tuple[int | str, Sequence[float]]], threshold: float = 0.5
    ) -> list[Detection]:
        """The detections in a photo whose objects are known. Detections that match no object are of kind
        ``"false"``; the best candidate for each object without a match is added, as ``"missed"``.

        Args:
            truth: (class, box) of each object. A detection matches the object of its class with which it
                has the largest IoU, if that is at least 0.5. Detections with higher scores are
                matched first.
        """
        objects = [(self.class_index(label), tuple(box)) for label, box in truth]
        judged, left = [], list(objects)
        for one in self.detect(photo, threshold):
            place = torch.tensor(one.box)
            fits = [_fit(place, box) if label == one.label else 0.0 for label, box in left]
            best_fit = max(fits, default=0.0)
            if best_fit >= OVERLAP:
                left.pop(fits.index(best_fit))
            judged.append(one if best_fit >= OVERLAP else replace(one, kind="false"))
        return judged + [self.missed(photo, label, box) for label, box in left]

    def masks(self, photo: Any, detections: Sequence[Detection]) -> Tensor:
        """Mask R-CNN's masks for the objects of a photo's detections, (n, H, W) bool over the detector's
        input.

        Raises:
            ValueError: the detector does not predict masks.
        """
        if not hasattr(self.model, "masks"):
            raise ValueError(f"model: {self.name} gives no masks; use a Mask R-CNN, or boxes")
        x, _ = self._input(photo)
        boxes = x.new_tensor([one.place for one in detections])
        labels = torch.tensor([one.label for one in detections], device=x.device)
        with self._passing(x):
            return self.model.masks(x, boxes, labels)  # type: ignore[operator,no-any-return]

    def of(self, detections: Sequence[Detection], score: Score = "similarity") -> Detections:
        """A backbone whose classes are ``detections``, see :class:`Detections`."""
        return Detections(self, detections, score)

    def _input(self, photo: Any) -> tuple[Tensor, View]:
        """The photo normalised, (1, 3, H, W), and its view."""
        pixels, view = _read(photo, self.preprocessing)
        dtype = next((p.dtype for p in self.parameters()), pixels.dtype)
        return self.normalize(pixels[None].to(self.device, dtype)), view

    def _detection(self, one: Found, found: Candidates, view: View, kind: Kind) -> Detection:
        x0, y0, x1, y1 = one.box
        classes = found.classes[0, one.number].float().cpu()
        name = self.class_names[one.label]
        return Detection((x0, y0, x1, y1), one.label, name, one.score, kind, view, classes)


class Detections(BackboneView):
    """A detector whose classes are detections in one or several photos.

    The logit of detection t on an image is the log-odds of the candidate j that is most similar to it:

        "similarity"   max_j IoU(b_t, b_j) cos(P_t, P_j) O_j       D-RISE
        "class"        max_j IoU(b_t, b_j) p_j(class of t)

    so that p, the sigmoid of the logit, is this maximum. No gradient passes through b_j, because the IoU
    has a corner at b_j = b_t, where its slope would depend on rounding. The gradients are therefore those
    of the scores. On the detection's own photo the cosine is at its maximum, so that only the gradient of
    the objectness, or of the class's score, is left.

    Args:
        base: the detector.
        detections: may come from several photos; methods explain the requested classes on each photo.
        score: ``"similarity"`` or ``"class"``.

    Example:
        >>> import torch, xattn
        >>> from xattn.detection import Detections
        >>> def squares(images):
        ...     return [([[8.0, 8, 24, 24]], [1], [0.9]) for _ in images]
        >>> detector = xattn.load_detector(squares, class_names=["cat", "dog"], input_size=32)
        >>> photo = torch.rand(3, 32, 32)
        >>> view = Detections(detector, detector.detect(photo))
        >>> view.logits(photo[None]).shape  # one class per detection
        torch.Size([1, 1])
    """

    base: Detector
    detections: tuple[Detection, ...]
    score: Score

    def __init__(
        self, base: Detector, detections: Sequence[Detection], score: Score = "similarity"
    ) -> None:
        if isinstance(detections, Detection) or not detections:
            raise ValueError(
                "detections: give a list of one or more, of detector.detect(photo) or .missed(...)"
            )
        if score not in get_args(Score):
            raise ValueError(f"score: got {score!r}; choose one of {', '.join(get_args(Score))}")
        super().__init__(base, [one.title for one in detections], "multilabel")
        vars(self).update(detections=tuple(detections), score=score)

    def again(self, base: Backbone) -> Detections:
        assert isinstance(base, Detector)
        return Detections(base, self.detections, self.score)

    def answer(self, outputs: Tensor) -> Tensor:
        """Packed candidates (B, N, D) -> (B, M)."""
        found = Candidates.of(outputs, self.base.num_classes)
        count = len(self.detections)
        own = WANTED.get() or range(count)
        step = max(1, AT_ONCE // max(1, found.objectness.numel()))
        parts = [own[i : i + step] for i in range(0, len(own), step)]
        values = log_odds(torch.cat([self.scores(found, part).amax(1) for part in parts], 1))
        return F.pad(values, (own.start, count - own.stop), value=math.log(LEAST))

    def scores(self, found: Candidates, numbers: Sequence[int]) -> Tensor:
        """(B, N, m) in [0, 1]: how well each candidate matches each of m detections."""
        own = [self.detections[number] for number in numbers]
        labels = torch.tensor([one.label for one in own], device=found.boxes.device)
        boxes = found.boxes_of(labels)
        places = boxes.new_tensor([one.place for one in own])
        overlap = iou(boxes.detach(), places)
        if self.score == "class":
            return overlap * found.classes[..., labels]
        classes = torch.stack([one.classes for one in own]).to(found.classes)
        classes = classes / classes.norm(dim=1, keepdim=True).clamp_min(1e-12)
        norms = found.classes.norm(dim=2, keepdim=True).clamp_min(1e-12)
        cosine = found.classes @ classes.T / norms
        return overlap * cosine.clamp(0, 1) * found.objectness[..., None]

    def forward_normalized(self, x: Tensor) -> Taps:
        with self.base._passing(x):
            packed, maps = self.base.model.forward_candidates(x)
        return Taps(self._answered(packed), maps)

    def logits_normalized(self, x: Tensor) -> Tensor:
        logits = self.forward_normalized(x).logits
        if x.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
            raise ValueError(
                f"explainer: {self.name} answers without a gradient; use a method without gradients, such "
                f"as 'd_rise' or 'occlusion'"
            )
        return logits

    def about(self, target: int) -> dict[str, Any]:
        return {"detection": {**self.detections[target].record(), "explained": self.score}}

    @property
    def boxes(self) -> Tensor:
        height, width = self.preprocessing.input_size
        places = torch.tensor([one.place for one in self.detections])
        return places / torch.tensor([width, height] * 2)

    @property
    def target_id(self) -> str:
        """The number and a hash of these detections, which identify them in protocols."""
        text = repr([(one.record(), one.view) for one in self.detections])
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{len(self.detections)} detections by {self.score} {digest}"


def require_detections(backbone: Backbone, explainer: str) -> Detections:
    """Return the view itself; raise a ``ValueError`` if the backbone's classes are not detections."""
    if not isinstance(backbone, Detections):
        raise ValueError(
            f"explainer: {explainer!r} explains detections, {backbone.name} has classes; give "
            f"detector.of(detector.detect(photo)), or call xattn.explain_detections"
        )
    return backbone


# ---------------------------------------------------------------------- geometry and checks


def _read(photo: Any, preprocessing: Preprocessing) -> tuple[Tensor, View]:
    """The input (3, H, W) in [0, 1]; a tensor of the input's size is used unchanged."""
    if is_array(photo):
        image = array_images(photo, len(preprocessing.mean))[0]
        size = image.size
        if image.is_tensor and size == tuple(preprocessing.input_size):
            return image.input(), View("tensor", size, size, (0, 0, *size), size)
        photo = image.load()
    return prepare(load_image(photo), preprocessing)


def _scale(view: View) -> tuple[tuple[float, float], ...]:
    """For x and y: photo pixels per input pixel, and the position of the input's origin on the photo."""
    found = []
    for axis in (1, 0):
        resized = view.photo_size[axis] / view.resized[axis]
        step = view.box[axis + 2] / view.input_size[axis] * resized
        found.append((step, view.box[axis] * resized))
    return tuple(found)


def _to_photo(box: Sequence[float], view: View) -> Box:
    x, y = _scale(view)
    height, width = view.photo_size
    left, right = (min(max(v * x[0] + x[1], 0.0), float(width)) for v in box[::2])
    top, bottom = (min(max(v * y[0] + y[1], 0.0), float(height)) for v in box[1::2])
    return left, top, right, bottom


def _to_input(box: Sequence[float], view: View) -> Box:
    x, y = _scale(view)
    left, right = ((v - x[1]) / x[0] for v in box[::2])
    top, bottom = ((v - y[1]) / y[0] for v in box[1::2])
    return left, top, right, bottom


def check_box(box: Sequence[float], view: View) -> Box:
    """Return the four finite numbers of a box on the photo; raise a ``ValueError`` for anything else."""
    height, width = view.photo_size
    try:
        x0, y0, x1, y1 = (float(v) for v in box)
        whole = all(map(math.isfinite, (x0, y0, x1, y1))) and x0 < x1 and y0 < y1
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(
            f"box: got {box!r:.80}; give x0, y0, x1, y1 in pixels, x0 < x1 and y0 < y1"
        )
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        raise ValueError(
            f"box: ({x0:g}, {y0:g}, {x1:g}, {y1:g}) lies outside the photo of {width} x {height} pixels; "
            f"give pixels of the photo, from its upper left corner"
        )
    return max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))


def check_threshold(threshold: float | None) -> None:
    if threshold is not None and not (isinstance(threshold, float | int) and 0 <= threshold <= 1):
        raise ValueError(f"threshold: got {threshold!r}; give a score from 0 to 1")


def _fit(place: Tensor, box: Sequence[float]) -> float:
    return float(iou(place, torch.tensor([float(v) for v in box])))
