"""Accuracy of a trained ViT whose attention is swapped without retraining, mechanism by mechanism.

    xattn study swap --data photos/ --labels classes.json -b vit_tiny_patch16_224 --weights FILE

All networks share the weights and see the same photos in one run; the first row is the model as it
was trained. Only where a mechanism keeps most of that accuracy does the registry call it training-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xattn.attention import converted_copy
from xattn.backbone import Backbone
from xattn.eval.bootstrap import mean_intervals
from xattn.explaining.naming import named_photos
from xattn.explaining.photos import true_classes_of
from xattn.photos.images import load_image
from xattn.photos.view import prepare

BATCH = 8  # photos alive at a time


@dataclass(frozen=True)
class Swap:
    """A mechanism, its options, and the share of the blocks, from the first, that get it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0

    @property
    def label(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])

    def blocks(self, depth: int) -> range:
        return range(max(1, round(self.share * depth)))


_AGENTS = {"training_free": True}
SWAPS = (
    Swap("softmax"),
    Swap("gna", {"kernel": 7}),
    Swap("gna", {"kernel": 7}, 2 / 3),
    Swap("freeswim"),
    Swap("dma", {"window": 64}),
    Swap("agent", {"agents": 49}),
    Swap("agent", {"agents": 49, **_AGENTS}),
    Swap("agent", {"agents": 49, **_AGENTS}, 1 / 4),
    Swap("agent", {"agents": 196, **_AGENTS}),
    Swap("agent", {"agents": 196, **_AGENTS}, 1 / 4),
    Swap("hedgehog"),
    Swap("based"),
    Swap("nsa"),
    Swap("moh"),
    Swap("act"),
    Swap("routing", {"centroids": "call"}),
    Swap("spatten"),
)


def study(
    backbone: Backbone,
    data: str | Path,
    labels: str | Path = "folders",
    every: int = 1,
    swaps: Sequence[Swap] = SWAPS,
) -> Iterator[str]:
    """The lines of the table.

    Args:
        backbone: a trained ViT; it stays as it is.
        data: photos, see :func:`xattn.explaining.naming.named_photos`; every ``every``-th is classified.
        labels: their classes, see :func:`xattn.photos.labels.true_classes`.

    Raises:
        ValueError: no photo has a class of the backbone, or a model whose attention cannot be swapped.
    """
    if every < 1:
        raise ValueError(f"every: got {every}; give at least 1")
    right, same = accuracy(backbone, data, labels, every, swaps)
    depth = len(backbone.model.blocks)  # type: ignore[arg-type]
    yield f"{backbone.name}, weights sha256 {backbone.fingerprint[:12]}, {len(right)} photos"
    yield "\n| attention | blocks | right, % | 95 % interval | same class as trained, % |"
    yield "| :-- | :-- | --: | :-- | --: |"
    rows = [("as trained", "")]
    rows += [(s.label, f"{s.blocks(depth).stop} of {depth}") for s in swaps]
    intervals = mean_intervals(100 * right.double().numpy())
    for (label, blocks), own, agree in zip(rows, intervals, same.double().mean(0), strict=True):
        bounds = f"[{own.lo:.1f}, {own.hi:.1f}]"
        yield f"| {label} | {blocks} | {own.mean:.1f} | {bounds} | {100 * float(agree):.1f} |"


@torch.no_grad()
def accuracy(
    backbone: Backbone,
    data: str | Path,
    labels: str | Path,
    every: int = 1,
    swaps: Sequence[Swap] = SWAPS,
) -> tuple[Tensor, Tensor]:
    """Whether each photo is classified right, and as by the trained model: bool (photos, 1 + swaps)."""
    sources = named_photos(data)[::every]
    truth = true_classes_of(sources, labels, backbone)
    known = [(s, k) for name, s in sources if (k := truth.get(name, (None, None))[0]) is not None]
    if not known:
        raise ValueError(f"labels: none of {len(sources)} photos has a class of {backbone.name}")
    if getattr(backbone.model, "blocks", None) is None:
        raise ValueError(f"backbone: {backbone.name} has no blocks; choose a ViT")
    networks = [backbone]
    depth = len(backbone.model.blocks)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        for swap in swaps:
            torch.manual_seed(0)  # of what a mechanism would learn
            layers = swap.blocks(depth)
            networks.append(converted_copy(backbone, swap.name, layers, swap.options))
    right, same = [], []
    for start in range(0, len(known), BATCH):
        part = known[start : start + BATCH]
        pixels = [prepare(load_image(s), backbone.preprocessing, "crop")[0] for s, _ in part]
        images = torch.stack(pixels).to(backbone.device, backbone.mean.dtype)
        classes = torch.stack([n.logits(images).argmax(1).cpu() for n in networks], 1)
        right.append(classes == torch.tensor([k for _, k in part], device="cpu")[:, None])
        same.append(classes == classes[:, :1])
    return torch.cat(right), torch.cat(same)
