"""MDA: the order of patches that insertion and deletion ask for, found by a search (an upper bound).

    insertion  onto a blurred photo, of the best candidates of a prior map the one that raises p most,
               until p has come 90 % of the way to the photo's
    deletion   of the others, onto black, of the least candidates the one that raises p least
    a patch's value is its drop on the deletion curve, by the closest convex curve with the same ends

Walker, Jha, Ewetz, "Metric-Driven Attributions for Vision Transformers", ICLR 2025. It optimises what
metrics measure, with thousands of passes a photo: it says how far other methods are from what can be
reached, and is no competitor. Their last step, which fits the values to the mean of both curves, and their
dense maps are not built. A patch's place in the order breaks ties where the curve is flat.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from xattn.explainers.base import Explainer, ImageByImage, create_explainer, register_explainer
from xattn.explainers.masking.mask_search import BLUR, blurred
from xattn.runtime.option_checks import Count, Share


@register_explainer("mda", title="MDA", cases=({"cells": 2, "candidates": 4},))
@dataclass(kw_only=True, eq=False, repr=False)
class Mda(ImageByImage):
    """Metric-driven attribution, (cells, cells), not negative; about cells^2 x candidates passes.

    Args:
        cells: squares along a side.
        candidates: how many squares are tried for each place; the paper tries 28 of 196.
        until: share of the way from the blurred photo's probability to the photo's at which insertion ends.
        prior: an explainer by name, which says which squares are candidates.
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
        behind = blurred(image, BLUR * min(image.shape[1:]))
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
        last, curve = list[int](), [empty]  # what stays is put onto black, the least first
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
        """Of ``tried`` the square that raises the probability most, or least, beside those ``shown``."""
        images = torch.stack([self._shown(image, behind, [*shown, place]) for place in tried])
        scores = self._scores(images, target)
        best = int((sign * scores).argmax())
        return tried[best], float(scores[best])

    def _shown(self, image: Tensor, behind: Tensor, places: list[int]) -> Tensor:
        """``behind`` with squares of ``image``."""
        mask = torch.zeros(self.cells**2, device=image.device, dtype=image.dtype)
        mask[places] = 1
        mask = mask.view(1, 1, self.cells, self.cells)
        mask = F.interpolate(mask, image.shape[1:], mode="nearest")[0]
        return torch.where(mask > 0, image, behind)

    def _scores(self, images: Tensor, target: Tensor) -> Tensor:
        """Probabilities (n,), from passes of one shape."""

        def probabilities(some: Tensor) -> Tensor:
            return self.backbone.probabilities(self.backbone.logits(some))[:, target].cpu()

        count = len(images)
        filled = -(-count // self.candidates) * self.candidates
        images = images[torch.arange(filled, device=images.device).clamp_max(count - 1)]
        return torch.cat(self._batches.run(probabilities, images))[:count]


def convex_drops(curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n + 1,) falling values -> the n drops of the closest convex falling curve with the same ends.

    Drops that never grow are sums of steps, whose heights no sign may change: least squares of these.

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
