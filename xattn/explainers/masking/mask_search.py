"""Base class of explainers that optimise a mask for one image with gradients of the masked image's score.

A mask m (1, H, W) in [0, 1] keeps the image where it is 1. Below 1 it blends the image with the fill b:
x m + b (1 - m). If the fill is a blur, the image is instead blurred with a Gaussian that widens as
m falls.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from xattn.explainers.base import ImageByImage

BLUR = 20 / 224  # standard deviation of the strongest blur, as a share of the image's shorter side
Score = Callable[[Tensor], Tensor]  # images (n, 3, H, W) -> scores (n,)


@dataclass(kw_only=True, eq=False, repr=False)
class MaskSearch(ImageByImage):
    """Base class of explainers that search for a mask, class by class.

    Args:
        fill: what replaces removed pixels: ``"blur"``, as in the papers, the image blurred with a
            Gaussian whose standard deviation is 20 pixels for a side of 224; ``"black"``, 0 in [0, 1]
            pixels; or ``"mean"``, the mean colour of the backbone's preprocessing.
    """

    fill: Literal["blur", "black", "mean"] = "blur"
    blurs: ClassVar[int] = 1  # levels of blur; the weakest is above 0

    @abstractmethod
    def _search(self, levels: Tensor, target: Tensor) -> Tensor:
        """The map (h, w) of one class, from the images of :meth:`_levels`."""

    def _explain(self, image: Tensor, classes: Tensor) -> Tensor:
        levels = self._levels(image.to(torch.promote_types(image.dtype, torch.float32)))
        return torch.stack([self._search(levels, target) for target in classes])

    def _levels(self, image: Tensor) -> Tensor:
        """(L, 3, H, W): the versions of an image (3, H, W) between a mask of 0 and a mask of 1, the
        last of which is the image itself."""
        if self.fill == "blur":
            widths = torch.linspace(1, 0, self.blurs + 1, device="cpu")[:-1].tolist()
            behind = [blur_image(image, BLUR * min(image.shape[1:]) * width) for width in widths]
        else:
            colour = self.backbone.mean[0].to(image) * (self.fill == "mean")
            behind = [colour.expand_as(image)]
        return torch.stack([*behind, image])

    def _slopes(
        self, score: Score, levels: Tensor, masks: Tensor, *noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores (n,) of the image under ``masks`` (n, 1, H, W), and their derivatives with respect to
        the masks.

        ``noise`` (n, 3, H, W) is added to the masked images.
        """

        def part(some: Tensor, *noise: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                leaf = some.detach().requires_grad_()
                scores = score(sum(noise, blend_levels(levels, leaf)))
                (slopes,) = torch.autograd.grad(scores.sum(), leaf)
            return scores.detach(), slopes

        scores, slopes = zip(*self._batches.run(part, masks, *noise), strict=True)
        return torch.cat(scores), torch.cat(slopes)


def blend_levels(levels: Tensor, masks: Tensor) -> Tensor:
    """The image under ``masks`` (n, 1, H, W), interpolated between the ``levels`` (L, 3, H, W).

    >>> blend_levels(torch.tensor([0.0, 8.0]).view(2, 1, 1, 1), torch.full((1, 1, 1, 1), 0.25)).item()
    2.0
    """
    place = masks * (len(levels) - 1)
    low = place.detach().nan_to_num().floor().long().clamp(0, len(levels) - 2)
    low = low.expand(-1, levels.shape[1], -1, -1)
    below, above = levels.gather(0, low), levels.gather(0, low + 1)
    return below + (place - low) * (above - below)


def blur_image(image: Tensor, width: float) -> Tensor:
    """``image`` (3, H, W) blurred with a Gaussian of standard deviation ``width`` pixels, truncated
    at two standard deviations."""
    from torchvision.transforms.functional import gaussian_blur  # imported late: it loads slowly

    side = 2 * math.ceil(2 * width) + 1
    for kernel in ([side, 1], [1, side]):
        image = gaussian_blur(image, kernel, [width, width])
    return image
