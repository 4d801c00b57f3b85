"""Measures the top-1 and top-5 accuracy of networks on labelled photos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from xattn.backbone import Backbone
from xattn.eval.bootstrap import Interval
from xattn.eval.evaluation.stream import ImageStream, Skipped
from xattn.eval.report.mistakes import accuracy
from xattn.photos.base import Data
from xattn.photos.images import MAX_PIXELS
from xattn.photos.labels import FOLDERS, true_classes
from xattn.photos.sources import open_photos
from xattn.runtime.tables import markdown

TOP = (1, 5)


@dataclass(frozen=True)
class Accuracy:
    """The result of :func:`measure_accuracy`.

    Attributes:
        networks: the names of the networks.
        ranks: (networks, photos), the rank that each network gives to each photo's true class; 0 means that
            it is the top class.
        unlabelled: number of photos left out because they have no label that is a class of the networks.
        skipped: photos that could not be read, with the reason.
    """

    networks: tuple[str, ...]
    ranks: NDArray[np.int64]
    unlabelled: int
    skipped: tuple[Skipped, ...]

    def top_accuracy(self, network: int, k: int = 1) -> Interval:
        """The share of photos whose true class is among the top ``k``, with Wilson's 95 % interval."""
        return accuracy((self.ranks[network] < k).astype(np.float64))

    def lines(self) -> Iterator[str]:
        """Yield the lines of a Markdown table with one row per network.

        Below the table, a line for each further network gives the number of photos that only this network
        classifies correctly, and the number that only the first network classifies correctly.
        """
        rows = [
            (name, *(self.top_accuracy(i, k).percent().text(1) for k in TOP))
            for i, name in enumerate(self.networks)
        ]
        yield from markdown(["network", "top-1, %", "top-5, %"], rows)
        yield ""
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        yield (
            f"{self.ranks.shape[1]} photos ({self.unlabelled} without a class of the network{skipped}); "
            f"Wilson's 95 % intervals"
        )
        right = self.ranks == 0
        for i, name in enumerate(self.networks[1:], 1):
            lost, gained = (
                int((a & ~b).sum()) for a, b in ((right[0], right[i]), (right[i], right[0]))
            )
            yield (
                f"{name}: {lost} photos are classified correctly only by {self.networks[0]}, and "
                f"{gained} only by {name}"
            )


@torch.inference_mode()
def measure_accuracy(
    networks: Sequence[Backbone],
    images: Data,
    labels: str = FOLDERS,
    *,
    batch_size: int = 32,
    max_pixels: int = MAX_PIXELS,
) -> Accuracy:
    """Measure several networks, which must share classes and preprocessing, on the same photos.

        found = measure_accuracy([backbone, converted(backbone, "gna")], "photos/")
        print(found.top_accuracy(1), found.top_accuracy(1, k=5))

    Args:
        labels: ``"folders"`` if the folders are named after classes, or else the path of a label file, see
            :func:`xattn.photos.labels.true_classes`.

    Raises:
        ValueError: the first network does not predict one class per photo, no photo is labelled with one of
            its classes, no photo can be read, or the labels are damaged.
        FileNotFoundError: there is no such file.
    """
    first = networks[0]
    if first.task not in ("multiclass", "binary"):
        raise ValueError(
            f"task: the task of {first.name} is {first.task}, but accuracy needs one class per photo; "
            "choose a multiclass network"
        )
    first.require_classes()
    photos = open_photos(images)
    names = [photos.name(i) for i in range(len(photos))]
    classes = [number for number, _ in true_classes(names, labels, first.class_names)]
    used = [i for i, number in enumerate(classes) if number is not None]
    if not used:
        raise ValueError(
            f"labels: none of {len(names)} photos is labelled with a class of {first.name}; give "
            f"--labels, or --class-names"
        )
    stream = ImageStream([photos[i] for i in used], first.preprocessing, max_pixels=max_pixels)
    parts: list[torch.Tensor] = []
    for block in stream.blocks(batch_size):
        if not block:
            continue
        batch = torch.stack([item.image for item in block]).to(first.device, first.mean.dtype)
        own = torch.tensor([classes[used[item.position]] for item in block], device=first.device)
        answers = torch.stack([network.logits(batch) for network in networks])
        mine = answers.gather(2, own.expand(len(networks), -1)[..., None])
        parts.append((answers > mine).sum(2).cpu())
    if not parts:
        raise ValueError(f"images: none of {len(used)} photos could be read; check the files")
    names_of = tuple(network.name for network in networks)
    skipped = tuple(stream.skipped.values())
    return Accuracy(names_of, torch.cat(parts, 1).numpy(), len(names) - len(used), skipped)
