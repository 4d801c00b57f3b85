"""A trained head as an explainer: any number of classes from one backbone pass."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xattn.explainers.base import Choose, Explainer, register_explainer

if TYPE_CHECKING:
    from xattn.backbone import Backbone
    from xattn.heads import Head


@register_explainer("head")
class HeadExplainer(Explainer):
    """A trained explanation head: any classes from one forward pass.

    Args:
        maps: ``"scores"``, ``"mask"`` or, of a head that pools by attention, ``"attention"``, instead
            of the head's own ``explain_with``.
    """

    needs_head = True

    def __init__(
        self,
        backbone: Backbone,
        head: Head | None = None,
        seed: int = 0,
        max_forward_batch: int = 32,
        maps: str | None = None,
    ) -> None:
        super().__init__(backbone, head, seed, max_forward_batch)
        choices = ["scores", "mask"]
        if getattr(self.head, "learns_scores", False):
            choices.append("attention")
        if maps not in (None, *choices):
            raise ValueError(f"maps: got {maps!r}; this head shows {', '.join(choices)}")
        self.maps = maps
        if maps is not None:
            self.head = copy.copy(self.head)
            self.head.explain_with = maps  # type: ignore[union-attr]

    @torch.no_grad()
    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        assert self.head is not None
        return self.head.explanation(self.backbone(images), target)

    @torch.no_grad()
    def _attribute_classes(self, images: Tensor, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
        assert self.head is not None
        taps = self.backbone(images)
        classes = self._chosen(choose, taps.logits)
        return taps.logits, classes, self.head.explanation(taps, classes)
