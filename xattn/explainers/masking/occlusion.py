"""Occlusion: S_c(u) = mean over the windows w that cover u of f_c(x) - f_c(x without w).

Zeiler and Fergus, arXiv 1311.2901, section 4.2, as a difference of scores. It equals Captum's
``Occlusion`` (tested), which is not used here because it explains one class per run, changes the shape
of the last micro-batch, stores a (3, H, W) mask for every image of a micro-batch, and sums in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.explainers.base import register_explainer
from xattn.explainers.masking.masked_passes import PerturbationExplainer
from xattn.runtime.option_checks import Count


@register_explainer("occlusion", title="Occlusion", cases=({"size": 16, "stride": 16},))
@dataclass(kw_only=True, eq=False, repr=False)
class Occlusion(PerturbationExplainer):
    """Occlusion: the mean drop in the probability over all square windows that hide a pixel.

    Windows start at 0, stride, 2 stride, ... until one reaches the border, where it is cropped. A map is
    (B, 1, H, W), signed, in [-1, 1]. In a clip, a window hides only some of the frames.

    Args:
        size: the window's side in pixels; by default a seventh of the image's shorter side.
        stride: pixels between the starts of neighbouring windows, at most ``size``; by default half of it.
        frames: number of frames of a clip that a window hides; by default a quarter of them. Windows
            start at intervals of half that number.
        fill: see :class:`~xattn.explainers.masking.masked_passes.PerturbationExplainer`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("occlusion", net, size=8, stride=8, fill="mean")
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 64, 64])
    """

    size: Count | None = None
    stride: Count | None = None
    frames: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        windows = self._windows(self.backbone.preprocessing.places)
        self.forwards = 1 + math.prod(map(len, windows))

    def _windows(self, sides: Sequence[int]) -> list[Tensor]:
        """The R x C windows of images of ``sides`` (H, W): bool (R, H), the rows that each covers, and
        (C, W), the columns; for clips of (T, H, W), the frames come first."""
        *length, height, width = sides
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
        if not length and self.frames is not None:
            raise ValueError(f"frames: got {self.frames} for photos; leave it out")
        windows = [_intervals(side, size, stride) for side in (height, width)]
        for side in length:
            frames = min(side, self.frames or max(1, round(side / 4)))
            windows.insert(0, _intervals(side, frames, max(1, frames // 2)))
        return windows

    def _explain(self, image: Tensor, classes: Tensor) -> Tensor:
        windows = [w.to(image.device) for w in self._windows(image.shape[1:])]
        counts = [len(w) for w in windows]

        def masks(index: Tensor) -> Tensor:  # index 0 is the clean image
            index = index.to(image.device)
            places = torch.unravel_index((index - 1).clamp_min(0), counts)
            hidden = (index > 0).view(-1, *[1] * len(windows))
            for axis, (window, place) in enumerate(zip(windows, places, strict=True)):
                ones = [1] * len(windows)
                ones[axis] = -1
                hidden = hidden & window[place].view(len(index), *ones)
            return ~hidden[:, None]

        scores = self._scores(image, classes, 1 + math.prod(counts), masks)
        drops = (scores[:1] - scores[1:]).T.reshape(len(classes), *counts)
        for axis, window in enumerate((w.cpu().double() for w in windows), start=1):
            mean = window / window.sum(0)
            drops = torch.tensordot(drops.movedim(axis, -1), mean, 1).movedim(-1, axis)
        return drops.to(image.device)


def _intervals(side: int, size: int, stride: int) -> Tensor:
    """bool (windows, side): the pixels of each window along one axis."""
    starts = torch.arange(-(-(side - size) // stride) + 1, device="cpu")[:, None] * stride
    pixels = torch.arange(side, device="cpu")
    return (pixels >= starts) & (pixels < starts + size)
