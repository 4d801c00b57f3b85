"""``xattn explain``: explain photos or a clip."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from xattn.cli.heads import choose_head, load_with_classifier
from xattn.cli.model import BackboneArgs


@dataclass(frozen=True)
class Explain:
    """Explain an image, a folder or a clip: overlays, and a pack with maps of the top or named classes."""

    images: Annotated[str, tyro.conf.Positional]
    """An image, a folder, a .txt list, hfds/..., wds/..., a clip (.mp4, .mov, .avi, .mkv, ...), or a
    volume (.nii, .nii.gz), whose axial slices are explained."""
    model: tyro.conf.OmitArgPrefixes[BackboneArgs] = field(default_factory=BackboneArgs)
    head: str | None = None
    """Folder of a trained head, name of a shipped head, or a hub repository; by default the shipped
    head."""
    explainer: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME"), tyro.conf.UseAppendAction
    ] = ()
    """Explain with this method of xattn list instead of a head; repeat the option for several methods
    ("head" is one, too)."""
    options: tuple[str, ...] = ()
    """Options of explainers as explainer.name=value, for example head.passes=4 or rise.masks=1000."""
    labels: str | None = None
    """True classes, for the viewer: a file as for xattn probe, or "folders" for the photos' folders."""
    classes: tuple[str, ...] = ()
    """Names or indices of the classes to explain; the most probable ones by default."""
    top: int = 1
    """How many of the most probable classes to explain."""
    view: Literal["crop", "whole"] | None = None
    """What the model sees: its own centre crop (the default for photos) or the whole picture, squeezed
    (clips)."""
    every: int = 1
    """Explain every n-th frame of a clip."""
    smoothing: float = 0.0
    """Weight of the past in the moving average of a clip's maps, from 0 (off) to below 1."""
    output: Path = Path("runs/explained")
    """Folder for the pack, and for a clip's overlay.mp4."""
    batch_size: int = 8
    """Images per pass."""
    seed: int = 0
    """Seed of explainers that draw random numbers."""
    max_pixels: int = 40_000_000
    """Larger photos are refused."""

    def run(self) -> None:
        from xattn.explaining.clips import explain_video
        from xattn.explaining.photos import explain
        from xattn.photos.clip import is_video

        if self._is_volume_network():
            self._explain_volume()
            return
        clip = is_video(self.images)
        if clip and (len(self.explainer) > 1 or self.labels is not None):
            raise ValueError(
                f"explainer, labels: {self.images} is a clip; give one --explainer and no --labels"
            )
        if not clip and (self.every != 1 or self.smoothing != 0):
            raise ValueError(
                f"every, smoothing: {self.images} is no clip; leave out --every and --smoothing"
            )
        backbone, own = load_with_classifier(self.model, self.head)
        head = None
        if not self.explainer or "head" in self.explainer or own is not None:
            head = choose_head(own, backbone)
        options: dict[str, Any] = {
            "classes": list(self.classes) or None,
            "top": self.top,
            "view": self.view or ("whole" if clip else "crop"),
            "output": self.output,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "max_pixels": self.max_pixels,
            "progress": True,
        }
        methods = self._methods(backbone, head)
        found: Any
        if clip:
            options.update(every=self.every, smoothing=self.smoothing)
            found = explain_video(self.images, backbone, head, methods[0], **options)
        else:
            options["labels"] = self.labels
            found = explain(self.images, backbone, head, methods, **options)
        for name, reason in () if clip else found.skipped:
            print(f"skipped {name}: {reason}", file=sys.stderr)
        self._tell(found)

    def _is_volume_network(self) -> bool:
        """Whether the backbone is the folder of a 3-D mask network."""
        from xattn.models.masks import is_network_folder, network_record

        folder = self.model.backbone
        return is_network_folder(folder) and network_record(folder)["settings"].get("dims") == 3

    def _explain_volume(self) -> None:
        from xattn.explainers.options import options_by_name
        from xattn.models.volumes import explain_volume
        from xattn.photos.volumes import is_volume

        if not is_volume(self.images) or self.explainer != ("gates",):
            raise ValueError(
                f"images, explainer: {self.model.backbone} is a 3-D network; give a .nii or .nii.gz file "
                f"and --explainer gates"
            )
        options = options_by_name(self.options, self.explainer).get("gates", {})
        if set(options) - {"level"}:
            raise ValueError(
                f"options: got {', '.join(options)}; a 3-D network takes gates.level alone"
            )
        found = explain_volume(self.model.backbone, self.images, self.output, options.get("level"))
        self._tell(found)

    def _tell(self, found: Any) -> None:
        """The first explanations, and where the pack is."""
        for item in found[:20]:
            print(f"{item.image_id}: {item.target_name} ({item.probability:.3f})")
        if len(found) > 20:
            print(f"... and {len(found) - 20} more")
        print(f"pack: {self.output}")

    def _methods(self, backbone: Any, head: Any) -> list[Any]:
        """The explainers, with their options."""
        from xattn.explainers import create_explainer
        from xattn.explainers.options import options_by_name

        names = self.explainer or ("head",)
        options = options_by_name(self.options, names)
        shared = {"seed": self.seed, "max_forward_batch": self.batch_size}
        return [create_explainer(n, backbone, head, **shared, **options.get(n, {})) for n in names]
