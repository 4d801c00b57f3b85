"""torchvision's detectors: Faster R-CNN, Mask R-CNN, RetinaNet, FCOS and SSD.

Candidates are the outputs of their heads before suppression, computed by the detector's own modules:

    two stages      each proposal, with a box per class; P is the softmax, O = 1 - P(background)
    RetinaNet       each anchor; P the sigmoids, O = max P
    FCOS            each place; P = sqrt(sigmoid(class) sigmoid(centre)), O = max P
    SSD             each default box; P the softmax, O = 1 - P(background)

Labels are the detector's own, so for most detectors 0 is the background. The detector's own resizing is
skipped, because its input already has the right size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import maskrcnn_inference, paste_masks_in_image
from torchvision.models.detection.ssd import SSD
from torchvision.ops import clip_boxes_to_image

from xattn.detection.candidates import Candidates, Suppression, full
from xattn.detection.networks import DetectionNetwork
from xattn.photos.preprocessing import Preprocessing

FAMILIES = (FasterRCNN, RetinaNet, FCOS, SSD)


class TorchvisionDetector(DetectionNetwork):
    """A detector of :mod:`torchvision.models.detection`.

    Args:
        net: one of :data:`FAMILIES`.
        size: (H, W) of its input; by default a square with the detector's shorter side.

    Raises:
        ValueError: the detector has an unsupported head.
    """

    def __init__(self, net: nn.Module, size: tuple[int, int] | None = None) -> None:
        own: Any = net
        transform = own.transform
        fixed = getattr(transform, "fixed_size", None)  # width and height
        side = int(transform.min_size[-1])
        step = int(transform.size_divisible)
        side = -(-side // step) * step
        size = size or (tuple(fixed)[::-1] if fixed else (side, side))
        photos = Preprocessing(
            size, tuple(transform.image_mean), tuple(transform.image_std), "bilinear", 1.0, "border"
        )
        rois = getattr(own, "roi_heads", own)
        suppression = Suppression(
            rois.score_thresh,
            rois.nms_thresh,
            rois.detections_per_img,
            smallest=1e-2 if rois is not own else 0.0,
            strongest=own.topk_candidates if isinstance(net, SSD) else None,
        )
        with torch.no_grad():
            image = next(own.parameters()).new_zeros(1, 3, *size)
            names = list(_as_dict(own.backbone(image)))
        super().__init__(net, _class_count(own), photos, suppression, len(names))
        self.names, self.proposes = names, isinstance(net, FasterRCNN)
        self.proposals: list[Tensor] = []  # from the last pass
        self.size = size  # of the last pass's images

    def parts(self, x: Tensor) -> tuple[list[Candidates], tuple[Tensor, ...]]:
        net: Any = self.net
        found = _as_dict(net.backbone(x))
        maps = self.through(list(found.values()))
        images = ImageList(x, [(x.shape[2], x.shape[3])] * len(x))
        if isinstance(net, FasterRCNN):
            features = dict(zip(found, maps, strict=True))
            return [self._two_stages(features, images)], maps
        # The head of each level runs by itself, so that gradients of a candidate cost only that level.
        anchors = net.anchor_generator(images, list(maps))[0]
        if isinstance(net, SSD):
            return self._ssd(maps, anchors), maps
        parts, at = [], 0
        for one in maps:
            answer = net.head([one])
            count = answer["cls_logits"].shape[1]
            parts.append(self._dense(answer, anchors[at : at + count], images.image_sizes[0]))
            at += count
        return parts, maps

    @torch.no_grad()
    def masks(self, x: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        """Masks (n, H, W) for boxes (n, 4) on one image (1, 3, H, W), from the head of Mask R-CNN.

        Raises:
            ValueError: the detector has no such head.
        """
        heads: Any = getattr(self.net, "roi_heads", None)
        if heads is None or not heads.has_mask():
            raise ValueError(
                f"model: a {type(self.net).__name__} gives no masks; use a Mask R-CNN, or boxes"
            )
        size = (x.shape[2], x.shape[3])
        features = _as_dict(self.net.backbone(x))  # type: ignore[operator]
        pooled = heads.mask_roi_pool(features, [boxes], [size])
        found = maskrcnn_inference(heads.mask_predictor(heads.mask_head(pooled)), [labels])[0]
        return paste_masks_in_image(found, boxes, size)[:, 0] > 0.5

    def _dense(
        self, answer: dict[str, Tensor], anchors: Tensor, size: tuple[int, int]
    ) -> Candidates:
        """Candidates of RetinaNet and FCOS at one level."""
        net: Any = self.net
        answer = {key: full(value) for key, value in answer.items()}
        scores = answer["cls_logits"].sigmoid()
        shifts = answer["bbox_regression"]
        if isinstance(net, FCOS):
            scores = (scores * answer["bbox_ctrness"].sigmoid()).sqrt()
            boxes = torch.stack([net.box_coder.decode(one, anchors) for one in shifts])
        else:
            boxes = torch.stack([net.box_coder.decode_single(one, anchors) for one in shifts])
        return Candidates(clip_boxes_to_image(boxes, size)[:, :, None], scores.amax(2), scores)

    def _ssd(self, maps: tuple[Tensor, ...], anchors: Tensor) -> list[Candidates]:
        net: Any = self.net
        parts, at = [], 0
        heads = (net.head.classification_head, net.head.regression_head)
        for i, one in enumerate(maps):
            logits, shifts = (full(_ssd_level(head, i, one)) for head in heads)
            own = anchors[at : at + logits.shape[1]]
            at += logits.shape[1]
            boxes = torch.stack([net.box_coder.decode_single(s, own) for s in shifts])
            boxes = clip_boxes_to_image(boxes, net.transform.fixed_size[::-1])
            parts.append(_softmax(boxes[:, :, None], logits))
        return parts

    def _two_stages(self, features: dict[str, Tensor], images: ImageList) -> Candidates:
        net: Any = self.net
        with torch.no_grad():  # as in training: no gradient passes through the proposals
            proposals, _ = net.rpn(images, features)
        self.proposals, self.size = proposals, images.image_sizes[0]
        boxes, logits = self._refined(features, proposals, images.image_sizes)
        counts = [len(one) for one in proposals]
        padded = (_padded(t, counts) for t in (boxes, logits))
        found = _softmax(*padded)
        there = torch.arange(max(counts), device=logits.device) < torch.tensor(
            counts, device=logits.device
        ).unsqueeze(1)
        return Candidates(found.boxes, found.objectness * there, found.classes * there.unsqueeze(2))

    def _refined(
        self, features: dict[str, Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Boxes (n, K, 4) and logits (n, K) of all proposals."""
        net: Any = self.net
        heads = net.roi_heads
        pooled = heads.box_roi_pool(features, proposals, sizes)
        # A level without a proposal also takes part in the answer, with a gradient of 0.
        pooled = pooled + 0 * torch.stack([one.mean() for one in features.values()]).sum()
        logits, shifts = (full(t) for t in heads.box_predictor(heads.box_head(pooled)))
        return clip_boxes_to_image(heads.box_coder.decode(shifts, proposals), sizes[0]), logits

    def again(self, maps: Sequence[Tensor], image: int, number: int) -> Candidates | None:
        """Only for two-stage detectors, where a backward pass through the heads would include all
        proposals."""
        if not self.proposes:
            return None
        features = {
            name: one[image : image + 1] for name, one in zip(self.names, maps, strict=True)
        }
        own = self.proposals[image][number : number + 1]
        boxes, logits = self._refined(features, [own], [self.size])
        return _softmax(boxes[None], logits[None])


