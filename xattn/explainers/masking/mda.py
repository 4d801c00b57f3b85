"""MDA: a search for the patch order that maximises insertion and minimises deletion (an upper bound).

    insertion  add patches to a blurred photo: among the best candidates of a prior map, the one that
               raises p most, until p has risen 90 % of the way to the photo's
    deletion   add the remaining patches to black: among the worst candidates, the one that raises p least

The value of a patch is its drop on the deletion curve, after fitting a convex curve with the same ends.

Walker, Jha, Ewetz, "Metric-Driven Attributions for Vision Transformers", ICLR 2025. It optimises the
metrics directly, with thousands of passes per photo. Its purpose is to show how far other methods are
from the best possible value, not to compete with them. The paper's last step, which fits the values to
the mean of both curves, and its dense maps are not implemented. Where the curve is flat, ties are
broken by the order of the patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from xattn.explainers.base import Explainer, ImageByImage, create_explainer, register_explainer
from xattn.explainers.masking.mask_search import BLUR, blur_image
from xattn.runtime.option_checks import Count, Share


@register_explainer("mda", title="MDA", cases=({"cells": 2, "candidates": 4},))
@dataclass(kw_only=True, eq=False, repr=False)
class Mda(ImageByImage):
    """Metric-driven attribution: nonnegative maps (cells, cells), from about cells^2 x candidates
    passes.

    Args:
        cells: squares along a side.
        candidates: how many squares are tried at each step; the paper tries 28 of 196.
        until: the point at which insertion stops, as a share of the way from the blurred photo's
            probability to the original's.
        prior: the name of an explainer whose ranking of the squares selects the candidates.
    """

    perturbs = True
    cells: Count = 14
    candidates: Count = 28
    until: Share = 0.9
    prior: str = "gradcam"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self._prior: Explainer = create_explainer(self.prior, self.backbone)
        except ValueError as error:
            raise ValueError(f"prior: {str(error).removeprefix('explainer: ')}") from error
        self.forwards = self.cells**2 * self.candidates

    def _explain(self, image: Tensor, classes: Tensor) -> Tensor:
        return torch.stack([self._searched(image, target) for target in classes])

    def _searched(self, image: Tensor, target: Tensor) -> Tensor:
        prior = self._prior._attribute_noisy(image[None], target[None])
        prior = F.interpolate(prior, image.shape[1:], mode="bilinear")
        ranks = F.adaptive_avg_pool2d(prior, self.cells).flatten().argsort(descending=True)
        behind = blur_image(image, BLUR * min(image.shape[1:]))
        black = torch.zeros_like(image)
        ends = torch.stack([behind, image, black])
        low, high, empty = self._scores(ends, target).tolist()
        rest, first = ranks.tolist(), list[int]()
        gained = 0.0
        while rest and gained < self.until * (high - low):
            place, score = self._best(image, behind, first, rest[: self.candidates], target, 1)
            gained = score - low
            first.append(place)
            rest.remove(place)
        last, curve = list[int](), [empty]  # the rest goes onto black, worst first
        while rest:
            place, score = self._best(image, black, last, rest[-self.candidates :], target, -1)
            last.append(place)
            rest.remove(place)
            curve.append(score)
        order = [*first, *last[::-1]]
        if len(first) > 1:
            counts = range(len(last) + 1, len(order))
            images = [self._shown(image, black, order[-count:]) for count in counts]
            curve += self._scores(torch.stack(images), target).tolist()
        share = (np.array([*curve, high][: len(order) + 1]) - empty) / max(abs(high - empty), 1e-12)
        drops = convex_drops(np.minimum.accumulate(share[::-1].clip(0, 1)))
        values = torch.empty(len(order), dtype=torch.float64, device=image.device)
        values[order] = torch.from_numpy(
            drops + 1e-6 * np.arange(len(order), 0, -1) / len(order)
        ).to(image.device)
        return values.view(self.cells, self.cells)

    def _best(
        self, image: Tensor, behind: Tensor, shown: list[int], tried: list[int], target: Tensor, sign: int
    ) -> tuple[int, float]:  # fmt: skip
        """The square in ``tried`` that raises the probability most, or least, when added to the squares
        ``shown``."""
        images = torch.stack([self._shown(image, behind, [*shown, place]) for place in tried])
        scores = self._scores(images, target)
        best = int((sign * scores).argmax())
        return tried[best], float(scores[best])

    def _shown(self, image: Tensor, behind: Tensor, places: list[int]) -> Tensor:
        """``behind`` with the squares at ``places`` taken from ``image``."""
        mask = torch.zeros(self.cells**2, device=image.device, dtype=image.dtype)
        mask[places] = 1
        mask = mask.view(1, 1, self.cells, self.cells)
        mask = F.interpolate(mask, image.shape[1:], mode="nearest")[0]
        return torch.where(mask > 0, image, behind)

    def _scores(self, images: Tensor, target: Tensor) -> Tensor:
        """Probabilities (n,), from passes of a fixed shape."""

        def probabilities(some: Tensor) -> Tensor:
            return self.backbone.probabilities(self.backbone.logits(some))[:, target].cpu()

        count = len(images)
        filled = -(-count // self.candidates) * self.candidates
        images = images[torch.arange(filled, device=images.device).clamp_max(count - 1)]
        return torch.cat(self._batches.run(probabilities, images))[:count]


def convex_drops(curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """Decreasing values (n + 1,) -> the n drops of the closest convex decreasing curve with the same ends.

    Nonincreasing drops are sums of nonnegative steps, so this is a nonnegative least-squares problem.

    >>> convex_drops(np.array([1.0, 0.5, 0.25, 0.0])).round(3).tolist()
    [0.5, 0.25, 0.25]
    """
    from scipy.optimize import nnls  # imported late: it loads slowly

    count = len(curve) - 1
    until = np.minimum(*np.indices((count, count))) + 1.0  # of step k, what is gone after j drops
    weights = np.ones(count)
    weights[-1] = 1e4  # the end
    heights, _ = nnls(until * weights[:, None], (curve[0] - curve[1:]) * weights)
    return np.cumsum(heights[::-1])[::-1]
