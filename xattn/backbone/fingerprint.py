"""SHA-256 of weights, and of what else a network computes with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from xattn.attention.convert import conversion


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


def network_sha256(model: nn.Module) -> str:
    """:func:`sha256`; of a converted model together with its conversion."""
    weights, made = sha256(model), conversion(model)
    if made is None:
        return weights
    text = json.dumps([weights, [one.record() for one in made]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
