"""Methods f(images, target) whose maps explain nothing and yet win some columns, for testing metrics."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def centre(images: Tensor, target: Tensor) -> Tensor:
    """A Gaussian at the centre of the photo."""
    y, x = (torch.linspace(-2, 2, n, device=images.device) for n in images.shape[-2:])
    return torch.exp(-(y[:, None] ** 2 + x**2) / 2).expand(len(images), 1, -1, -1)


def edges(images: Tensor, target: Tensor) -> Tensor:
    """The magnitude of the gradient of the grey photo."""
    grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    down = grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    across = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]
    return (down.square() + across.square()).sqrt()


def colour(images: Tensor, target: Tensor) -> Tensor:
    """The distance of each pixel from the photo's mean colour."""
    return (images - images.mean((2, 3), keepdim=True)).norm(dim=1, keepdim=True)


def all_but_one(images: Tensor, target: Tensor) -> Tensor:
    """1 everywhere except in the first of 7 x 7 cells, which is 0 (Fake-CAM, arXiv 2104.10252)."""
    maps = images.new_ones(len(images), 1, 7, 7)
    maps[..., 0, 0] = 0
    return maps


def second_class_map(
    explain: Callable[[Tensor, Tensor], Tensor], logits: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """A method that explains the second class where the first one is asked for, and the other way round.

    The first and the second class are the most probable ones according to ``logits``.
    """

    def exchanged(images: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            first, second = logits(images).topk(2, 1).indices.unbind(1)
        swapped = torch.where(target == first, second, torch.where(target == second, first, target))
        return explain(images, swapped)

    return exchanged


CHEATS = {"centre": centre, "edges": edges, "colour": colour, "all_but_one": all_but_one}
"""The methods whose maps depend neither on the class nor on the network."""
