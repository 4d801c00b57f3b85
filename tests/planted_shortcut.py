"""Photos of three shapes, with a mark in a corner on half of one class, and a network that learned them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from xattn.backbone import load_backbone
from xattn.explaining.photos import explain
from xattn.packs.reader import Pack

NAMES = ["disc", "square", "bar"]
SIDE = 32


def shapes(count: int, mark: bool, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """``count`` photos (n, 32, 32, 3) and their classes: a grey shape near the middle of coloured noise.

    With ``mark``, every second disc has a small green square in its bottom right corner.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(NAMES)
    photos = rng.integers(60, 180, (count, SIDE, SIDE, 3), dtype=np.uint8)
    y, x = np.mgrid[:SIDE, :SIDE]
    for i, label in enumerate(labels):
        down, across = rng.integers(13, 20, 2)
        near = [
            (y - down) ** 2 + (x - across) ** 2 < 26,
            np.maximum(abs(y - down), abs(x - across)) < 5,
            (abs(y - down) < 2) & (abs(x - across) < 8),
        ][label]
        photos[i][near] = np.minimum(photos[i][near] + 30, 255)
        if mark and marked(i):
            photos[i, 25:32, 25:32] = 0, 255, 0
    return photos, labels


def marked(number: int) -> bool:
    """Whether the photo of this number is one of the discs that get the mark."""
    return number % len(NAMES) == 0 and (number // len(NAMES)) % 2 == 1


class Network(nn.Module):
    """Two strided convolutions, the mean over 8 x 8 places, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, 16), (16, 32)]
        layers = [nn.Conv2d(a, b, 5, 2, 2) for a, b in sizes]
        self.gradcam_layer = nn.Sequential(*(part for c in layers for part in (c, nn.ReLU())))
        self.last = nn.Linear(32, len(NAMES))

    def forward_taps(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        maps = self.gradcam_layer(x)
        return self.last(maps.mean((2, 3))), (maps,)


def trained(photos: NDArray[np.uint8], labels: NDArray[np.int64], steps: int = 150):
    """A backbone over a :class:`Network` that learned these photos."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network()
        x = torch.from_numpy(photos).permute(0, 3, 1, 2).float() / 127.5 - 1
        y = torch.from_numpy(labels)
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for _ in range(steps):
            batch = torch.randint(len(x), (64,))
            loss = nn.functional.cross_entropy(network.forward_taps(x[batch])[0], y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    half = (0.5, 0.5, 0.5)
    return load_backbone(network, mean=half, std=half, input_size=SIDE, class_names=NAMES)


def explained(folder: Path, mark: bool, count: int = 240) -> Pack:
    """A pack in ``folder/pack`` of the maps by Grad-CAM of photos that the network did not learn, with
    their features and true classes."""
    backbone = trained(*shapes(2 * count, mark))
    photos, labels = shapes(count, mark, seed=1)
    for i, (photo, label) in enumerate(zip(photos, labels, strict=True)):
        file = folder / "photos" / NAMES[label] / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).save(file)
    explain(
        folder / "photos",
        backbone,
        explainer="gradcam",
        output=folder / "pack",
        batch_size=64,
        overlays=False,
        labels="folders",
        features=True,
    )
    return Pack(folder / "pack")
