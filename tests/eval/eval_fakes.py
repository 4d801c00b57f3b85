"""A tiny linear classifier and explainers with known answers: no network, no weights, no files."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import spsolve
from torch import Tensor
from torch.nn import functional as F

from xattn.explainers import Explainer


class FakeBackbone:
    """Logits linear in 4x4 means of the image; records the shape of every pass.

    Like lite0 it gives other bits at another batch size, only louder.
    """

    device = torch.device("cpu")
    name = "fake"
    fingerprint = "0" * 64
    num_classes = 5
    task = "multiclass"
    class_names = ("ant", "bee", "cat", "dog", "eel")

    def __init__(self, seed: int = 0, gain: float = 6.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = gain * torch.randn(self.num_classes, 48, generator=generator)
        self.preprocessing = SimpleNamespace(input_size=(18, 20), mean=(0.5, 0.4, 0.3))
        self.shapes: list[tuple[int, ...]] = []

    def logits(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        means = F.adaptive_avg_pool2d(images, 4).flatten(1)
        rows = torch.stack([(self.weight * row).sum(1) for row in means])
        return rows + 1e-3 * len(images) * torch.arange(self.num_classes)

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.double().softmax(1)

    def class_index(self, name: str | int) -> int:
        return name if isinstance(name, int) else self.class_names.index(name)


class Maps:
    """An explainer from a function (inputs, target) -> (B, 1, h, w)."""

    def __init__(self, function, is_mask: bool = False, forwards: int = 1) -> None:
        self.function, self.is_mask, self.forwards = function, is_mask, forwards

    def attribute(self, inputs: Tensor, target: Tensor) -> Tensor:
        return self.function(inputs, target)


class Flat(Explainer):
    """Constant maps of a method of xattn's own, which nobody tries out before."""

    __module__ = "xattn.made_up"

    def attribute(self, inputs: Tensor, target: Tensor) -> Tensor:
        return torch.ones(len(inputs), 1, 3, 3)

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError


def brightness(inputs: Tensor, target: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(inputs.mean(1, keepdim=True), (5, 6))


def noise(inputs: Tensor, target: Tensor) -> Tensor:
    """A pure function of the pixels."""
    return (F.adaptive_avg_pool2d(inputs.mean(1, keepdim=True), (5, 6)) * 9973).frac()


def centre(inputs: Tensor, target: Tensor) -> Tensor:
    y = torch.linspace(-1, 1, 5)[:, None] ** 2 + torch.linspace(-1, 1, 6) ** 2
    return (-y)[None, None].expand(len(inputs), 1, 5, 6)


def images(n: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 18, 20, generator=generator)


def ones() -> Maps:
    return Maps(lambda x, t: torch.ones(len(x), 1, 5, 6), is_mask=True, forwards=0)


def rows() -> dict[str, Maps]:
    return {
        "bright": Maps(brightness),
        "random": Maps(noise, forwards=0),
        "centre": Maps(centre, forwards=0),
        "ones": ones(),
    }


def impute_direct(image, removed):
    """ROAD's imputation without noise by a direct solver in float64: (3, H, W), (1, H, W) bool -> (3, H, W)."""
    _, height, width = image.shape
    values, flat = image.flatten(1).T.double().numpy().copy(), removed.flatten().numpy()
    if not flat.any():
        return image.clone()
    if flat.all():
        return image.mean((1, 2), keepdim=True).expand_as(image).clone()
    y, x = np.divmod(np.arange(flat.size), width)
    links = sparse.csr_array((flat.size, flat.size))
    for dy, dx in itertools.product((-1, 0, 1), repeat=2):
        if dy or dx:
            inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            i = np.flatnonzero(inside)
            weights = np.full(len(i), 1.0 if dy and dx else 2.0)
            links += sparse.csr_array((weights, (i, i + dy * width + dx)), shape=links.shape)
    system = (sparse.diags_array(links.sum(1)) - links).tocsr()[flat]
    right = -(system[:, ~flat] @ values[~flat])
    values[flat] = spsolve(system[:, flat].tocsc(), right).reshape(right.shape)
    return torch.from_numpy(values.T.copy()).view_as(image).to(image)
