"""``xattn distill``: train another attention mechanism to imitate the network's softmax attention."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from xattn.cli.checks import check_images
from xattn.cli.model import BackboneArgs
from xattn.cli.shared import PhotoArgs
from xattn.config import DistillConfig
from xattn.runtime.files import check_run_folder


@dataclass(frozen=True, kw_only=True)
class Distill(PhotoArgs):
    """Train an attention mechanism in a ViT's layers to imitate its softmax attention; no labels are
    read."""

    after_interrupt: ClassVar[str] = "; continue with --resume"

    model: BackboneArgs = field(default_factory=BackboneArgs)
    train: DistillConfig
    validation: str | None = None
    """Photos to measure on; by default one in ten photos of the data, which are then not used for
    training."""
    output: Path = Path("runs/distilled")
    """Folder for the log, the checkpoints, report.json and the trained conversion."""
    start: Path | None = None
    """An earlier trained conversion of the same mechanism and layers, from which to continue."""
    compare_heads: int = 0
    """Number of photos on which attention rows are compared head by head, also with elu + 1 and with a
    Taylor series."""
    resume: bool = False
    """Continue from the last checkpoint in the output folder."""

    def check(self) -> None:
        super().check()
        if self.model.mechanism is None:
            raise ValueError(
                "mechanism: got none; give the one to train, such as --mechanism agent"
            )
        if self.model.probe is not None:
            raise ValueError("probe: attention is trained in the network itself; leave out --probe")
        self.model.check()
        if self.validation is not None:
            check_images((self.validation,), "validation")
        check_run_folder(self.output, self.resume)

    def run(self) -> None:
        from xattn.attention.model.spec import parse_mechanism
        from xattn.training.distilling import CONVERSION_FOLDER, distill, split
        from xattn.training.students.closeness import (
            comparison_lines,
            head_closeness,
            head_csv,
            head_table,
        )

        assert self.model.mechanism is not None  # see check
        name, options = parse_mechanism(self.model.mechanism)
        backbone: Any = replace(self.model, mechanism=None, layers=None).load()
        result = distill(
            backbone,
            name,
            self.model.layers,
            options,
            data=self.photos,
            validation=self.validation,
            config=self.train,
            start=self.start,
            output=self.output,
            resume=self.resume,
        )
        if not result.main:
            return
        for path, reason in result.skipped:
            print(f"skipped {path}: {reason}", file=sys.stderr)
        print("\n".join(comparison_lines(result.before, result.after)))
        if self.compare_heads:
            _, kept = split(self.photos, self.validation)
            found = head_closeness(backbone, result.backbone, kept, self.compare_heads)
            print("\n".join(["", *head_table(found), ""]))
            (self.output / "heads.csv").write_text(head_csv(found), encoding="utf-8")
        print(f"{result.steps} steps, {len(result.skipped)} images skipped")
        print(f"conversion: {self.output / CONVERSION_FOLDER}")