def _as_dict(features: Any) -> dict[str, Tensor]:
    return {"0": features} if isinstance(features, Tensor) else dict(features)


def _class_count(net: Any) -> int:
    """The number K of classes that the head predicts, including the background if there is one."""
    if isinstance(net, FasterRCNN):
        return int(net.roi_heads.box_predictor.cls_score.out_features)
    head = net.head.classification_head
    found = getattr(head, "num_classes", None) or getattr(head, "num_columns", None)
    if found is None:
        raise ValueError(
            f"model: a {type(net).__name__} with a head of {type(head).__name__} is not understood; give a "
            f"function that returns boxes, labels and scores"
        )
    return int(found)


def _ssd_level(head: Any, i: int, features: Tensor) -> Tensor:
    """(B, anchors, columns) of the i-th map."""
    out = head.module_list[i](features)
    out = out.unflatten(1, (-1, head.num_columns)).permute(0, 3, 4, 1, 2)
    return out.flatten(1, 3)


def _softmax(boxes: Tensor, logits: Tensor) -> Candidates:
    """Candidates from logits (B, N, K) whose first class is the background."""
    p = logits.softmax(-1)
    classes = torch.cat([torch.zeros_like(p[..., :1]), p[..., 1:]], -1)
    return Candidates(boxes, 1 - p[..., 0], classes)


def _padded(values: Tensor, counts: list[int]) -> Tensor:
    """(sum of counts, ...) -> (B, max, ...)."""
    return nn.utils.rnn.pad_sequence(list(values.split(counts)), batch_first=True)
