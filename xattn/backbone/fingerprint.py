"""SHA-256 of weights, and of everything else a network computes with."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xattn.attention.model.convert import conversion
from xattn.attention.model.spec import Conversion
from xattn.photos.preprocessing import Preprocessing, preprocessing_record


def sha256(module: nn.Module) -> str:
    """Compute the :func:`state_sha256` of all saved tensors of ``module``.

    Example:
        >>> from xattn.backbone import sha256
        >>> from torch import nn
        >>> one, same = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> _ = same.load_state_dict(one.state_dict())
        >>> sha256(one) == sha256(same)
        True
    """
    return state_sha256(module.state_dict())


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 (hex) of the names, dtypes, shapes and values of a state dict.

    Example:
        >>> import torch
        >>> from xattn.backbone import state_sha256
        >>> state_sha256({"weight": torch.zeros(2)})[:8]
        'abb399a2'
    """
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{key}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def network_sha256(model: nn.Module, used: Preprocessing | None = None) -> str:
    """Compute the :func:`sha256` of a model.

    For a converted model the hash includes its conversion. If the mean or std of ``used``
    differs from that of the model itself, the hash also includes it."""
    found, made = sha256(model), conversion(model)
    if made is not None:
        found = _with(found, [one.record() for one in made])
    changed = {} if used is None else preprocessing_record(model, used).get("preprocessing", {})
    normalization = {key: changed[key] for key in ("mean", "std") if key in changed}
    return _with(found, normalization) if normalization else found


Hashed = tuple[list[Conversion] | None, list[int]]


def hash_inputs(model: nn.Module) -> Hashed:
    """Return the state that a hash belongs to: the conversion, and the version counter of each tensor."""
    tensors = (*model.parameters(), *model.buffers())
    return conversion(model), [0 if t.is_inference() else t._version for t in tensors]


def is_unchanged(model: nn.Module, before: Hashed | None) -> bool:
    """Return whether ``model`` has not changed since :func:`hash_inputs` was called.

    The version counters of a copy or a cast start at 0."""
    made, counts = hash_inputs(model)
    earlier, lowest = before or (None, [])
    return made == earlier and all(map(operator.le, counts, lowest))


def _with(weights: str, record: Any) -> str:
    text = json.dumps([weights, record], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
