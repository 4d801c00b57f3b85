"""``xattn accuracy``: measure how often a network is right, before and after a conversion."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Any

from xattn.cli.checks import check_labels
from xattn.cli.model import BackboneArgs
from xattn.cli.shared import PhotoArgs
from xattn.runtime.option_checks import Count


@dataclass(frozen=True, kw_only=True)
class Accuracy(PhotoArgs):
    """Measure top-1 and top-5 accuracy; with --mechanism, also that of the original network."""

    model: BackboneArgs = field(default_factory=BackboneArgs)
    labels: str = "folders"
    """"folders" if the folders' names are class names, or a .json or .csv file with the photos'
    classes."""
    limit: Count | None = None
    """Use only this many photos, spread over their folders; they are the same photos as in other commands
    with --seed 0."""
    max_pixels: int = 40_000_000
    """Skip photos with more pixels than this."""
    batch_size: Count = 32
    """Number of photos per pass."""

    def check(self) -> None:
        super().check()
        self.model.check()
        check_labels(self.labels)

    def run(self) -> None:
        from xattn.eval.accuracy import measure_accuracy
        from xattn.photos.sources import limit_photos

        networks: list[Any] = [self.model.load()]
        if self.model.mechanism is not None:
            networks.insert(0, replace(self.model, mechanism=None, layers=None).load())
        found = measure_accuracy(
            networks,
            limit_photos(self.photos, self.limit)[0],
            self.labels,
            batch_size=self.batch_size,
            max_pixels=self.max_pixels,
        )
        for skipped in found.skipped:
            print(f"skipped {skipped.id}: {skipped.reason}", file=sys.stderr)
        print("\n".join(found.lines()))
