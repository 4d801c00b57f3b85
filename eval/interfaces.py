"""Typing protocols for the backbones and explainers that an evaluation accepts.

An object needs only the listed attributes and methods; it need not inherit from a base class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class ScoredModel(Protocol):
    """A network with which metrics can score images: (b, 3, H, W) in [0, 1] -> logits (b, K)."""

    def logits(self, images: Tensor) -> Tensor: ...
    def probabilities(self, logits: Tensor) -> Tensor: ...


class Classifier(ScoredModel, Protocol):
    """A frozen classifier, such as :class:`xattn.Backbone`.

    If it has no classes (``has_classes`` False), ``require_classes()`` raises a ValueError.
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
    """Makes a raw map of one class for each image, (b, 1, h, w).

    :class:`xattn.explainers.base.Explainer` is an example.
    """

    def attribute(self, inputs: Tensor, target: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ExplainerFacts:
    """Facts that an explainer declares as attributes; all of them are optional for your own object.

    Attributes:
        forwards: forward passes per explanation; None if unknown.
        perturbs: whether the explainer runs many passes on perturbed images, without gradients.
        one_by_one: whether the explainer handles images one at a time, each in its own micro-batches; its
            batches are then not padded to a fixed size.
        is_mask: whether the map is a mask in [0, 1] that is used without min-max scaling.
    """

    forwards: int | None = None
    perturbs: bool = False
    one_by_one: bool = False
    is_mask: bool = False

    @classmethod
    def of(cls, explainer: Explainer) -> ExplainerFacts:
        """Read the facts from the attributes of an explainer."""
        return cls(
            forwards=getattr(explainer, "total_forwards", getattr(explainer, "forwards", None)),
            perturbs=bool(getattr(explainer, "perturbs", False)),
            one_by_one=bool(getattr(explainer, "one_by_one", False)),
            is_mask=bool(getattr(explainer, "is_mask", False)),
        )


def check_classes(backbone: Classifier) -> None:
    """Raise the backbone's ValueError if it has no classes."""
    if not getattr(backbone, "has_classes", True):
        backbone.require_classes()  # type: ignore[attr-defined]
