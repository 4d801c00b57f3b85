"""Names that a test or a page registers are forgotten at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from xattn.attention.base import MECHANISMS
from xattn.blocks.base import BLOCKS
from xattn.eval.metrics.registry import REGISTRY
from xattn.explainers.base import EXPLAINERS
from xattn.heads.base import HEADS
from xattn.training.objectives.base import OBJECTIVES
from xattn.vlm.explainers.base import TOKEN_EXPLAINERS

REGISTRIES = (MECHANISMS, BLOCKS, REGISTRY, EXPLAINERS, TOKEN_EXPLAINERS, HEADS, OBJECTIVES)


@contextmanager
def forgetting() -> Iterator[None]:
    """Inside, names may be registered."""
    before = [set(registry.names()) for registry in REGISTRIES]
    try:
        yield
    finally:
        for registry, names in zip(REGISTRIES, before, strict=True):
            for name in set(registry.registered()) - names:
                registry.remove(name)
