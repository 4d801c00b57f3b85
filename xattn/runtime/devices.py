"""Reject unavailable devices with a one-line error."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def check_available(device: str | torch.device) -> None:
    """Raise a ``ValueError`` unless this PyTorch can create tensors on ``device``."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device: {str(device)!r} is not available here ({reason}); use cpu, or install a PyTorch "
            f"that is built for it"
        ) from None


class Movable(nn.Module):
    """A module whose ``.to(device)`` raises an error for an unavailable device, see
    :func:`check_available`."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        for given in (*args[:1], kwargs.get("device")):
            if isinstance(given, str | torch.device):
                check_available(given)
        return super().to(*args, **kwargs)
