"""``xattn prune``: remove heads of a ViT, and train the rest to reproduce the original network's
output."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from xattn.cli.checks import check_images, check_labels, check_layers
from xattn.cli.model import BackboneArgs
from xattn.cli.shared import PhotoArgs
from xattn.config import PruneConfig
from xattn.runtime.files import check_run_folder


@dataclass(frozen=True, kw_only=True)
class Prune(PhotoArgs):
    """Remove heads of a ViT, and train the rest to reproduce the original output; no labels are used in
    training."""

    after_interrupt: ClassVar[str] = "; continue with --resume"

    model: BackboneArgs = field(default_factory=BackboneArgs)
    train: PruneConfig
    validation: str | None = None
    """Photos to measure on; by default every fifth photo of the data, which is then not used for
    training."""
    labels: str | None = None
    """"folders" if the photos' folders are their classes, or a .json or .csv file with the classes;
    without it accuracy is not measured."""
    output: Path = Path("runs/pruned")
    """Folder for the log, the checkpoints, and the subfolder network, which --weights can read."""
    resume: bool = False
    """Continue from the last checkpoint in the output folder."""

    def check(self) -> None:
        super().check()
        replace(self.model, layers=None).check()  # here, layers are those whose heads are removed
        check_layers(self.model.layers)
        if self.model.mechanism is not None:
            raise ValueError(
                "mechanism: heads are removed from the network's own attention; leave "
                "--mechanism out here, and give it later together with --weights FOLDER"
            )
        if self.model.probe is not None:
            raise ValueError("probe: heads are removed from the network itself; leave out --probe")
        if self.validation is not None:
            check_images((self.validation,), "validation")
        check_labels(self.labels)
        check_run_folder(self.output, self.resume)

    def run(self) -> None:
        from xattn.eval.pruned_networks import check_can_be_saved, held_out_classes, write
        from xattn.training.pruning_run import prune

        whole: Any = replace(self.model, layers=None).load()
        check_can_be_saved(whole)
        classes = held_out_classes(whole, self.photos, self.validation, self.labels)
        result = prune(
            whole,
            self.model.layers,
            data=self.photos,
            validation=self.validation,
            config=self.train,
            output=self.output,
            resume=self.resume,
        )
        for path, reason in result.skipped:
            print(f"skipped {path}: {reason}", file=sys.stderr)
        folder, lines = write(self.output / "network", whole, result, classes, self.train)
        print("\n".join(lines))
        print(f"network: {folder}")
