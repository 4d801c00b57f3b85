"""RISE: S_c(u) = 1 / (N p) sum_i f_c(x o m_i) m_i(u), over N random masks m_i.

Petsiuk et al., BMVC 2018, arXiv 1806.07421. A mask is an s x s grid of cells, each 1 with
probability p, enlarged bilinearly to (s + 1) cells of ceil(H / s) x ceil(W / s) pixels and cropped
to H x W at a random offset of less than a cell. For a clip of T frames, a mask is a grid of min(s, T) x
s x s cells in time and space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from xattn.explainers.base import register_explainer
from xattn.explainers.masking.masked_passes import PerturbationExplainer
from xattn.runtime.option_checks import Condition, Count


@register_explainer("rise", title="RISE", cases=({"masks": 6},))
@dataclass(kw_only=True, eq=False, repr=False)
class Rise(PerturbationExplainer):
    """RISE: the mean mask, weighted by the class probability of the masked image.

    The masks depend only on the seed and the image's size, so all images share them. A map is (B, 1, H,
    W), nonnegative, and noisy; its standard error falls as 1 / sqrt(masks).

    Args:
        masks: N; the paper uses 4000 (VGG-16) and 8000 (ResNet-50).
        cells: s, the number of cells along a side.
        keep: p, the probability that a cell is 1.
        fill: ``"mean"`` matches the paper, which fills normalised images with zeros.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("rise", net, masks=50)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 64, 64])
    """

    masks: Count = 1000
    cells: Count = 7
    keep: Annotated[float, Condition(lambda p: 0 < p < 1, "a probability between 0 and 1")] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.forwards = self.masks

    def _explain(self, image: Tensor, classes: Tensor) -> Tensor:
        masks = self._random_masks(image)
        total = torch.zeros(
            len(classes), *image.shape[1:], dtype=torch.float64, device=image.device
        )

        def add(mask: Tensor, scores: Tensor) -> None:
            weighted = scores.T.to(image.device) @ mask.flatten(1).double()
            total.add_(weighted.view_as(total))

        self._scores(image, classes, self.masks, masks, add)
        return total / (self.masks * self.keep)

    def _random_masks(self, image: Tensor) -> Callable[[Tensor], Tensor]:
        """indices (n,) -> masks (n, 1, H, W) or (n, 1, T, H, W) float32 in [0, 1]."""
        generator = self._generator()
        counts = [*(min(self.cells, n) for n in image.shape[1:-2]), self.cells, self.cells]
        grids = generator.random((self.masks, *counts)) < self.keep
        offsets = torch.from_numpy(generator.random((self.masks, len(counts)))).to(image.device)
        cells = torch.from_numpy(grids).to(image.device, torch.float32)
        # Bilinear enlargement is separable: rows (n, H, s) @ cells (n, s, s) @ columns (n, s, W).
        pairs = list(zip(image.shape[1:], counts, strict=True))
        tables = [_interpolation(side, count).to(image.device) for side, count in pairs]
        sides = [torch.arange(side, device=image.device) for side in image.shape[1:]]

        def masks(index: Tensor) -> Tensor:
            index = index.to(image.device)
            *times, rows, columns = (
                table[(offsets[index, axis] * _cell(len(side), count)).long()[:, None] + side]
                for axis, (table, side, count) in enumerate(zip(tables, sides, counts, strict=True))
            )
            chosen = cells[index]
            for steps in times:  # (n, T, s)
                chosen = torch.einsum("nts,nshw->nthw", steps, chosen)
                rows, columns = rows[:, None], columns[:, None]
            return (rows @ chosen @ columns.mT).clamp(0, 1)[:, None]

        return masks


def _cell(side: int, cells: int) -> int:
    """The side of a cell in pixels."""
    return -(-side // cells)


def _interpolation(side: int, cells: int) -> Tensor:
    """((cells + 1) cell pixels, cells): bilinear weights of the cells for each enlarged pixel."""
    pixels = (cells + 1) * _cell(side, cells)
    position = (
        torch.arange(pixels, dtype=torch.float64, device="cpu") + 0.5
    ) * cells / pixels - 0.5
    position = position.clamp(0, cells - 1)
    return (1 - (position[:, None] - torch.arange(cells, device="cpu")).abs()).clamp_min(0).float()
