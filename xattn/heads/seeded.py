"""Untrained heads whose weights depend on a seed alone."""

from __future__ import annotations

from typing import Any

import torch

from xattn.backbone import Backbone
from xattn.heads.base import Head, create_head


def seeded_head(name: str, backbone: Backbone, seed: int, /, **options: Any) -> Head:
    """As :func:`~xattn.heads.base.create_head`, drawn from ``seed``; the caller's generator is left as it
    was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_head(name, backbone, **options)
