"""``xattn parts``: crop the evidence out of photos."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Crop the evidence (text, objects) out of photos: hard negatives, and a JSON of what was cut."""

    after_interrupt: ClassVar[str] = "; the same command goes on"

    data: Annotated[str, tyro.conf.Positional]
    """A folder of images, a .txt list, hfds/NAME_OR_PATH:SPLIT or wds/PATH:SPLIT."""
    evidence: str
    """A JSON of boxes {"7.jpg": [[x0, y0, x1, y1], ...]}, a folder of masks (7.png), "mser" (lines of
    text, no weights needed), or onnx:PATH of a DB text detector."""
    numbers: tuple[int, ...] = ()
    """Which numbers in the masks are evidence; by default all but 0."""
    seed: int = 0
    """Seed of the choice among crops of one size."""
    max_pixels: int = 40_000_000
    """Larger photos are skipped."""
    output: Path = Path("runs/parts")
    """Folder for the crops and parts.json; the same command continues a stopped run."""

    def run(self) -> None:
        from xattn.parts import cut_parts
        from xattn.parts.cutting import OUTCOMES

        parts = cut_parts(
            self.data,
            self.evidence,
            self.output,
            numbers=self.numbers,
            seed=self.seed,
            max_pixels=self.max_pixels,
        )
        for record in parts.records:
            if "reason" in record:
                print(f"skipped {record['photo']}: {record['reason']}", file=sys.stderr)
        for outcome, count in parts.counts.items():
            print(f"{count:6} {OUTCOMES[outcome]}")
        print(f"crops: {self.output / 'crops'}, {self.output / 'parts.json'}")
