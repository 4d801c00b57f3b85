"""A network that sees half of its input: f'(x) = f(x o M + b o (1 - M)), where b is the mean colour."""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.backbone.backbone import Backbone
from xattn.backbone.taps import Taps
from xattn.runtime.copies import shared_copy

HALVES = ("top", "left", "bottom", "right")


def visible_half(half: str, size: tuple[int, int]) -> Tensor:
    """Return a mask (H, W), bool: what a network sees if only ``half`` of the input is shown.

    >>> visible_half("left", (1, 5))
    tensor([[ True,  True, False, False, False]])
    """
    height, width = size
    row, column = torch.arange(height, device="cpu")[:, None], torch.arange(width, device="cpu")
    first = (row < height // 2) if half in ("top", "bottom") else (column < width // 2)
    return (first if half in ("top", "left") else ~first).expand(height, width)


def half_blind(backbone: Backbone, half: str) -> Backbone:
    """Create a copy of ``backbone`` with the same weights that sees only one of :data:`HALVES`."""
    own = type(backbone)

    class HalfBlind(own):  # type: ignore[valid-type,misc]
        """The same network, with the hidden half of the normalised input set to 0, the mean colour."""

        def forward_normalized(self, x: Tensor) -> Taps:
            return super().forward_normalized(_hidden(x, half))  # type: ignore[no-any-return]

        def logits_normalized(self, x: Tensor) -> Tensor:
            return super().logits_normalized(_hidden(x, half))  # type: ignore[no-any-return]

    twin = shared_copy(backbone)
    twin.__class__ = HalfBlind
    return twin


def _hidden(x: Tensor, half: str) -> Tensor:
    return x * visible_half(half, (x.shape[-2], x.shape[-1])).to(x)
