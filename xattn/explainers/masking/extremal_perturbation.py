"""Extremal perturbations: the mask of a given area a that best preserves the score.

    m_a = argmax_c  f(x under m) - penalty / |Omega| * |sort(m) - r_a|^2,    m(u) = smax_v k(u - v) c(v)
    smax_v g(v) = sum_v g(v) exp(g(v) / T) / sum_v exp(g(v) / T),    k(d) = exp(-|d|^2 / (2 sigma^2))

r_a is 0 in the first (1 - a) |Omega| positions and 1 in all others: a sorted mask equals r_a if the
mask is binary and has area a. The cells c lie on a grid, and smax, a smooth maximum, turns them into a
mask as smooth as k. The map is the mean of the masks over all areas. Fong, Patrick and Vedaldi, ICCV
2019, arXiv 1910.08485. f is the logit; smax is computed at the cells and enlarged bilinearly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.explainers.base import register_explainer
from xattn.explainers.masking.mask_search import MaskSearch
from xattn.runtime.option_checks import Condition, Count, NotNegative, Positive

RATE, MOMENTUM = 0.01, 0.9

Areas = Annotated[
    Sequence[float],
    Condition(
        lambda areas: areas and all(0 < a < 1 for a in areas), "a list of shares above 0, below 1"
    ),
]


@register_explainer(
    "extremal_perturbation", title="Extremal perturbation", cases=({"steps": 2, "areas": [0.2]},)
)
@dataclass(kw_only=True, eq=False, repr=False)
class ExtremalPerturbation(MaskSearch):
    """Extremal perturbation: the mean of the masks for five areas; it takes 4,000 passes with gradients.

    Maps are (B, 1, H, W) in [0, 1]: 1 where the masks of all areas keep the pixel. Gradient descent uses
    a learning rate of 0.01 and a momentum of 0.9. All cells start at 1/2 and are kept in [0, 1].

    Args:
        areas: shares of the image that the masks keep; the masks are optimised in parallel.
        steps: number of gradient descent steps.
        step: grid spacing of the mask, in pixels.
        sigma: standard deviation of k in pixels; k is truncated at three standard deviations.
        temperature: T of the smooth maximum; near 0 it is the maximum.
        penalty: weight of the area term. It rises to this value over the first half of the steps,
            because at the start all pixels are equal and their order has no meaning.
        fill: see :class:`~xattn.explainers.masking.mask_search.MaskSearch`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("extremal_perturbation", net, steps=2)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 64, 64])
    """

    areas: Areas = (0.05, 0.1, 0.2, 0.4, 0.6)
    steps: Count = 800
    step: Count = 7
    sigma: Positive = 21.0
    temperature: Positive = 0.05
    penalty: NotNegative = 300.0
    blurs: ClassVar[int] = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        self.forwards = self.steps * len(self.areas)

    def _search(self, levels: Tensor, target: Tensor) -> Tensor:
        return self._masks(levels, target).mean(0)[0]

    def _masks(self, levels: Tensor, target: Tensor) -> Tensor:
        """The masks (A, 1, H, W) of the areas."""
        size, dtype = levels.shape[2:], levels.dtype
        grid = [-(-side // self.step) for side in size]
        cells = levels.new_full((len(self.areas), 1, *grid), 0.5).requires_grad_()
        ideal = self._ideal(size.numel()).to(levels)
        optimizer = torch.optim.SGD([cells], RATE, MOMENTUM)

        def score(images: Tensor) -> Tensor:
            return self.backbone.logits(images.to(self.backbone.mean.dtype))[:, target].to(dtype)

        for number in range(1, self.steps + 1):
            weight = self.penalty * min(1, 2 * number / self.steps)
            with torch.enable_grad():
                masks = self._mask(cells, size)
                _, slopes = self._slopes(score, levels, masks)
                off = (masks.flatten(1).sort(1).values - ideal).square().mean(1).sum()
                optimizer.zero_grad()
                (weight * off - (slopes * masks).sum()).backward()
            optimizer.step()
            cells.data.clamp_(0, 1)
        return self._mask(cells, size)

    def _ideal(self, pixels: int) -> Tensor:
        """r_a of each area, (A, pixels)."""
        places = torch.arange(pixels, device="cpu")
        first = [round((1 - area) * pixels) for area in self.areas]
        return torch.stack([(places >= start).float() for start in first])

    def _mask(self, cells: Tensor, size: Sequence[int]) -> Tensor:
        """Cells (A, 1, h, w) -> masks (A, 1, H, W)."""
        reach = math.ceil(3 * self.sigma / self.step)
        reach = min(reach, max(cells.shape[2:]) - 1)
        line = torch.arange(-reach, reach + 1, device="cpu").to(cells) * self.step
        k = torch.exp(-(line[:, None].square() + line.square()) / (2 * self.sigma**2))
        near = k.view(1, -1, 1) * F.unfold(cells, 2 * reach + 1, padding=reach)
        found = smooth_max(near, self.temperature).view_as(cells)
        return F.interpolate(found, tuple(size), mode="bilinear", align_corners=False)


def smooth_max(values: Tensor, temperature: float) -> Tensor:
    """The smooth maximum of (B, N, ...) over N.

    >>> smooth_max(torch.tensor([[0.0, 0.5, 1.0]]), 0.01)
    tensor([1.])
    """
    return (values * (values / temperature).softmax(1)).sum(1)
