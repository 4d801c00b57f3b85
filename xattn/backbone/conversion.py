"""Backbones with another attention: converted copies of a backbone, and those that were trained, on disk.

    backbone = converted(backbone, "gna", layers="0-7", options={"kernel": 7})
    backbone = load_conversion("runs/distilled/conversion", backbone)

A trained conversion is a folder with ``model.safetensors``, the tensors that the mechanism adds (and
those of the network that were trained with it), and ``config.json``: what was converted, and the name
and SHA-256 of the backbone that it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from xattn.attention.convert import converted_copy
from xattn.backbone.backbone import Backbone


def converted(
    backbone: Backbone,
    name: str,
    layers: Iterable[int] | str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Backbone:
    """A backbone over a copy of the model, converted as by :func:`~xattn.attention.convert`.

    The copy shares all weights, and those that the mechanism adds are the same each time. Name and
    fingerprint, and so caches, heads and runs, are those of the converted network.

    Raises:
        ValueError: as in ``convert``, or a backbone whose classifier is a head of ``xattn probe``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = converted_copy(backbone.model, name, layers, options)
    return backbone.with_converted(model)
