"""What a row of the table of mistakes is, and the small things that mistakes are made with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import xattn


@dataclass(frozen=True)
class Bench:
    """What mistakes are made with; networks are made once a process."""

    folder: Path
    """An empty folder of the test's own."""

    @property
    def cnn(self) -> xattn.Backbone:
        return small("test_resnet")

    @property
    def vit(self) -> xattn.Backbone:
        return small("test_vit")

    @property
    def images(self) -> torch.Tensor:
        return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    @property
    def photo(self) -> str:
        path = self.folder / "photo.png"
        if not path.exists():
            Image.new("RGB", (80, 60), "teal").save(path)
        return str(path)


@functools.cache
def small(name: str) -> xattn.Backbone:
    torch.manual_seed(0)
    return xattn.load_backbone(name, weights=None, num_classes=5, input_size=64)


@dataclass(frozen=True)
class Mistake:
    """A wrong call, and what its one line of error must say."""

    name: str
    call: Callable[[Bench], Any]
    says: tuple[str, ...]
    """Parts of the message: the argument that it begins with, then words of the remedy."""


@dataclass(frozen=True)
class Typed:
    """A wrong command line, and what its one line of error must say."""

    words: str
    """As typed after ``xattn``; ``{photo}`` and ``{folder}`` stand for a photo and an empty folder."""
    says: tuple[str, ...]
