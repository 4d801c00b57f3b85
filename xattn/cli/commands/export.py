"""``xattn export``: write backbone and head as one graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from xattn.cli.checks import check_heads
from xattn.cli.heads import choose_head, load_with_classifier
from xattn.cli.model import BackboneArgs
from xattn.runtime.arguments import Argument


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the backbone and a head as one graph, for torch.export (.pt2) or ONNX (.onnx)."""

    path: Annotated[Path, Argument(positional=True)]
    """The file to write; its suffix determines the format."""
    model: BackboneArgs = field(default_factory=BackboneArgs)
    heads: tuple[str, ...] = ()
    """The trained head: its folder, the folder of the run that trained it, the name of a shipped head, or
    a hub repository; by default a shipped head that fits."""
    normalize: bool = True
    """Scale each map to [0, 1], as explain shows it; otherwise the maps are the head's raw scores or
    mask."""

    def check(self) -> None:
        self.model.check()
        check_heads(self.heads, "heads")
        if len(self.heads) > 1:
            raise ValueError(
                f"heads: got {len(self.heads)}; a graph contains only one head, so give one"
            )
        if self.path.suffix not in (".pt2", ".onnx"):
            raise ValueError(f"path: got {self.path}; give a name that ends in .pt2 or .onnx")

    def run(self) -> None:
        from xattn.explaining.exporting import export

        backbone, own = load_with_classifier(self.model, self.heads)
        head = choose_head(own[0] if own else None, backbone)
        path = export(backbone, head, self.path, self.normalize)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
