"""Loads the network of a study from its options."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xattn.backbone import Backbone, load_backbone


def study_backbone(
    name: str, weights: str, taps: Sequence[str] = (), channels_last: bool = False
) -> Backbone:
    """A timm model; ``channels_last`` is the memory format that is faster for CPU convolutions."""
    backbone = load_backbone(name, weights, taps or None)
    if channels_last:
        backbone.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return backbone
