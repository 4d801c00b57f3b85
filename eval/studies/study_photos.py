"""Photos for studies of trained networks: with their classes, and as input for the network."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xattn.backbone import Backbone
from xattn.explaining.naming import named_photos
from xattn.explaining.passes import true_classes_of
from xattn.photos.images import load_image
from xattn.photos.view import prepare
from xattn.runtime.files import file_sha256


@dataclass(frozen=True)
class Photo:
    """A photo with a class of the network."""

    name: str
    path: Path
    label: int
    sha256: str


def labelled_photos(
    backbone: Backbone, data: str | Path, labels: str | Path, seed: int = 0
) -> list[Photo]:
    """The photos with a class of ``backbone``, in an order drawn by ``seed``."""
    sources = named_photos(data)
    truth = true_classes_of(sources, labels, backbone)
    photos = []
    for name, source in sources:
        label = truth.get(name, (None, None))[0]
        if not isinstance(source, Path):
            raise ValueError(f"data: {name} is no file; give a folder or a list of photos")
        if label is not None:
            photos.append(Photo(name, source, label, file_sha256(source)))
    if not photos:
        raise ValueError(f"labels: none of {len(sources)} photos has a class of {backbone.name}")
    random.Random(seed).shuffle(photos)
    return photos


def images_of(network: Backbone, photos: Sequence[Photo]) -> Tensor:
    """The central crops, (n, 3, H, W) in [0, 1], on the network's device and in its dtype."""
    pixels = [prepare(load_image(p.path), network.preprocessing, "crop")[0] for p in photos]
    return torch.stack(pixels).to(network.device, network.mean.dtype)


def photos_record(
    network: Backbone, photos: Sequence[Photo], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The record that a study's results depend on: the network, the settings and the photos."""
    return {
        "backbone": network.fingerprint,
        "preprocessing": repr(network.preprocessing),
        "config": dict(settings),
        "photos": {photo.name: [photo.sha256, photo.label] for photo in photos},
    }


PHOTOS = {
    "skimage": "data/chelsea.png data/coffee.png data/motorcycle_left.png data/rocket.jpg",
    "sklearn": "datasets/images/flower.jpg datasets/images/china.jpg",
}


def packaged_photos() -> list[Path]:
    """Six photos that come with scikit-image and scikit-learn."""
    found = []
    for package, names in PHOTOS.items():
        place = Path(str(__import__(package).__file__)).parent
        found += [place / name for name in names.split()]
    return found
