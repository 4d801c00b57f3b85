"""``xattn evaluate``: measure how faithful explanations are."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from xattn.cli.checks import check_annotations, check_name
from xattn.cli.heads import choose_heads, explainers_of, row_name
from xattn.cli.model import BackboneArgs
from xattn.cli.outputs import Output, output_folder
from xattn.cli.shared import MethodArgs, registered_names
from xattn.runtime.files import check_output
from xattn.runtime.option_checks import AppliesIf, Count


@dataclass(frozen=True, kw_only=True)
class Evaluate(MethodArgs):
    """Measure how faithful explanations are (AD, IC, ADD, AG), and compare them with Grad-CAM and sanity
    rows."""

    option_rules: ClassVar = (AppliesIf("metrics", "levels", preset=None),)

    folders_of_clips: ClassVar = True

    model: BackboneArgs = field(default_factory=BackboneArgs)
    explainers: tuple[str, ...] = ("gradcam",)
    """Further methods from xattn list to measure."""
    metrics: tuple[str, ...] = ("masking",)
    """Groups of metrics from xattn list that need no annotations."""
    preset: str | None = None
    """A published metric definition, see xattn list; it replaces --metrics and --levels."""
    levels: tuple[float, ...] = (1.0, 0.5, 0.15)
    """Shares of the pixels that are kept."""
    sanity: bool = True
    """Add rows for random maps, a centred blob, all ones and randomised weights; for a ViT also add rows
    for attention without content, and report how similar the method's maps are to these."""
    view: Literal["crop", "whole"] = "crop"
    """What the model sees of a photo."""
    annotations: Path | None = None
    """A folder with images/ and masks/ or boxes/, which adds the metric group localization."""
    batch_size: Count = 32
    """Number of masked images per pass."""
    output: Path | None = None
    """Folder or URL for results.json and results.csv; by default runs/evaluation, or runs/evaluation-2 and
    so on if there are results already."""
    overwrite: bool = False
    """Replace the results in the output folder."""

    def check(self) -> None:
        super().check()
        self.model.check()
        check_annotations(self.annotations)
        if self.output is not None:
            check_output(self.output)

    def run(self) -> None:
        from xattn.eval.metrics.registry import REGISTRY
        from xattn.explainers.base import EXPLAINERS

        named = replace(
            self,
            explainers=registered_names("explainers", self.explainers, EXPLAINERS),
            metrics=registered_names("metrics", self.metrics, REGISTRY),
        )
        with named._checked_output() as output:
            main = named._measure(output.folder)
        if main:
            place = output.place
            print(f"results: {place / 'results.json'}, {place / 'results.csv'}")

    def _measure(self, output: Path) -> bool:
        """Write the results to a folder; returns whether this process is the one that writes."""
        from xattn.eval import Protocol, evaluate, format_table, sanity_rows, write_csv, write_json
        from xattn.eval.annotations.objects import load_annotations
        from xattn.eval.metric_presets import preset
        from xattn.eval.metrics.registry import groups_with_annotations
        from xattn.eval.sanity import first_photos, likeness, without_content
        from xattn.explainers import create_explainer
        from xattn.runtime.distributed import processes
        from xattn.runtime.files import check_folder

        check_folder(output)
        backbone = self.model.load()
        photos = self.chosen_for(backbone)
        shared: dict[str, Any] = {"seed": self.seed, "max_forward_batch": self.batch_size}
        sources, heads = choose_heads(self.heads, backbone)
        first = heads[0] if heads else None
        sanity: dict[str, Any] = {}
        row = "head" if heads else self.explainers[0] if self.explainers else "gradcam"
        shown = None
        if self.sanity:
            shown = first_photos(photos, backbone, self.view)
            sanity = sanity_rows(backbone, row, head=first, photos=shown, **shared)
        named: dict[str, Any] = {}
        for source, head in zip(sources, heads, strict=True):
            named[row_name(source, head.name, {*self.explainers, *named, *sanity})] = head
        rows = [*named, *(name for name in self.explainers if name not in sanity)]
        methods = explainers_of(rows, named, self.options, backbone, **shared)
        protocol, metrics = Protocol(levels=self.levels), list(self.metrics)
        if self.preset is not None:
            protocol, metrics = preset(self.preset, backbone.preprocessing.mean)
        annotations = None
        if self.annotations is not None:
            annotations = load_annotations(self.annotations, backbone)
            metrics += [name for name in groups_with_annotations() if name not in metrics]
        results = evaluate(
            backbone,
            {**methods, **sanity},
            photos,
            metrics=metrics,
            protocol=protocol,
            max_forward_batch=self.batch_size,
            view=self.view,
            seed=self.seed,
            max_pixels=self.max_pixels,
            annotations=annotations,
        )
        if processes(backbone.device)[1] > 0:
            return False
        write_json(results, output / "results.json")
        write_csv(results, output / "results.csv")
        print(format_table(results))
        if heads and sanity:
            print(
                f"randomized_head: the head of the row {next(iter(named))}, on a network "
                "with random weights"
            )
        content = without_content(sanity)
        if content and shown is not None and len(shown) > 1:
            method = create_explainer(row, backbone, first, **shared)
            for line in likeness(backbone, method, content, shown):
                print(line)
        for item in results.skipped:
            print(f"skipped {item.id}: {item.reason}", file=sys.stderr)
        return True

    def _checked_output(self) -> AbstractContextManager[Output]:
        """The output folder; an unknown preset is refused before the network loads."""
        from xattn.eval.metric_presets import PRESETS

        if self.preset is not None:
            check_name("preset", self.preset, PRESETS)
        return output_folder(self.output, "runs/evaluation", self.overwrite, "results.json")
