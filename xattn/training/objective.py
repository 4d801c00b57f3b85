"""The objectives of training on photos, for any head: T-TAME's masks, and masked outcomes.

T-TAME (arXiv 2403.04523):


    A = sigmoid(head(taps)),   m = bilinear(A[own class], input size),   y = argmax f(x)
    L = 1.5 CE(f(mask(x, m)), y) + 2 mean((A + 0.0005)^0.3) + 0.01 V(A)
    V(A) = [ sum |d_h A|^2 + sum |d_w A|^2 + 0.3 sum_border A^2 ] / (2 B)

The target is the model's own prediction, so no labels are needed. For a multi-label model it is one of
its positive labels, and -log sigmoid of that label's logit replaces the cross-entropy. V is a sum over
space and over the class axis of A, divided by the batch size only.

Masked outcomes, where a map explains how the network's output depends on what is kept:


    L = 1 - corr( P <m_j, S_k>, P y_jk ),    j = 1..N masks m_j of a photo,  y_jk the outcome of class k

S_k (h, w) is the map, <m, S> the sum of S over what mask m keeps, and P removes the mean over the masks
and what is linear in the area they keep. So neither a constant added to a map nor the network's liking for
much or little picture counts, only which parts matter.
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
from xattn.heads.base import MaskPolicy
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
    backbone: Backbone,
    images: Tensor,
    mask: Tensor,
    policy: MaskPolicy,
    taps: Taps | None = None,
) -> Tensor:
    """Logits (B, K) of ``images`` (B, 3, H, W) under a ``mask`` (B, 1, h, w), both in [0, 1].

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


@dataclass(frozen=True)
class Part:
    """The part of a batch that one of several processes holds.

    ``places`` (B,) are the positions of its images in the whole batch, ``counts`` the numbers of images of
    all processes, of which this is number ``rank``. A process without an image trains on a stand-in.
    """

    places: Tensor
    counts: Sequence[int]
    rank: int = 0

    def together(self, target: Tensor) -> tuple[Tensor, int]:
        """The targets of all images, process by process, and the place of this process's first one."""
        if len(self.counts) == 1:
            return target, 0
        own = target[: self.counts[self.rank]]
        everyone = torch.cat([t.to(target.device) for t in gather(own.cpu())])
        return everyone, sum(self.counts[: self.rank]) if len(own) else 0


def targets(logits: Tensor, task: str, places: Tensor | None = None) -> Tensor:
    """The class (B,) that each image is trained on: the prediction.

    For a multi-label model the place of the image in the batch (``places`` (B,), by default the row) picks
    one of its labels with p > 0.5, so that over the epochs the B most probable ones take turns. An image
    without such a label gets its most probable one.
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
    """Mean of -log p of the target classes; p is a softmax, or a sigmoid for multi-label models."""
    if task != "multilabel":
        return F.cross_entropy(widen(logits), target)
    return F.softplus(-widen(logits).gather(1, target[:, None])).mean()


def objective(
    head: nn.Module,
    backbone: Backbone,
    images: Tensor,
    config: TrainConfig,
    policy: MaskPolicy = "raw_normalize",
    part: Part | None = None,
) -> Terms:
    """The loss of a batch of ``images`` (B, 3, H, W) in [0, 1]; gradients reach only the head.

    ``part`` places the images in a batch that several processes share; with ``class_mode`` "batch" the
    masks are made for the classes of the whole batch. The mean of the processes' losses, weighted by their
    numbers of images, is the loss of the whole batch.
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


# ---------------------------------------------------------------------- masked outcomes


TINY = 1e-12
ROUNDING = 100  # sums over cells and masks are off by less than so many times the precision
REACTS = 1e-6
"""Outcomes whose variance, relative to their mean square, is less than this do not react to masks."""


def area_adjusted(values: Tensor, area: Tensor) -> Tensor:
    """``values`` (..., N) without their mean and without what is linear in ``area`` (..., N)."""
    centred = values - values.mean(-1, keepdim=True)
    slope = area - area.mean(-1, keepdim=True)
    square = slope.square().sum(-1, keepdim=True).clamp_min(TINY)
    return centred - (centred * slope).sum(-1, keepdim=True) / square * slope


def mask_effects(maps: Tensor, masks: Tensor) -> Tensor:
    """<m_j, S_k>, the sums of maps (B, M, h, w) over what masks (B, N, h, w) keep, (B, M, N)."""
    return maps.flatten(2) @ masks.flatten(2).transpose(1, 2)


def correlation(maps: Tensor, masks: Tensor, outcomes: Tensor) -> Tensor:
    """Area-adjusted correlation (B, M) of maps (B, M, h, w) with outcomes (B, M, N) of masks (B, N, h, w).

    It is 0 where an outcome does not vary over the masks, and near 0, with a bounded gradient, where a map
    does not.
    """
    maps, masks, outcomes = widen(maps), widen(masks), widen(outcomes)
    effects = mask_effects(maps, masks)
    area = masks.mean((2, 3))[:, None]
    x, y = area_adjusted(effects, area), area_adjusted(outcomes, area)
    size_x, size_y = x.norm(dim=-1), y.norm(dim=-1)
    # Of what rounding leaves of a constant the direction is noise.
    rounding = ROUNDING * torch.finfo(effects.dtype).eps
    least = rounding * (effects.detach().norm(dim=-1) + 1)
    varies = size_y > rounding * outcomes.norm(dim=-1)
    scale = torch.maximum(size_x, least) * torch.where(varies, size_y, 1)
    return torch.where(varies, (x * y).sum(-1) / scale, 0)


def reacts(masks: Tensor, outcomes: Tensor) -> Tensor:
    """Whether outcomes (B, M, N) vary over masks (B, N, h, w) beyond what their area explains, (B, M)."""
    outcomes = widen(outcomes)
    left = area_adjusted(outcomes, widen(masks).mean((2, 3))[:, None]).square().mean(-1)
    return left > REACTS * outcomes.square().mean(-1).clamp_min(TINY)


def log_odds(logits: Tensor, index: Tensor, task: str) -> Tensor:
    """log p / (1 - p) of classes ``index`` (..., M) by ``logits`` (..., K), (..., M): z_k less the
    log-sum-exp of all other logits, or z_k (multilabel)."""
    chosen = logits.gather(-1, index)
    if task == "multilabel":
        return chosen
    others = logits.unsqueeze(-2).expand(*index.shape, logits.shape[-1])
    others = others.scatter(-1, index.unsqueeze(-1), -torch.inf)
    return chosen - others.logsumexp(-1)
