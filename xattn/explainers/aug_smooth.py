"""Test-time augmentation: the mean over the maps of six copies of a photo, each mapped back.

    S(x) = 1/6 sum over k in (1, .9, 1.1) of  s(x_k) + mirror(s(mirror(x_k))),    x_k = m + k (x - m)

m is the network's mean colour, so that k scales the normalised photo. pytorch-grad-cam has the same copies
under this name, and scales each map to [0, 1] before the mean. Every explainer takes it as an option.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Copy(NamedTuple):
    """A photo with ``contrast`` k, then mirrored."""

    mirrored: bool
    contrast: float

    def of(self, images: Tensor, mean: Tensor) -> Tensor:
        """Copies of ``images`` (B, C, H, W) around the colour ``mean`` (1, C, 1, 1)."""
        images = mean + self.contrast * (images - mean)
        return images.flip(3) if self.mirrored else images

    def back(self, maps: Tensor) -> Tensor:
        """Maps (B, M, h, w) of copies as maps of the photos."""
        return maps.flip(3) if self.mirrored else maps


# Those beside the photo itself.
OTHERS = (
    Copy(True, 1.0),
    *(Copy(mirrored, contrast) for contrast in (0.9, 1.1) for mirrored in (False, True)),
)
