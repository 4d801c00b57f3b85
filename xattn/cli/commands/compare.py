"""``xattn compare``: compare methods by many metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from xattn.cli.checks import check_annotations, check_labels
from xattn.cli.heads import choose_heads, row_name
from xattn.cli.model import BackboneArgs
from xattn.cli.printing import note, print_nothing
from xattn.cli.shared import MethodArgs, registered_names
from xattn.runtime.files import check_output
from xattn.runtime.option_checks import AnyExcept, AppliesIf, Count, Whole


@dataclass(frozen=True, kw_only=True)
class Compare(MethodArgs):
    """Compare heads and explainers by many metrics, and write one leaderboard as Markdown, CSV, JSON and
    HTML."""

    after_interrupt: ClassVar[str] = "; run the same command to continue"
    option_rules: ClassVar = (AppliesIf("labels", maps=AnyExcept(0)),)

    folders_of_clips: ClassVar = True

    model: BackboneArgs = field(default_factory=BackboneArgs)
    explainers: tuple[str, ...] = ("gradcam", "layercam", "integrated_gradients", "rise")
    """Methods from xattn list, or "all" for every method that suits this backbone and takes at most
    1,000 passes with gradients per photo, or 4,000 without."""
    metrics: tuple[str, ...] = ("direct",)
    """Groups of metrics from xattn list; or "direct" (all that need no second explanation), "all", or
    "board" (metrics on which maps that explain nothing cannot come first, with a report card)."""
    card_photos: Whole | None = None
    """Number of photos used to test whether each column ranks deliberately degraded maps correctly; by
    default 60 with --metrics board, and otherwise 0, which skips the test."""
    annotations: Path | None = None
    """A folder with images/ and masks/ or boxes/, which adds the metric group localization."""
    again_limit: int = 2
    """Number of images on which metrics that explain again are measured, for methods that need many
    passes; 0 uses all images."""
    view: Literal["crop", "whole"] = "crop"
    """What the model sees of a photo."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the scoring passes."""
    batch_size: Count = 32
    """Number of perturbed images per pass."""
    maps: int = 1000
    """Store the maps of this many photos for the viewer, which takes up to 0.2 MB per photo and method; 0
    stores none."""
    labels: str | None = None
    """True classes, which the viewer shows: a file as for xattn probe, or "folders" if the photos' folders
    are their classes."""
    output: Path = Path("runs/comparison")
    """Folder for the report and the state of the run; to continue a stopped run, give the same command
    again."""

    def check(self) -> None:
        super().check()
        self.model.check()
        check_annotations(self.annotations)
        check_labels(self.labels)
        check_output(self.output)

    def run(self) -> None:
        from xattn.eval.leaderboard import Comparison, compare
        from xattn.eval.metrics.registry import REGISTRY
        from xattn.explainers import list_explainers
        from xattn.explainers.base import EXPLAINERS
        from xattn.runtime.distributed import processes
        from xattn.runtime.files import check_folder

        if "head" in self.explainers:
            raise ValueError(
                "explainers: 'head' needs a head; name heads with --heads (the head of --probe "
                "is compared anyway) and leave 'head' out"
            )
        explainers = registered_names("explainers", self.explainers, EXPLAINERS, "all")
        metrics = registered_names("metrics", self.metrics, REGISTRY, "all", "direct", "board")
        check_folder(self.output)
        backbone = self.model.load()
        if not backbone.is_vit and not backbone.reads_clips:
            import torch

            backbone.model.to(memory_format=torch.channels_last)  # passes take a third less on CPUs
        heads: dict[str, Any] = {}
        for source, head in zip(*choose_heads(self.heads, backbone), strict=True):
            taken = {*heads, *list_explainers()}  # baselines are explainers, too
            heads[row_name(source, head.name, taken)] = head
        job = Comparison(
            backbone=backbone,
            heads=heads,
            explainers=explainers,
            options=self.options,
            metrics=metrics,
            annotations=self.annotations,
            again_limit=self.again_limit or None,
            view=self.view,
            precision=self.precision,
            max_forward_batch=self.batch_size,
            max_pixels=self.max_pixels,
            seed=self.seed,
            maps=self.maps,
            labels=self.labels,
            card_photos=self.card_photos,
        )
        main = processes(backbone.device)[1] == 0

        _, files = compare(
            job, self.photos, self.output, limit=self.limit, say=note if main else print_nothing
        )
        if main:
            print((self.output / "leaderboard.md").read_text(encoding="utf-8"))
            print("report:", ", ".join(str(path) for path in files))
