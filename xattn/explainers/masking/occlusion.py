"""Occlusion: S_c(u) = mean over the windows w that cover u of f_c(x) - f_c(x without w).

Zeiler and Fergus, arXiv 1311.2901, section 4.2, as a difference of scores. Equal to Captum's
``Occlusion`` (tested), which is not used here: it explains one class per run, its last micro-batch
has another shape, it keeps a (3, H, W) mask for every image of a micro-batch, and it sums in
float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.explainers.base import register_explainer
from xattn.explainers.masking.masked_passes import PerturbationExplainer
from xattn.runtime.option_checks import Count


@register_explainer("occlusion", title="Occlusion", cases=({"size": 16, "stride": 16},))
@dataclass(kw_only=True, eq=False, repr=False)
class Occlusion(PerturbationExplainer):
    """Occlusion: how much the probability falls, on average, when a square window hides a pixel.

    Windows start at 0, stride, 2 stride, ... until one reaches the border, which cuts it. A map is
    (B, 1, H, W), signed, in [-1, 1].

    Args:
        size: the window's side in pixels; a seventh of the image's shorter side by default.
        stride: pixels between windows, at most ``size``; half of it by default.
        fill: see :class:`~xattn.explainers.masking.masked_passes.PerturbationExplainer`.
    """

    size: Count | None = None
    stride: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, columns = self._windows(*self.backbone.preprocessing.input_size)
        self.forwards = 1 + len(rows) * len(columns)

    def _windows(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The R x C windows: bool (R, H), the rows that each covers, and (C, W), the columns."""
        size = self.size or max(1, round(min(height, width) / 7))
        stride = self.stride or max(1, size // 2)
        if size > min(height, width):
            raise ValueError(
                f"size: got {size} for images of {height} x {width} pixels; give at most the "
                f"shorter side"
            )
        if stride > size:
            raise ValueError(
                f"stride: got {stride} with windows of {size} pixels, which would leave pixels out; "
                f"give at most {size}"
            )
        return _intervals(height, size, stride), _intervals(width, size, stride)

    def _explain(self, image: Tensor, classes: Tensor) -> Tensor:
        rows, columns = (w.to(image.device) for w in self._windows(*image.shape[1:]))

        def masks(index: Tensor) -> Tensor:  # index 0 is the clean image
            index = index.to(image.device)
            window = (index - 1).clamp_min(0)
            row, column = rows[window // len(columns)], columns[window % len(columns)]
            hidden = row[:, :, None] & column[:, None, :] & (index > 0)[:, None, None]
            return ~hidden[:, None]

        scores = self._scores(image, classes, 1 + len(rows) * len(columns), masks)
        drops = (scores[:1] - scores[1:]).T.reshape(len(classes), len(rows), len(columns))
        r, c = rows.cpu().double(), columns.cpu().double()
        covered = r.sum(0)[:, None] * c.sum(0)
        return (r.T @ drops @ c / covered).to(image.device)


def _intervals(side: int, size: int, stride: int) -> Tensor:
    """bool (windows, side): the pixels of each window along one axis."""
    starts = torch.arange(-(-(side - size) // stride) + 1, device="cpu")[:, None] * stride
    pixels = torch.arange(side, device="cpu")
    return (pixels >= starts) & (pixels < starts + size)
