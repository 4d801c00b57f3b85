"""Makes the maps of several methods in batches of a fixed size, or image by image if a batch fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from xattn.eval.interfaces import Explainer, ExplainerFacts
from xattn.eval.metrics.scorer import pad_batch
from xattn.explainers.adapters import WrongShapeError, is_foreign

Randomized = Mapping[str, Callable[[int | str, Tensor, Tensor], Tensor]]
"""For each method, a function (stage, images, targets) -> maps on a network with randomised weights."""
Attribute = Callable[[Tensor, Tensor], Tensor]
T = TypeVar("T")


class MapMaker:
    """Explains images with each of several named methods.

    Args:
        randomized: functions that run a method on randomised networks, for the methods that support this.
        size: images per micro-batch, except for explainers that handle images one at a time.
        worked: the names of methods that have already returned a valid map; methods are added when they do.
    """

    def __init__(
        self,
        explainers: Mapping[str, Explainer],
        randomized: Randomized,
        size: int,
        worked: set[str],
    ) -> None:
        self.explainers, self.randomized, self.size = explainers, randomized, size
        self.facts = {name: ExplainerFacts.of(e) for name, e in explainers.items()}
        self._worked = worked
        self._failures: dict[str, int] = {}

    def passes(self, name: str, items: list[T]) -> list[list[T]]:
        """Split items into the batches that one method explains at a time."""
        if self.facts[name].one_by_one:
            return [[item] for item in items]
        return [items] if items else []

    def maps(
        self, name: str, images: Tensor, targets: Tensor
    ) -> tuple[Sequence[Tensor], list[str | None]]:
        """Raw maps (1, h, w) of the images, and for each image None, or the reason why it has no map.

        If an explainer that has never worked fails on three images, its error is raised.
        """
        return self.maps_of(name, self.explainers[name].attribute, images, targets)

    def maps_of(
        self, name: str, attribute: Attribute, images: Tensor, targets: Tensor
    ) -> tuple[Sequence[Tensor], list[str | None]]:
        """Like :meth:`maps`, and with the same batch sizes, but ``attribute`` is called instead of the
        method's own function."""
        try:
            maps = self._attribute(name, attribute, images, targets)
            self._worked.add(name)
            return list(maps), [None] * len(images)
        except (MemoryError, WrongShapeError):
            raise
        except Exception as error:
            failure = error
        if len(images) > 1:
            parts = [
                self.maps_of(name, attribute, images[i : i + 1], targets[i : i + 1])
                for i in range(len(images))
            ]
            return [p[0][0] for p in parts], [p[1][0] for p in parts]
        self._failures[name] = self._failures.get(name, 0) + 1
        if name not in self._worked and self._failures[name] == 3:
            raise failure
        return [images[0, :1]], [reason(failure)]

    def is_untried(self, name: str) -> bool:
        """Whether a method comes from outside the package and has not returned a map yet."""
        return name not in self._worked and is_foreign(self.explainers[name])

    def check_first(self, name: str, maps: Sequence[Tensor], reasons: Sequence[str | None]) -> None:
        """Raise a ``ValueError`` if none of the maps of the first images is usable.

        ``maps`` and ``reasons`` are results of :meth:`maps`.
        """
        made = [values for values, why in zip(maps, reasons, strict=True) if why is None]
        if not made:
            problem = f"it raised {reasons[0]}"
        elif not any(bool(values.isfinite().all()) for values in made):
            problem = "its maps contain NaN or infinite values"
        elif not self.facts[name].is_mask and all(bool((v == v.flatten()[0]).all()) for v in made):
            problem = "its maps are constant"
        else:
            return
        raise ValueError(
            f"explainers: {name} cannot work: {problem} on the first {len(maps)} images"
        )

    def _attribute(
        self, name: str, attribute: Attribute, images: Tensor, targets: Tensor
    ) -> Tensor:
        """Raw maps (b, 1, h, w) of a batch."""
        count = len(images)
        targets = targets.to(images.device)
        if not self.facts[name].one_by_one:
            images, targets = pad_batch(images, self.size), pad_batch(targets, self.size)
        maps = attribute(images, targets)
        right = isinstance(maps, Tensor) and maps.ndim == images.ndim
        if not right or maps.shape[:2] != (len(images), 1):
            got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            form = "(B, 1, h, w)" if images.ndim == 4 else "(B, 1, t, h, w)"
            raise WrongShapeError(f"explainers: {name} returned {got}; it must return {form}")
        return maps[:count]

    def again(self, name: str, target: int) -> Callable[[Tensor], Tensor]:
        """A function that explains images (B, 3, H, W) with one method and one class, for metrics that need
        further explanations."""

        def explain(images: Tensor) -> Tensor:
            targets = torch.full((len(images),), target, device=images.device)
            return self.explainers[name].attribute(images, targets)

        return explain

    def at_stage(self, name: str, target: int) -> Callable[[int | str, Tensor], Tensor] | None:
        """A function (stage, images) -> maps that runs a method on randomised networks; None if the method
        does not support this."""
        function = self.randomized.get(name)
        if function is None:
            return None
        return lambda stage, images: function(
            stage, images, torch.full((len(images),), target, device=images.device)
        )


def reason(error: Exception) -> str:
    """The type and message of an error as one line of text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
