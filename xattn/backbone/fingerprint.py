"""SHA-256 of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def sha256(module: nn.Module) -> str:
    """:func:`state_sha256` of all saved tensors of ``module``."""
    return state_sha256(module.state_dict())


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of names, types, shapes and values of a state dict."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{key}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
