"""The T-TAME training objective (arXiv 2403.04523), for any head that gives class scores.

    A = sigmoid(head(taps)),   m = bilinear(A[own class], input size),   y = argmax f(x)
    L = 1.5 CE(f(mask(x, m)), y) + 2 mean((A + 0.0005)^0.3) + 0.01 V(A)
    V(A) = [ sum |d_h A|^2 + sum |d_w A|^2 + 0.3 sum_border A^2 ] / (2 B)

The target is the model's own prediction, so no labels are needed; for a multi-label model it is one
of its positive labels, and -log sigmoid of that label's logit takes the place of the cross-entropy.
V is a sum over space and over the class axis of A, divided by the batch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.backbone import Backbone, Taps
from xattn.config import TrainConfig
from xattn.heads.fusion import resize
from xattn.kernels.softmax.reference import widen
from xattn.runtime.distributed import gather

AREA_OFFSET, AREA_POWER, BORDER_WEIGHT = 0.0005, 0.3, 0.3


class Terms(NamedTuple):
    """The weighted sum ``loss`` and its unweighted terms, scalars."""

    loss: Tensor
    cross_entropy: Tensor
    area: Tensor
    variation: Tensor


def area(masks: Tensor) -> Tensor:
    """mean((A + 0.0005)^0.3) over masks (B, M, h, w) in (0, 1)."""
    return (masks + AREA_OFFSET).pow(AREA_POWER).mean()


def variation(masks: Tensor) -> Tensor:
    """V(A) of masks (B, M, h, w): squared differences plus 0.3 x the squared border, over 2 B."""
    dh = (masks[:, :, 1:] - masks[:, :, :-1]).square().sum()
    dw = (masks[..., 1:] - masks[..., :-1]).square().sum()
    rows = masks[:, :, (0, -1)].square().sum()
    columns = masks[..., (0, -1)].square().sum()
    return (dh + dw + BORDER_WEIGHT * (rows + columns)) / (2 * masks.shape[0])


def masked_logits(
    backbone: Backbone, images: Tensor, mask: Tensor, policy: str, taps: Taps | None = None
) -> Tensor:
    """Logits (B, K) of masked ``images`` (B, 3, H, W) in [0, 1]; ``mask`` (B, 1, h, w) in [0, 1].

    ``policy``: ``"raw_normalize"`` multiplies pixels, masked = black (T-TAME's CNNs);
    ``"renormalize"`` says the same from the normalised image; ``"normalized"`` multiplies the
    normalised image, masked = the data set's mean colour (T-TAME's ViT); ``"feature"`` multiplies the
    pooled map of ``taps`` and continues with the classifier (L-CAM-Fm).
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
    if policy == "renormalize":
        return backbone.logits_normalized(backbone.normalize(backbone.denormalize(x) * mask))
    raise ValueError(f"mask_policy: got {policy!r}; see xattn.heads.base.MASK_POLICIES")


@dataclass(frozen=True)
class Part:
    """What one process has of a batch that several train on.

    ``places`` (B,) are those of its images in the whole batch, ``counts`` the images of all processes,
    of which this one is number ``rank``. One without an image trains on a stand-in.
    """

    places: Tensor
    counts: Sequence[int]
    rank: int = 0

    def together(self, target: Tensor) -> tuple[Tensor, int]:
        """The targets of all images, process by process, and where this one's begin."""
        if len(self.counts) == 1:
            return target, 0
        own = target[: self.counts[self.rank]]
        everyone = torch.cat([t.to(target.device) for t in gather(own.cpu())])
        return everyone, sum(self.counts[: self.rank]) if len(own) else 0


def targets(logits: Tensor, task: str, places: Tensor | None = None) -> Tensor:
    """The class (B,) each image is trained on: the prediction.

    Of a multi-label model the place in the batch (``places`` (B,), by default the row) picks among the
    labels with p > 0.5, so that over the epochs the B most probable of them have their turn; an image
    without one gets its most probable label.
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
    """-log p of the target classes, mean over the batch: softmax, or of one sigmoid (multi-label)."""
    if task != "multilabel":
        return F.cross_entropy(widen(logits), target)
    return F.softplus(-widen(logits).gather(1, target[:, None])).mean()


def objective(
    head: nn.Module,
    backbone: Backbone,
    images: Tensor,
    config: TrainConfig,
    policy: str = "raw_normalize",
    part: Part | None = None,
) -> Terms:
    """The loss of one batch of ``images`` (B, 3, H, W) in [0, 1]; gradients reach the head only.

    ``part`` says what they are of the batch of several processes, the classes of whose images all
    masks are made for; the mean of the losses, each weighted by its number of images, is that of the
    whole batch.
    """
    with torch.no_grad():
        taps = backbone(images)
    batch, first = images.shape[0], 0
    part = part or Part(torch.arange(batch, device=images.device), [batch])
    target = targets(taps.logits, backbone.task, part.places)
    if config.class_mode == "own":
        index = target[:, None]
    elif config.class_mode == "top":
        others = taps.logits.scatter(1, target[:, None], torch.inf)  # the own class comes first
        index = others.topk(min(sum(part.counts), taps.logits.shape[1]), dim=1).indices
    else:
        everyone, first = part.together(target)
        index = everyone[None]
    masks = widen(head(taps, index)).sigmoid()
    if config.class_mode == "batch":
        own = torch.arange(batch, device=images.device)
        own_mask = masks[own, first + own][:, None]
    else:  # the first class is the image's own
        own_mask = masks[:, :1]
    logits = masked_logits(backbone, images, own_mask, policy, taps)
    fit = classification_loss(logits, target, backbone.task)
    terms = fit, area(masks), variation(masks)
    weights = config.cross_entropy, config.area, config.variation
    loss = sum(
        (w * t for w, t in zip(weights, terms, strict=True)), torch.zeros((), device=images.device)
    )
    return Terms(loss, *terms)
