"""Baseline maps that ignore the model. Every results table includes them, and a method must beat them.

``random``: independent uniform values, a pure function of (seed, image); ``centre``: a Gaussian in
the middle of the image, where photographers tend to place the subject; ``ones``: the mask that keeps every
pixel.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xattn.backbone import Backbone
from xattn.explainers.base import Explainer, register_explainer
from xattn.runtime.option_checks import Positive


@register_explainer("random", title="Random")
class Random(Explainer):
    """Baseline: uniform noise on the grid of the last tap, determined by the seed and the pixels.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> one, same = (xattn.create_explainer("random", net, seed=5) for _ in range(2))
        >>> image = torch.rand(1, 3, 64, 64)
        >>> bool((one.attribute(image, 0) == same.attribute(image, 0)).all())
        True
    """

    clips = True
    forwards = 0

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        grid = _grid(self.backbone, images)
        maps = []
        for image in images.float().cpu().contiguous().numpy():
            digest = hashlib.sha256(
                f"{self.seed}:{image.shape}:".encode() + image.tobytes()
            ).digest()
            generator = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
            maps.append(generator.random((1, *grid), dtype=np.float32))
        return torch.from_numpy(np.stack(maps)).to(images)


@register_explainer("centre", title="Centre")
@dataclass(kw_only=True, eq=False, repr=False)
class Centre(Explainer):
    """Baseline: a Gaussian around the image's centre.

    Args:
        sigma: standard deviation, as a fraction of the image's height and width and of a clip's length.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("centre", net)
        >>> maps = method.attribute(torch.rand(1, 3, 64, 64), target=0)
        >>> divmod(int(maps.flatten().argmax()), maps.shape[-1])  # the middle
        (31, 31)
    """

    sigma: Positive = 0.25
    forwards = 0
    clips = True

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        axes = [
            ((torch.arange(n, dtype=torch.float64, device="cpu") + 0.5) / n - 0.5).square()
            for n in images.shape[2:]
        ]
        squares = torch.stack(torch.meshgrid(*axes, indexing="ij")).sum(0)
        value = torch.exp(-squares / (2 * self.sigma**2)).to(images)
        return value.expand(len(images), 1, *value.shape).clone()


@register_explainer("ones", title="All ones")
class Ones(Explainer):
    """Baseline: a mask of ones, which keeps the whole image.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("ones", net)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=0).unique()
        tensor([1.])
    """

    forwards = 0
    is_mask = True
    clips = True

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return images.new_ones(images.shape[0], 1, *_grid(self.backbone, images))


def _grid(backbone: Backbone, images: Tensor) -> list[int]:
    """The last tap's (h, w), scaled for images that are not of the default size."""
    sides = zip(
        images.shape[2:], backbone.preprocessing.places, backbone.tap_sizes[-1], strict=True
    )
    return [max(1, round(side * tap / own)) for side, own, tap in sides]
