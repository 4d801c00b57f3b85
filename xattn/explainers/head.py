"""A trained head as an explainer: any number of classes from one backbone pass."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.explainers.base import Choose, Explainer, register_explainer
from xattn.heads import AttentiveHead
from xattn.heads.mixer import SHARES


@register_explainer("head")
@dataclass(kw_only=True, eq=False, repr=False)
class HeadExplainer(Explainer):
    """A trained explanation head: any classes from one forward pass.

    Args:
        maps: what to show instead of the head's own ``explain_with``: ``"scores"``, ``"mask"`` or,
            for a head that pools by attention, ``"attention"``.
    """

    maps: str | None = None
    needs_head = True

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = ["scores", "mask"]
        if isinstance(self.head, AttentiveHead) and self.head.learns_scores:
            choices.append("attention")
        if self.maps not in (None, *choices):
            raise ValueError(f"maps: got {self.maps!r}; this head shows {', '.join(choices)}")
        if self.maps is not None:
            self.head = copy.copy(self.head)
            self.head.explain_with = self.maps  # type: ignore[union-attr]
        if self.head is not None and self.head.mixer is not None:
            self._note(SHARES.format(name=self.head.mixer.name))

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
