"""``xattn export``: write backbone and head as one graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from xattn.cli.heads import choose_head, load_with_classifier
from xattn.cli.model import BackboneArgs


@dataclass(frozen=True)
class Export:
    """Write backbone and head as one graph, for torch.export (.pt2) or ONNX (.onnx)."""

    path: Annotated[Path, tyro.conf.Positional]
    """The file to write; its suffix decides the format."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    head: str | None = None
    """Folder of a trained head, name of a shipped head, or a hub repository; by default the shipped
    head."""
    normalize: bool = True
    """Scale each map to [0, 1], as explain shows it; otherwise maps are the head's own scores or mask."""

    def run(self) -> None:
        from xattn.exporting import export

        backbone, own = load_with_classifier(self.model, self.head)
        path = export(backbone, choose_head(own, backbone), self.path, self.normalize)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
