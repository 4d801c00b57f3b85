"""Makes degradation ladders, whose maps get worse from rung to rung, so that a good metric ranks them.

    cells: a fraction t of the map's cells exchange values; each rung exchanges the previous cells and more
    photo: the map's values are reordered by (1 - t) times their rank + t times the rank in another photo's
    map

t = 0, .2, .. 1. The maps of all rungs have the same histogram and resolution as the original map. The maps
of ``cells`` get rougher from rung to rung, so a metric that only measures roughness also ranks them
correctly; therefore, ``photo`` is the decisive test. In addition, there are rows that explain nothing, and
rows with rescaled copies of the map that have the same content.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from xattn.eval.interfaces import Explainer, ExplainerFacts
from xattn.eval.sanity.cheats import CHEATS, second_class_map

LADDERS = ("cells", "photo")
RUNGS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
ANCHORS = ("gradcam", "integrated_gradients", "occlusion")
"""The methods whose maps are degraded, one of each of three kinds of methods."""
DONORS = 16  # number of photos whose maps are used as "maps of another photo"
# Largest number of cached cells per method, enough for a chunk of photos and all rungs.
KEPT = 32 << 20

Randomized = Callable[[int | str, Tensor, Tensor], Tensor]


def shuffle_cells(values: Tensor, t: float, seed: int) -> Tensor:
    """Exchange the values of a fraction ``t`` of the cells of a map (h, w).

    With the same seed, the exchanged cells include those for any smaller ``t``.

    >>> shuffle_cells(torch.arange(4.0).view(2, 2), 0.0, seed=1)
    tensor([[0., 1.],
            [2., 3.]])
    """
    flat = values.flatten()
    generator = torch.Generator().manual_seed(seed)
    order, luck = (
        torch.rand(len(flat), generator=generator, device="cpu").argsort() for _ in range(2)
    )
    chosen = order[: round(t * len(flat))].to(flat.device)
    made = flat.clone()
    made[chosen] = flat[chosen[luck.to(flat.device)[chosen].argsort()]]
    return made.view_as(values)


def blend_ranks(values: Tensor, other: Tensor, t: float) -> Tensor:
    """Reorder the values of a map (h, w) by (1 - ``t``) times their own ranks plus ``t`` times the ranks of
    ``other``.

    ``other`` is resized to the size of the map.

    >>> blend_ranks(torch.tensor([[1.0, 5.0]]), torch.tensor([[9.0, 2.0]]), 1.0)
    tensor([[5., 1.]])
    """
    if other.shape != values.shape:
        other = F.interpolate(
            other[None, None], values.shape, mode="bilinear", align_corners=False
        )[0, 0]
    own, theirs = (_ranks(v.flatten()) for v in (values, other))
    places = ((1 - t) * own + t * theirs).argsort(stable=True)
    made = torch.empty_like(values.flatten())
    made[places] = values.flatten().sort().values
    return made.view_as(values)


def _ranks(flat: Tensor) -> Tensor:
    return flat.argsort(stable=True).argsort().double()


def photo_seed(image: Tensor) -> int:
    """A seed computed from a photo's pixels (3, H, W)."""
    return zlib.crc32(image.detach().float().cpu().contiguous().numpy().data)


class Anchor:
    """A method whose maps are degraded; each map is computed once and used for all rungs.

    Args:
        name: the row name of the method.
        method: the explainer.
        photos: (D, 3, H, W), the photos whose maps are used as maps of another photo.
        classes: the predicted classes of these photos.
        randomized: a function that runs the method on randomised networks, if there is one.
    """

    def __init__(
        self,
        name: str,
        method: Explainer,
        photos: Tensor,
        classes: Sequence[int],
        randomized: Randomized | None = None,
    ) -> None:
        self.name, self.method, self.randomized = name, method, randomized
        self.facts = ExplainerFacts.of(method)
        self._photos, self._classes = photos, list(classes)
        self._seeds = [photo_seed(photo) for photo in photos]
        self._donors: Tensor | None = None
        self._made: OrderedDict[Any, Tensor] = OrderedDict()
        self._cells = 0

    def maps(self, images: Tensor, targets: Tensor, stage: int | str | None = None) -> Tensor:
        """Raw maps (b, 1, h, w); with a ``stage``, they are computed on a randomised network."""
        key = stage, tuple(map(photo_seed, images)), tuple(targets.tolist())
        if key not in self._made:
            if stage is None:
                found = self.method.attribute(images, targets)
            else:
                assert self.randomized is not None
                found = self.randomized(stage, images, targets)
            self._made[key] = found.detach()
            self._cells += found.numel()
            while self._cells > KEPT and len(self._made) > 1:
                self._cells -= self._made.popitem(last=False)[1].numel()
        return self._made[key]

    def other_photo_map(self, seed: int, target: int) -> Tensor:
        """The map (h, w) of another photo, preferably of another class than ``target``.

        The photo is chosen by ``seed``, the seed of the photo to be explained.
        """
        if self._donors is None:
            targets = torch.tensor(self._classes, device=self._photos.device)
            parts = [
                self.method.attribute(*part)
                for part in zip(self._photos.split(1), targets.split(1), strict=True)
            ]
            self._donors = torch.cat(parts).detach()[:, 0]
        count = len(self._classes)
        order = [(seed + i) % count for i in range(count)]
        others = (i for i in order if self._seeds[i] != seed)
        best = next((i for i in order if self._classes[i] != target), None)
        return self._donors[next(others, 0) if best is None else best]


