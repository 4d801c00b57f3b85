"""iGOS++ finds a mask of evidence with integrated gradients: removing this evidence lowers the
probability, and showing it alone restores the probability.

    min over Mx, My   f(Mx) - f(1 - My) + f(Mx My) - f(1 - Mx My) + g(Mx My)
    g(M) = l1 mean(1 - M) + tv mean_u exp(-|dI(u)|^2 / sigma^2) |dM(u)|^2

f(M) is the probability of the class for the image x M + b (1 - M), and Mx My is the element-wise
product: Mx deletes evidence, and 1 - My shows evidence alone. dM and dI are differences between
neighbouring cells, and I is the image's brightness. The descent direction uses integrated gradients
instead of the gradients of f: the derivatives of 1/S sum_s f(s/S M), and of 1/S sum_s f(1 - s/S M)
where evidence is inserted. Steps of decreasing size are tried, and the first that lowers the sum
enough is taken (Armijo's rule). If none does, as on a plateau of f, the second size is taken, since
integrated gradients point beyond the plateau. The map is 1 - Mx My.

Khorram, Lawson and Li, CHIL 2021, arXiv 2012.15783; Qi, Khorram and Li, AAAI 2020, arXiv 1905.00954.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.explainers.base import register_explainer
from xattn.explainers.masking.mask_search import MaskSearch, Score, blend_levels
from xattn.runtime.option_checks import Count, NotNegative, Positive

TRIES, SHRINK, ARMIJO = 6, 0.2, 1e-4
SIGNS = (1.0, -1.0, 1.0, -1.0)  # of the four terms f


@register_explainer("igos_pp", title="iGOS++", cases=({"steps": 2, "path": 3, "cells": 8},))
@dataclass(kw_only=True, eq=False, repr=False)
class IgosPP(MaskSearch):
    """iGOS++: deletion and insertion of evidence, optimised together; it takes 1,624 passes, 1,200
    of them with gradients.

    Maps are (B, 1, cells, cells) in [0, 1], 0 where nothing is removed. The first step size tried moves the
    most important cell from one end of [0, 1] to the other.

    Args:
        steps: number of descent steps.
        path: S, the number of points on each of the four paths.
        cells: the side of a mask, in cells.
        l1: weight of the removed area.
        tv: weight of the total variation.
        sigma: scale of brightness differences, in [0, 1]; where neighbouring cells differ by more,
            changes in the mask are penalised less.
        noise: standard deviation of Gaussian noise added to the images on the paths, relative to
            pixels in [0, 1].
        fill: see :class:`~xattn.explainers.masking.mask_search.MaskSearch`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("igos_pp", net, steps=2, fill="black")
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 28, 28])
    """

    steps: Count = 15
    path: Count = 20
    cells: Count = 28
    l1: NotNegative = 1.0
    tv: NotNegative = 20.0
    sigma: Positive = 0.1
    noise: NotNegative = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.forwards = len(SIGNS) * (1 + self.steps * (self.path + TRIES + 1))

    def _search(self, levels: Tensor, target: Tensor) -> Tensor:
        return 1 - self._masks(levels, target).prod(0)[0]

    def _masks(self, levels: Tensor, target: Tensor) -> Tensor:
        """Mx and My, (2, 1, cells, cells)."""
        masks = levels.new_ones(2, 1, self.cells, self.cells)
        brightness = F.adaptive_avg_pool2d(levels[-1].mean(0, keepdim=True), self.cells)
        draw = torch.Generator().manual_seed(self.seed % 2**63)

        def score(images: Tensor) -> Tensor:
            logits = self.backbone.logits(images.to(self.backbone.mean.dtype))
            return self.backbone.probabilities(logits)[:, target]

        def value(masks: Tensor) -> float:
            copies = four(masks, levels.shape[2:])
            scores = torch.cat(self._batches.run(lambda m: score(blend_levels(levels, m)), copies))
            return float(signed_mean(scores) + self._price(masks, brightness))

        now = value(masks)
        for _ in range(self.steps):
            direction = self._direction(masks, levels, brightness, score, draw)
            largest = float(direction.abs().amax().clamp_min(1e-30))
            size = 1 / largest
            for _ in range(TRIES):
                new = (masks - size * direction).clamp(0, 1)
                found = value(new)
                if found <= now - ARMIJO * float((direction * (masks - new)).sum()):
                    break
                size *= SHRINK
            else:
                new = (masks - SHRINK / largest * direction).clamp(0, 1)
                found = value(new)
            masks, now = new, found
        return masks

    def _direction(
        self,
        masks: Tensor,
        levels: Tensor,
        brightness: Tensor,
        score: Score,
        draw: torch.Generator,
    ) -> Tensor:
        """The derivative with respect to ``masks``, with integrated gradients."""
        shares = torch.arange(1, self.path + 1, device="cpu").to(masks) / self.path
        with torch.enable_grad():
            leaf = masks.detach().requires_grad_()
            copies = four(leaf, levels.shape[2:], shares)
            shape = (len(copies), *levels.shape[1:])
            noise = self.noise * torch.randn(shape, generator=draw, device="cpu").to(levels)
            _, slopes = self._slopes(score, levels, copies, noise)
            total = signed_mean((slopes * copies).flatten(1).sum(1)) + self._price(leaf, brightness)
            return torch.autograd.grad(total, leaf)[0]

    def _price(self, masks: Tensor, brightness: Tensor) -> Tensor:
        """g of Mx My, for an image with ``brightness`` (1, cells, cells)."""
        both = masks.prod(0)
        edges = both.new_zeros(())
        for axis in (1, 2):
            alike = torch.exp(-(brightness.diff(dim=axis) / self.sigma).square())
            edges = edges + (alike * both.diff(dim=axis).square()).sum() / both.numel()
        return self.l1 * (1 - both).mean() + self.tv * edges


def four(masks: Tensor, size: Sequence[int], shares: Tensor | None = None) -> Tensor:
    """The masks of the four terms f at each of S ``shares``, (4 S, 1, H, W), from Mx and My
    (2, 1, h, w)."""
    cells = torch.cat([masks, masks.prod(0, keepdim=True)])
    pixels = F.interpolate(cells, tuple(size), mode="bilinear", align_corners=False)
    shares = masks.new_ones(1) if shares is None else shares
    x, y, both = (shares.view(-1, 1, 1, 1) * one for one in pixels)
    return torch.stack([x, 1 - y, both, 1 - both], 1).flatten(0, 1)


def signed_mean(scores: Tensor) -> Tensor:
    """Add the four terms f with their signs, and average over S; ``scores`` (4 S,) are the scores of the
    masks that :func:`four` returns."""
    return (scores.view(-1, 4) * scores.new_tensor(SIGNS)).sum(1).mean()
