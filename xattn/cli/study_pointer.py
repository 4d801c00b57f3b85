"""``xattn study pointer``: pointer networks on points, and orders of a photo's cells."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from xattn.cli.model import BackboneArgs
from xattn.eval.studies.pointer_configs import OrderStudyConfig, PointStudyConfig


@dataclass(frozen=True, kw_only=True)
class StudyPointer:
    """Pointer networks on hulls, tours and triangles; with --data, orders of a photo's cells."""

    data: str | None = None
    """Photos, as for explain; files. Heads learn in which order a ViT's cells matter; the networks that
    point to points are not trained then."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    study: tyro.conf.OmitArgPrefixes[PointStudyConfig] = field(default_factory=PointStudyConfig)
    order: OrderStudyConfig = field(default_factory=OrderStudyConfig)
    """Settings of the study with --data."""
    quick: bool = False
    """Few samples or photos, to see that all runs."""
    output: Path = Path("runs/study-pointer")
    """Folder of what is finished, and of report.md; one for points, another for photos."""

    def run(self) -> None:
        from xattn.eval.studies import cell_orders, pointers

        if self.data is None:
            lines = pointers.study(self.output, self.study.quick() if self.quick else self.study)
        else:
            config = self.order.quick() if self.quick else self.order
            lines = cell_orders.study(self.model.load(), self.data, self.output, config)
        for line in lines:
            print(line, flush=True)
