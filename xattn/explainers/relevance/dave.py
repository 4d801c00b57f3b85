"""DAVE: LibraGrad's coefficients, averaged over shifted and rotated copies of a photo.

    map = sum over channels of  x * 1/n sum_k T_k' c(T_k x),    c(x) = L(x)' e_class

Wrobel et al., ICML 2026, arXiv 2602.06613. With attention weights, gates and deviations held constant, a
network is a linear map L(x) of its input, which replaces the gradient. The mean of L over small
transformations T of the photo (a Reynolds operator) removes patterns that move with the patch grid. T'
is the transpose, so that the map's sum is the mean contribution of the copies' pixels to the logit.

Our only source is the paper's abstract. No published equation gives the strength of its noise or
the form of its low-pass filter. Noise is therefore an option, off by default, and there is no
filter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.explainers.base import Choose, register_explainer
from xattn.explainers.gradients import class_gradients
from xattn.explainers.relevance.lrp import PIXELS, RelevanceExplainer
from xattn.explainers.relevance.rules import COMPOSITES, Composite
from xattn.runtime.option_checks import Count, NotNegative


@register_explainer(
    "dave", title="DAVE", cases=({"copies": 2}, {"copies": 1, "rotation": 0.0, "noise": 0.1})
)
@dataclass(kw_only=True, eq=False, repr=False)
class Dave(RelevanceExplainer):
    """DAVE without its low-pass filter: signed maps (B, 1, H, W), from one forward and one backward pass
    per copy.

    ``balance`` and ``relevance`` refer to the photo itself, not to its copies.

    Args:
        copies: n; the paper uses 50.
        shift: largest shift of a copy along each axis, in pixels.
        rotation: largest rotation of a copy, in degrees; the paper uses 20. Corners get the mean colour.
        noise: standard deviation of Gaussian noise added to the copies' pixels in [0, 1].
    """

    at: str = field(default=PIXELS, init=False)
    copies: Count = 50
    shift: NotNegative = 6.0
    rotation: NotNegative = 20.0
    noise: NotNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.forwards = 1 + self.copies

    @property
    def _composite(self) -> Composite:
        return COMPOSITES["libragrad"]

    def _attribute_classes(self, images: Tensor, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            logits = self.backbone.logits(images)
        classes = self._chosen(choose, logits)
        x = (images - self.backbone.mean.to(images)).requires_grad_()  # 0 is the mean colour
        total = torch.zeros(*classes.shape, *images.shape[1:], dtype=x.dtype, device=x.device)
        generator = torch.Generator().manual_seed(self.seed)  # the same copies for every photo
        for _ in range(self.copies):
            drawn = 2 * torch.rand(3, generator=generator, device="cpu") - 1
            noise = torch.randn(images.shape[1:], generator=generator, device="cpu")
            with torch.enable_grad():
                copy = move_images(
                    x, *(drawn * drawn.new_tensor([self.shift, self.shift, self.rotation]))
                )
                noisy = copy.detach() + self.noise * noise.to(x)
                raw = noisy + self.backbone.mean.to(x)
                answer, ends = self._pass(raw, self._engine(), [PIXELS])
                for i, (c,) in enumerate(class_gradients(answer, ends[PIXELS], classes)):
                    total[:, i] += torch.autograd.grad(copy, x, c, retain_graph=True)[0]
        pixels = self.backbone.normalize(images)[:, None]
        return logits, classes, (pixels * total / self.copies).sum(2)


def move_images(images: Tensor, down: Tensor, right: Tensor, degrees: Tensor) -> Tensor:
    """``images`` (B, C, H, W), rotated around their centre, then shifted by ``down`` and ``right`` pixels;
    uncovered areas are 0.

    >>> x = torch.arange(9.0).view(1, 1, 3, 3)
    >>> move_images(x, torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.0))[0, 0].round().tolist()
    [[0.0, 0.0, 0.0], [0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """
    height, width = images.shape[2:]
    angle = float(degrees) * math.pi / 180
    sin, cos = math.sin(angle), math.cos(angle)
    # Maps a position in the result, in [-1, 1], to one in the image; pixels are square.
    x, y = -2 * float(right) / width, -2 * float(down) / height
    rows = [[cos, sin * height / width], [-sin * width / height, cos]]
    theta = torch.tensor([[*row, row[0] * x + row[1] * y] for row in rows], device="cpu").to(images)
    across, along = (
        (2 * torch.arange(n, dtype=images.dtype, device=images.device) + 1) / n - 1
        for n in (height, width)
    )
    y_of, x_of = torch.meshgrid(across, along, indexing="ij")
    grid = torch.stack([x_of, y_of, torch.ones_like(x_of)], 2) @ theta.T
    grid = grid.expand(len(images), *grid.shape)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False)
