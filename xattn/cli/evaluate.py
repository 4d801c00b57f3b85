"""``xattn evaluate``: measure how faithful explanations are."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from xattn.cli.heads import choose_heads, row_name
from xattn.cli.model import BackboneArgs


@dataclass(frozen=True)
class Evaluate:
    """Measure how faithful explanations are (AD, IC, ADD, AG), next to Grad-CAM and sanity rows."""

    images: Annotated[str, tyro.conf.Positional]
    """An image, a folder, a .txt list, hfds/NAME_OR_PATH:SPLIT or wds/PATH:SPLIT."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    heads: tuple[str, ...] = ()
    """Heads to measure: folders, shipped names, hub repositories; by default a shipped one that fits."""
    explainers: tuple[str, ...] = ("gradcam",)
    """Methods of xattn list to measure as well."""
    metrics: tuple[str, ...] = ("masking",)
    """Groups of metrics of xattn list that need no annotations."""
    preset: str | None = None
    """A published metric definition, see xattn list; it replaces metrics and levels."""
    levels: tuple[float, ...] = (1.0, 0.5, 0.15)
    """Shares of the pixels that are kept."""
    sanity: bool = True
    """Add the rows random, centre, all-ones and randomised weights; of a ViT also those of attention
    without content, and how like its maps are to theirs."""
    view: Literal["crop", "whole"] = "crop"
    """What the model sees."""
    max_forward_batch: int = 32
    """Masked images per pass."""
    max_pixels: int = 40_000_000
    """Larger photos are skipped."""
    seed: int = 0
    """Seed of the random rows and the bootstrap."""
    output: Path = Path("runs/evaluation")
    """Folder for results.json and results.csv."""

    def run(self) -> None:
        from xattn.eval import Protocol, evaluate, format_table, sanity_rows, write_csv, write_json
        from xattn.eval.metric_presets import preset
        from xattn.eval.sanity import first_photos, likeness, without_content
        from xattn.explainers import create_explainer
        from xattn.runtime.distributed import processes
        from xattn.runtime.files import check_folder

        check_folder(self.output)
        backbone = self.model.load()
        shared: dict[str, Any] = {"seed": self.seed, "max_forward_batch": self.max_forward_batch}
        sources, heads = choose_heads(self.heads, backbone)
        first = heads[0] if heads else None
        sanity: dict[str, Any] = {}
        row = "head" if heads else self.explainers[0] if self.explainers else "gradcam"
        photos = None
        if self.sanity:
            photos = first_photos(self.images, backbone, self.view)
            sanity = sanity_rows(backbone, row, head=first, photos=photos, **shared)
        methods: dict[str, Any] = {}
        for name in self.explainers:
            if name not in sanity:
                methods[name] = create_explainer(name, backbone, first, **shared)
        labelled: dict[str, Any] = {}
        for source, head in zip(sources, heads, strict=True):
            label = row_name(source, head.name, {*methods, *labelled, *sanity})
            labelled[label] = create_explainer("head", backbone, head, **shared)
        methods = {**labelled, **methods, **sanity}
        protocol, metrics = Protocol(levels=self.levels), list(self.metrics)
        if self.preset is not None:
            protocol, metrics = preset(self.preset, backbone.preprocessing.mean)
        results = evaluate(
            backbone,
            methods,
            self.images,
            metrics=metrics,
            protocol=protocol,
            max_forward_batch=self.max_forward_batch,
            view=self.view,
            seed=self.seed,
            max_pixels=self.max_pixels,
        )
        if processes(backbone.device)[1] > 0:
            return
        write_json(results, self.output / "results.json")
        write_csv(results, self.output / "results.csv")
        print(format_table(results))
        content = without_content(sanity)
        if content and photos is not None and len(photos) > 1:
            method = create_explainer(row, backbone, first, **shared)
            for line in likeness(backbone, method, content, photos):
                print(line)
        for item in results.skipped:
            print(f"skipped {item.id}: {item.reason}", file=sys.stderr)
        print(f"results: {self.output / 'results.json'}, {self.output / 'results.csv'}")
