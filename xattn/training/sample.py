"""Explain a few fixed photos while a head trains, and write a pack with the maps of step 0 and of the last
checkpoint."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from xattn.backbone import Backbone
from xattn.explaining.passes import PreparedPhoto, explain_batch, set_up
from xattn.explaining.photos import Explanations, explain
from xattn.heads import Head
from xattn.heads.probed import probed
from xattn.packs.explanation import Explanation
from xattn.packs.reader import load_pack
from xattn.packs.writer import save_pack
from xattn.photos.base import Data
from xattn.photos.images import MAX_PIXELS, load_image
from xattn.photos.sources import Files, open_photos
from xattn.photos.view import prepare

SAMPLE_FOLDER = "sample"


def step_method_name(step: int) -> str:
    """Return the method name that the pack uses for the maps of ``step``."""
    return f"step {step}"


class Sample:
    """A function for ``on_checkpoint`` that explains one class of each of ``count`` photos; the photos are
    the same at every checkpoint.

    ``folder`` becomes a pack with the maps of step 0 and of the checkpoint; the method's name and
    ``protocol["step"]`` give the step. The head's mode and the random number generators are left as they
    were.

    Args:
        data: photos in files; ``count`` of them, evenly spaced, are explained.
        classes: only for a head that replaces the classifier (an attentive one): the class to explain for
            each photo, by path, as an index into the head's classes. Without ``classes``, the most
            probable class of the frozen network is explained; training does not change it.

    Raises:
        ValueError: the photos are not files, no photo can be read, or the network reads clips.
    """

    def __init__(
        self,
        backbone: Backbone,
        data: Data,
        folder: str | Path,
        count: int = 4,
        max_pixels: int | None = MAX_PIXELS,
        classes: Mapping[Path, int] | None = None,
    ) -> None:
        if backbone.reads_clips:
            raise ValueError(
                f"sample: {backbone.name} reads clips, but only photos can be shown; give 0"
            )
        photos = open_photos(data)
        if not isinstance(photos, Files):
            raise ValueError(
                f"sample: got {data}, but the photos have to be files; leave out --sample"
            )
        if count < 1:
            raise ValueError(f"sample: got {count} photos; give at least 1")
        self.backbone, self.folder = backbone, Path(folder)
        self.photos = photos.part(_readable(photos.paths, count, max_pixels))
        self.max_pixels, self.classes = max_pixels, classes
        self._first: list[Explanation] = []

    def __call__(self, step: int, head: Head) -> None:
        backbone, training = self.backbone, head.training
        if self.classes is not None:
            head = copy.deepcopy(head)  # probed() freezes it
            backbone = probed(backbone, head)  # type: ignore[arg-type]
        head.eval()
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                # A photo may have been deleted, and a map may be constant before training.
                warnings.filterwarnings("ignore", "explain: skipped ")
                warnings.filterwarnings("ignore", "(?s)explain: .* the same value everywhere")
                found = self._explained(backbone, head)
        finally:
            head.train(training)
        now = [_at(explanation, step) for explanation in found]
        if step == 0:
            self._first = now
        first = [] if step == 0 else self._first or self._saved()
        save_pack(self.folder, [*first, *now], overlays=False, skipped=found.skipped)

    def _explained(self, backbone: Backbone, head: Head) -> Explanations:
        if self.classes is None:
            return explain(self.photos, backbone, head, batch_size=4, max_pixels=self.max_pixels)
        found = Explanations()
        for image_id, path in zip(self.photos.ids, self.photos.paths, strict=True):
            try:
                photo = load_image(path, self.max_pixels)
                pixels, seen = prepare(photo, backbone.preprocessing, "crop")
                seen.check_size()
            except (OSError, ValueError) as error:
                found.skipped.append((path.name, str(error)))
                continue
            job = set_up(backbone, head, None, self.classes[path], 1, "crop", 8, 0)
            item = PreparedPhoto(pixels, seen, image_id, path)
            found.extend(explain_batch([item], backbone, *job))
        return found

    def _saved(self) -> list[Explanation]:
        """The maps of step 0 left by an interrupted run."""
        try:
            self._first = [e for e in load_pack(self.folder) if e.method == step_method_name(0)]
        except (OSError, ValueError):
            self._first = []
        return self._first


def _at(explanation: Explanation, step: int) -> Explanation:
    protocol: dict[str, Any] = {**explanation.protocol, "step": step}
    return replace(explanation, method=step_method_name(step), method_title="", protocol=protocol)


def _readable(paths: list[Path], count: int, max_pixels: int | None) -> list[int]:
    """The numbers of ``count`` evenly spaced photos; if one cannot be read, the next one replaces it."""
    chosen: list[int] = []
    reason: Exception | None = None
    for place in range(min(count, len(paths))):
        start = place * len(paths) // min(count, len(paths))
        for number in range(start, min(start + 50, len(paths))):
            if number in chosen:
                continue
            try:
                load_image(paths[number], max_pixels)
            except (OSError, ValueError) as error:
                reason = error
                continue
            chosen.append(number)
            break
    if not chosen:
        raise ValueError(f"sample: none of the photos can be read ({reason}); check data")
    return chosen
