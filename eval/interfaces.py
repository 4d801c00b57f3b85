"""What evaluation asks of a backbone and of an explainer: typing protocols, which any object may fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class ScoredModel(Protocol):
    """A network whose scores a metric asks for: images (b, 3, H, W) in [0, 1] -> logits (b, K)."""

    def logits(self, images: Tensor) -> Tensor: ...
    def probabilities(self, logits: Tensor) -> Tensor: ...


class Classifier(ScoredModel, Protocol):
    """A frozen classifier, such as :class:`xattn.Backbone`.

    One without classes (``has_classes`` False) says so in ``require_classes()``.
    """

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def task(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def preprocessing(self) -> Any: ...
    @property
    def class_names(self) -> Sequence[str]: ...
    def class_index(self, name: str | int) -> int: ...


class Explainer(Protocol):
    """Raw maps (b, 1, h, w) of one class an image, such as :class:`xattn.explainers.base.Explainer`."""

    def attribute(self, inputs: Tensor, target: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ExplainerFacts:
    """What an explainer says of itself; an object of your own may leave out any of it.

    Attributes:
        forwards: forward passes that one explanation costs; None where it is not known.
        perturbs: these are many perturbed images without gradients.
        one_by_one: each image has micro-batches of its own, so a batch needs no fixed size.
        is_mask: the map is a mask as it is, to be used without min-max.
    """

    forwards: int | None = None
    perturbs: bool = False
    one_by_one: bool = False
    is_mask: bool = False

    @classmethod
    def of(cls, explainer: Explainer) -> ExplainerFacts:
        """The facts of an explainer."""
        return cls(
            forwards=getattr(explainer, "total_forwards", getattr(explainer, "forwards", None)),
            perturbs=bool(getattr(explainer, "perturbs", False)),
            one_by_one=bool(getattr(explainer, "one_by_one", False)),
            is_mask=bool(getattr(explainer, "is_mask", False)),
        )


def check_classes(backbone: Classifier) -> None:
    """Raise the backbone's own ValueError if it has no classes."""
    if not getattr(backbone, "has_classes", True):
        backbone.require_classes()  # type: ignore[attr-defined]