class AnchorRow:
    """An explainer for :func:`xattn.eval.evaluate` that returns changed maps of an anchor."""

    def __init__(
        self, anchor: Anchor, recipe: str, change: Callable[[Tensor, Tensor, int], Tensor]
    ) -> None:
        self._anchor, self.recipe, self._change = anchor, recipe, change
        self.perturbs, self.one_by_one = anchor.facts.perturbs, anchor.facts.one_by_one
        self.forwards = 0  # no further passes, since all rungs share the anchor's maps

    def attribute(self, inputs: Tensor, target: Tensor) -> Tensor:
        return self._changed(self._anchor.maps(inputs, target), inputs, target)

    def randomized(self, stage: int | str, images: Tensor, targets: Tensor) -> Tensor:
        """Changed maps of the anchor, computed on a randomised network."""
        return self._changed(self._anchor.maps(images, targets, stage), images, targets)

    def _changed(self, maps: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        made = [
            self._change(values[0], image, target)
            for values, image, target in zip(maps, images, targets.tolist(), strict=True)
        ]
        return torch.stack(made)[:, None]


def rungs(anchor: Anchor) -> dict[str, AnchorRow]:
    """The rows of both ladders of one method, by row name; the unchanged maps (t = 0) are not included."""

    def cells(t: float) -> Callable[[Tensor, Tensor, int], Tensor]:
        return lambda values, image, target: shuffle_cells(values, t, photo_seed(image))

    def photo(t: float) -> Callable[[Tensor, Tensor, int], Tensor]:
        return lambda values, image, target: blend_ranks(
            values, anchor.other_photo_map(photo_seed(image), target), t
        )

    changes: dict[str, Callable[[float], Any]] = {"cells": cells, "photo": photo}
    return {
        rung_name(anchor.name, ladder, t): AnchorRow(anchor, f"{ladder} {t:g}", change(t))
        for ladder, change in changes.items()
        for t in RUNGS[1:]
    }


def rung_name(anchor: str, ladder: str, t: float) -> str:
    """The row name of one rung; the rung t = 0 has the name of the anchor."""
    return anchor if t == 0 else f"{anchor} {ladder} {t:g}"


SAME: Mapping[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "scale": lambda values, image, target: 3 * values,
    "shift": lambda values, image, target: values + values.std(),
    "order": lambda values, image, target: (values / values.abs().max().clamp_min(1e-12)).exp(),
}
"""Changes that preserve a map's content: a factor, an offset, and a monotonic function of the values."""
NULLS = (*CHEATS, "random", "second class")
"""Rows that explain nothing, and one that explains the wrong class."""


class CardRows(NamedTuple):
    """The rows of a report card. ``methods`` has the method of each row, by row name. ``randomized`` has,
    for each row whose method can be run on randomised networks, a function that does so."""

    methods: dict[str, Any]
    randomized: dict[str, Randomized]


def card_rows(anchors: Sequence[Anchor], network: Any, random: Explainer) -> CardRows:
    """Make the rows of a report card: the ladders of all ``anchors``, rows that explain nothing, and
    changed copies of the first anchor's maps with the same content.

    Args:
        network: the network whose second most probable class is explained in the row "second class".
        random: an explainer that returns random maps.
    """
    methods: dict[str, Any] = {}
    randomized: dict[str, Randomized] = {}

    def add(name: str, row: Any, on_random: Randomized | None) -> None:
        methods[name] = row
        if on_random is not None:
            randomized[name] = on_random

    for anchor in anchors:
        own = AnchorRow(anchor, "as it is", lambda values, image, target: values)
        own.forwards = anchor.facts.forwards or 0
        for name, row in {anchor.name: own, **rungs(anchor)}.items():
            add(name, row, row.randomized if anchor.randomized else None)
    first = anchors[0]
    for kind, change in SAME.items():
        row = AnchorRow(first, kind, change)
        add(f"{first.name} {kind}", row, row.randomized if first.randomized else None)
    swapped = second_class_map(first.maps, network.logits)
    add("second class", swapped, None if first.randomized is None else _at_stages(first, network))
    for name, cheat in CHEATS.items():
        add(name, cheat, ignore_stage(cheat))
    add("random", random, ignore_stage(random.attribute))
    return CardRows(methods, randomized)


def ignore_stage(explain: Callable[[Tensor, Tensor], Tensor]) -> Randomized:
    """Turn a method that uses no network into a function that also takes the stage of a randomised network.

    The stage is ignored.
    """
    return lambda stage, images, targets: explain(images, targets)


def _at_stages(anchor: Anchor, network: Any) -> Randomized:
    def explain(stage: int | str, images: Tensor, targets: Tensor) -> Tensor:
        def of(x: Tensor, k: Tensor) -> Tensor:
            return anchor.maps(x, k, stage)

        return second_class_map(of, network.logits)(images, targets)

    return explain
