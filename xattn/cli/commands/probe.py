"""``xattn probe``: train attentive heads as classifiers of your own classes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from xattn.cli.checks import check_labels
from xattn.cli.model import BackboneArgs
from xattn.cli.printing import note, print_nothing
from xattn.cli.shared import PhotoArgs, registered_names
from xattn.config import ProbeConfig
from xattn.runtime.files import check_output
from xattn.runtime.option_checks import AppliesIf


@dataclass(frozen=True, kw_only=True)
class Probe(PhotoArgs):
    """Train attentive heads to classify your own classes from cached features, and compare them."""

    after_interrupt: ClassVar[str] = "; continue with --resume"
    option_rules: ClassVar = (AppliesIf("seed", seeds=()),)

    model: BackboneArgs = field(default_factory=BackboneArgs)
    train: ProbeConfig
    heads: tuple[str, ...] = ("gap", "efficient_probe", "abmilp")
    """Names of attentive heads, see xattn list."""
    options: tuple[str, ...] = ()
    """Options of heads as head.name=value, for example efficient_probe.queries=16."""
    labels: Path | None = None
    """A .json file with {folder: {"group": name or null}} or {photo: label}, or a .csv file with the
    columns photo,label; by default the name of a photo's folder is its class."""
    folds: tuple[int, ...] = (0,)
    """Which fifths of the photos to test on, one after the other; for each, the next fifth decides when
    training stops."""
    seeds: tuple[int, ...] = ()
    """Train each head once per seed; by default only once, with --seed."""
    views: int = 1
    """Number of cached crops per photo: first the evaluation crop, then random crops and flips."""
    half: bool = False
    """Cache features in float16."""
    cache_batch: int = 16
    """Number of photos per pass while features are cached."""
    workers: int = 0
    """Number of data-loader processes while features are cached."""
    features: Path | None = None
    """Folder for the cached features; by default the folder features in the output folder."""
    output: Path = Path("runs/probe")
    """Folder for the heads, results.json and results.csv."""
    resume: bool = False
    """Skip the heads that are finished and continue with the others."""
    sample: int = 0
    """Explain the true class of this many photos at each checkpoint of a head; the maps are saved as the
    pack sample next to the head."""

    def check(self) -> None:
        super().check()
        self.model.check()
        check_labels(self.labels)
        check_output(self.output)
        if self.model.probe is not None:
            raise ValueError("probe: heads are trained on the network itself; leave out --probe")

    def run(self) -> None:
        from xattn.eval.probing import (
            ProbeJob,
            check_results,
            format_rows,
            run_probes,
            write_results,
        )
        from xattn.heads.base import HEADS
        from xattn.runtime.distributed import processes
        from xattn.runtime.files import check_folder
        from xattn.training.attention_training import METHODS

        METHODS.name(self.train.attention)
        heads = registered_names("heads", self.heads, HEADS)
        check_folder(self.output)
        check_results(self.output, heads, self.resume)
        backbone = self.model.load()
        main = processes(backbone.device)[1] == 0
        job = ProbeJob(
            backbone=backbone,
            data=self.photos,
            labels=self.labels,
            heads=heads,
            options=self.options,
            taps=self.model.taps or None,
            config=self.train,
            folds=self.folds,
            seeds=self.seeds or (self.train.seed,),
            views=self.views,
            dtype="float16" if self.half else "float32",
            batch_size=self.cache_batch,
            workers=self.workers,
            features=self.features or self.output / "features",
            sample=self.sample,
        )

        rows, labels, skipped = run_probes(
            job, self.output, self.resume, say=note if main else print_nothing
        )
        if not main:
            return
        files = write_results(rows, labels, job, self.output)
        for name, reason in skipped:
            print(f"skipped {name}: {reason}", file=sys.stderr)
        print(format_rows(rows))
        print("results:", ", ".join(map(str, files)))
