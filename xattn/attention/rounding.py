"""Numbers in few bits, emulated: rounded, not packed."""

from __future__ import annotations

import torch
from torch import Tensor


def rounded(x: Tensor, high: int, low: int) -> tuple[Tensor, Tensor]:
    """x (B, H, N, D) in its high bits alone, and in all ``high + low`` bits.

    One step for all numbers of a head; gradients pass as if x were not rounded.
    """
    top = x.detach().abs().amax((2, 3), keepdim=True)
    step = (top / (2 ** (high + low - 1) - 1)).clamp_min(torch.finfo(x.dtype).tiny)
    whole = (x.detach() / step).round()
    coarse = (whole / 2**low).floor() * 2**low
    return x + (coarse * step - x).detach(), x + (whole * step - x).detach()
