"""``mask``: learn masks that preserve the prediction, for any head with class maps (T-TAME, arXiv
2403.04523).

    A = sigmoid(head(taps)),   m = bilinear(A[own class], input size),   y = argmax f(x)
    L = 1.5 CE(f(mask(x, m)), y) + 2 mean((A + 0.0005)^0.3) + 0.01 V(A)
    V(A) = [ sum |d_h A|^2 + sum |d_w A|^2 + 0.3 sum_border A^2 ] / (2 B)

The target is the model's own prediction, so no labels are needed. For a multi-label model, the target is
one of its positive labels, and -log sigmoid of that label's logit replaces the cross-entropy. V is a sum
over space and over the class axis of A, divided by the batch size only.

LTX (ICDM 2023) uses the mean of A as its area term, which is :class:`Mask` with ``area_term="mean"``. With
``"ltx"``, the area term is mean log(1 + exp A), between .69 and 1.31, as in LTX's program, which applies a
sigmoid twice.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.backbone import Backbone, Taps
from xattn.heads.base import MaskPolicy
from xattn.heads.fusion import resize
from xattn.kernels.softmax.reference import widen
from xattn.training.objectives.base import Objective, Step, Terms, register_objective

AREA_OFFSET, AREA_POWER, BORDER_WEIGHT = 0.0005, 0.3, 0.3


def area_penalty(masks: Tensor) -> Tensor:
    """Compute mean((A + 0.0005)^0.3) over masks (B, M, h, w) in (0, 1)."""
    return (masks + AREA_OFFSET).pow(AREA_POWER).mean()


def variation_penalty(masks: Tensor) -> Tensor:
    """Compute V(A) of masks (B, M, h, w): the squared differences between neighbours plus 0.3 x the squared
    values at the border, summed and divided by 2 B."""
    dh = (masks[:, :, 1:] - masks[:, :, :-1]).square().sum()
    dw = (masks[..., 1:] - masks[..., :-1]).square().sum()
    rows = masks[:, :, (0, -1)].square().sum()
    columns = masks[..., (0, -1)].square().sum()
    return (dh + dw + BORDER_WEIGHT * (rows + columns)) / (2 * masks.shape[0])


def masked_logits(
    backbone: Backbone,
    images: Tensor,
    mask: Tensor,
    policy: MaskPolicy,
    taps: Taps | None = None,
) -> Tensor:
    """Compute the logits (B, K) of ``images`` (B, 3, H, W) under a ``mask`` (B, 1, h, w), both in [0, 1].

    ``policy``: ``"raw_normalize"`` multiplies pixels, so that masked means black (T-TAME's CNNs);
    ``"renormalize"`` does the same to the denormalised image; ``"normalized"`` multiplies the normalised
    image, so that masked means the data set's mean colour (T-TAME's ViT); ``"feature"`` multiplies the
    last map of ``taps`` and continues with the classifier (L-CAM-Fm).
    """
    if policy == "feature":
        last = (backbone(images) if taps is None else taps).maps[-1]
        return backbone.head_logits(last * resize(mask, tuple(last.shape[2:])))
    mask = resize(mask, tuple(images.shape[2:]))
    if policy == "raw_normalize":
        return backbone.logits(images * mask)
    x = backbone.normalize(images)
    if policy == "normalized":
        return backbone.logits_normalized(x * mask)
    return backbone.logits_normalized(backbone.normalize(backbone.denormalize(x) * mask))


def predicted_targets(logits: Tensor, task: str, places: Tensor | None = None) -> Tensor:
    """Return the class (B,) that each image is trained on, which is the predicted class.

    For a multi-label model, this is one of the image's labels with p > 0.5, selected by the image's
    position in the batch (``places`` (B,), by default the row), so that over the epochs the image's B most
    probable labels are used in turn. An image without such a label uses its most probable label.
    """
    if task != "multilabel":
        return logits.argmax(1)
    order = logits.argsort(dim=1, descending=True, stable=True)
    positive = (logits > 0).sum(1).clamp_min(1)
    if places is None:
        places = torch.arange(len(logits), device=logits.device)
    turn = places.to(logits.device) % positive
    return order.gather(1, turn[:, None])[:, 0]


def classification_loss(logits: Tensor, target: Tensor, task: str) -> Tensor:
    """Compute the mean of -log p of the target classes; p is a softmax, or a sigmoid for multi-label
    models."""
    if task != "multilabel":
        return F.cross_entropy(widen(logits), target)
    return F.softplus(-widen(logits).gather(1, target[:, None])).mean()


@register_objective("mask", title="Masks that keep the prediction", paper="arXiv 2403.04523")
class Mask(Objective):
    """The objective of T-TAME; the weights of its terms come from the configuration.

    Args:
        area_term: the area term of the mask A: ``"power"`` mean((A + 0.0005)^0.3), ``"mean"`` its mean
            (LTX), or ``"ltx"`` mean log(1 + exp A), as in LTX's program.
    """

    reads = "photos"

    def __init__(self, area_term: Literal["power", "mean", "ltx"] = "power") -> None:
        self.area_term = area_term

    def on_photos(self, step: Step) -> Terms:
        head, backbone, images, config = step.head, step.backbone, step.images, step.config
        with torch.no_grad():
            taps = backbone(images)
        target = predicted_targets(taps.logits, backbone.task, step.part.places)
        index, first = self._classes(step, taps.logits, target)
        masks = widen(head(taps, index)).sigmoid()
        if config.class_mode == "batch":
            own = torch.arange(len(images), device=images.device)
            own_mask = masks[own, first + own][:, None]
        else:  # the first class is the image's own
            own_mask = masks[:, :1]
        logits = masked_logits(backbone, images, own_mask, head.mask_policy, taps)
        terms = {
            "cross_entropy": classification_loss(logits, target, backbone.task),
            "area": self._area(masks),
            "variation": variation_penalty(masks),
        }
        loss = sum(
            (getattr(config, name) * term for name, term in terms.items()),
            torch.zeros((), device=images.device),
        )
        return {"loss": loss, **terms}

    def _classes(self, step: Step, logits: Tensor, target: Tensor) -> tuple[Tensor, int]:
        """The classes whose maps are computed, and the position of the first image's class among
        them."""
        mode, part = step.config.class_mode, step.part
        if mode == "own":
            return target[:, None], 0
        if mode == "top":
            others = logits.scatter(1, target[:, None], torch.inf)  # the own class comes first
            return others.topk(min(sum(part.counts), logits.shape[1]), dim=1).indices, 0
        everyone, first = part.gather_targets(target)
        return everyone[None], first

    def _area(self, masks: Tensor) -> Tensor:
        if self.area_term == "power":
            return area_penalty(masks)
        return masks.mean() if self.area_term == "mean" else F.softplus(masks).mean()
