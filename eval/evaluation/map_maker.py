"""Makes the maps of several methods in batches of one shape, or image by image if a batch fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from xattn.eval.interfaces import Explainer, ExplainerFacts
from xattn.eval.metrics.scorer import pad_batch
from xattn.explainers.adapters import WrongShapeError, is_foreign

Randomized = Mapping[str, Callable[[int | str, Tensor, Tensor], Tensor]]
"""For each method, (stage, images, targets) -> its maps on a network with randomised weights."""
Attribute = Callable[[Tensor, Tensor], Tensor]
T = TypeVar("T")


class MapMaker:
    """Explains images with each of several named methods.

    Args:
        randomized: the methods on randomised networks, for methods that have them.
        size: images per micro-batch, except for explainers that set their own.
        worked: the methods that have returned a valid map before.
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
        """Raw maps (1, h, w), and for each image the reason if it has none.

        If an explainer that has not worked before fails on its first three images, its error is raised.
        """
        return self.maps_of(name, self.explainers[name].attribute, images, targets)

    def maps_of(
        self, name: str, attribute: Attribute, images: Tensor, targets: Tensor
    ) -> tuple[Sequence[Tensor], list[str | None]]:
        """Like :meth:`maps`, with the same batch shapes, but ``attribute`` replaces the method's own
        function."""
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
        """Whether a method comes from outside the package and has not worked yet."""
        return name not in self._worked and is_foreign(self.explainers[name])

    def check_first(self, name: str, maps: Sequence[Tensor], reasons: Sequence[str | None]) -> None:
        """Raise a ``ValueError`` if none of the first results of :meth:`maps` is usable."""
        made = [values for values, why in zip(maps, reasons, strict=True) if why is None]
        if not made:
            problem = f"it raised {reasons[0]}"
        elif not any(bool(values.isfinite().all()) for values in made):
            problem = "its maps hold NaN or infinite values"
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
        """The method as a function of images only, for metrics that explain again."""

        def explain(images: Tensor) -> Tensor:
            targets = torch.full((len(images),), target, device=images.device)
            return self.explainers[name].attribute(images, targets)

        return explain

    def at_stage(self, name: str, target: int) -> Callable[[int | str, Tensor], Tensor] | None:
        """The method on randomised networks as a function of stage and images; None if it has none."""
        function = self.randomized.get(name)
        if function is None:
            return None
        return lambda stage, images: function(
            stage, images, torch.full((len(images),), target, device=images.device)
        )


def reason(error: Exception) -> str:
    """An error as one line of text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
