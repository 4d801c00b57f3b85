"""The inputs on which xattn and the reference libraries are compared: a tiny network, and photos.

``synthetic`` is made of fixed numbers (PCG64 streams) and runs anywhere. ``photos`` is lite0 with
ImageNet weights on four photos that are named in ``photos.json``, not stored; the maps are stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent
PHOTOS = HERE.parents[3] / "shared/data/imagenet-sample"
POSITIONS = (12, 137, 255, 401)  # in the sorted list of photos


@dataclass(frozen=True)
class Case:
    """One model, B images (B, 3, H, W) in [0, 1], B raw maps (B, 1, h, w) and B classes."""

    name: str
    net: nn.Module  # takes normalised images
    layer: str  # of net, for class activation maps
    mean: Tensor  # (3, 1, 1)
    std: Tensor
    images: Tensor
    maps: Tensor
    targets: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[-2], self.images.shape[-1]

    @property
    def normalized(self) -> Tensor:
        return (self.images - self.mean) / self.std

    def f(self, images: Tensor) -> Tensor:
        """Raw pixels -> logits."""
        return self.net((images - self.mean) / self.std)

    @property
    def grey(self) -> Tensor:
        """The maps (B, 1, H, W) as masks: min-max, then bilinear (align_corners=False)."""
        low, high = self.maps.amin((2, 3), keepdim=True), self.maps.amax((2, 3), keepdim=True)
        scaled = ((self.maps.double() - low) / (high - low)).float()
        return F.interpolate(scaled, self.size, mode="bilinear", align_corners=False)

    @property
    def ranks(self) -> Tensor:
        """``grey`` without ties: every pixel's rank over N - 1, (B, 1, H, W) float32 in [0, 1]."""
        flat = self.grey.flatten(1).numpy()
        order = np.argsort(flat, axis=1, kind="stable")
        ranks = np.empty_like(flat)
        np.put_along_axis(ranks, order, np.arange(flat.shape[1], dtype=np.float32)[None], 1)
        return torch.from_numpy(ranks / (flat.shape[1] - 1)).view_as(self.grey)

    @property
    def boxes(self) -> Tensor:
        """One box an image as a mask (B, 1, H, W) bool: annotations for the localisation metrics."""
        height, width = self.size
        masks = torch.zeros(len(self.images), 1, height, width, dtype=torch.bool)
        for i in range(len(masks)):
            top, left = height * (1 + i) // 8, width * (3 - i % 3) // 8
            masks[i, :, top : top + height // 3, left : left + width // 2] = True
        return masks

    def cropped(self, size: int) -> Case:
        """The centre of the images, of the same classes; maps stretch to the new size."""
        top, left = (self.size[0] - size) // 2, (self.size[1] - size) // 2
        images = self.images[..., top : top + size, left : left + size].contiguous()
        return replace(self, images=images)

    @property
    def monochrome(self) -> Tensor:
        """The mean of the channels, (B, 1, H, W)."""
        return self.images.mean(1, keepdim=True)

    def squares(self, side: int) -> Tensor:
        """Maps (B, 1, H, W) with one value a square of ``side`` pixels: the mean of ``grey``."""
        return F.interpolate(F.avg_pool2d(self.grey, side), scale_factor=side, mode="nearest")

    def removals(self, n: int = 6) -> Tensor:
        """Perturbations I (n, B, 3, H, W) for infidelity: the pixels of n rectangles set to 0."""
        height, width = self.size
        kept = torch.zeros(n, 1, 1, height, width)
        for j in range(n):
            top, left = height * (j % 3) // 4, width * ((2 * j) % 5) // 6
            kept[j, ..., top : top + height // 3, left : left + width // 4] = 1
        return kept * self.images

    def shifts(self, radius: float = 0.02, n: int = 4) -> Tensor:
        """Perturbations d (n, 1, 3, H, W) for max-sensitivity, uniform in [-radius, radius]."""
        draw = np.random.Generator(np.random.PCG64(11)).random((n, 1, 3, *self.size))
        return torch.from_numpy(radius * (2 * draw - 1)).float()


def synthetic() -> Case:
    """Two 3x3 convolutions, mean pooling and a linear layer on three smooth 28 x 36 images."""
    draws = np.random.Generator(np.random.PCG64(160))

    def uniform(*shape: int) -> Tensor:
        return torch.from_numpy(2 * draws.random(shape) - 1).float()

    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(uniform(*parameter.shape))
    images = F.interpolate(uniform(3, 3, 7, 9) / 2 + 0.5, (28, 36), mode="bilinear")
    images = images - images.amin((1, 2, 3), keepdim=True)  # Quantus' "black" is the minimum
    maps = uniform(3, 1, 4, 5) + 0.4
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.full((3, 1, 1), 0.25)
    return _case("synthetic", net, "3", mean, std, images, maps)


def photos() -> Case:
    """lite0 and its Grad-CAM maps (7 x 7) on four photos; FileNotFoundError where they lack."""
    from xattn import load_backbone
    from xattn.photos.images import load_image
    from xattn.photos.view import prepare

    backbone = load_backbone("tf_efficientnet_lite0", weights="package")
    stored = json.loads((HERE / "photos.json").read_text())
    images = [prepare(load_image(PHOTOS / n), backbone.preprocessing)[0] for n in stored["photos"]]
    mean = torch.tensor(backbone.preprocessing.mean)[:, None, None]
    std = torch.tensor(backbone.preprocessing.std)[:, None, None]
    maps = torch.tensor(stored["maps"])
    return _case("photos", backbone.model, "bn2", mean, std, torch.stack(images), maps)


def _case(
    name: str, net: nn.Module, layer: str, mean: Tensor, std: Tensor, images: Tensor, maps: Tensor
) -> Case:
    net.eval().requires_grad_(False)
    targets = net((images - mean) / std).argmax(1)
    return Case(name, net, layer, mean, std, images, maps, targets)


# Quantus wants the number of features in a step to divide H W (without the channels, although a step
# counts channels): 224 x 224 has no such multiple of 3, 192 x 192 has.
FLIPPING = {"synthetic": {"per_step": 28, "side": 4}, "photos": {"per_step": 1536, "side": 32}}
CROPS = {"synthetic": None, "photos": 192}

CASES: dict[str, Callable[[], Case]] = {"synthetic": synthetic, "photos": photos}


def saliency(f: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor) -> Tensor:
    """|d logit / dx| summed over channels, (B, 1, H, W): the explainer of max-sensitivity."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        logits = f(images).gather(1, targets[:, None]).sum()
        return torch.autograd.grad(logits, images)[0].abs().sum(1, keepdim=True)


def save(library: str, packages: list[str], cases: dict[str, Any]) -> None:
    """Write ``<library>.json``: versions and numbers by case."""
    from importlib.metadata import version

    versions = {name: version(name) for name in [*packages, "torch", "numpy"]}
    text = json.dumps({"versions": versions, "cases": _plain(cases)}, indent=1)
    (HERE / f"{library}.json").write_text(_short_lists(text) + "\n")
    print(_short_lists(text))


def load(library: str) -> dict[str, Any]:
    return json.loads((HERE / f"{library}.json").read_text())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


def _short_lists(text: str) -> str:
    """Lists of numbers on one line."""
    import re

    return re.sub(r"\[[^\[\]{}\"]*\]", lambda m: " ".join(m[0].split()), text)
