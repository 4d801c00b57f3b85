"""``xattn parts``: cut the evidence out of photos."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from xattn.cli.checks import check_evidence
from xattn.cli.shared import PhotoArgs
from xattn.runtime.files import check_output
from xattn.runtime.option_checks import AppliesIf


@dataclass(frozen=True, kw_only=True)
class Parts(PhotoArgs):
    """Crop photos so that the evidence (text, objects) is cut away, which gives hard negatives, and list
    the cuts in a JSON file."""

    after_interrupt: ClassVar[str] = "; run the same command to continue"
    option_rules: ClassVar = (AppliesIf("numbers", source="a folder of masks"),)

    evidence: str
    """Where the evidence is: a JSON file of boxes {"7.jpg": [[x0, y0, x1, y1], ...]}, a folder of masks
    (7.png), "mser" (finds lines of text and needs no weights), or onnx:PATH of a DB text detector."""
    numbers: tuple[int, ...] = ()
    """Which numbers in the masks count as evidence; by default all but 0."""
    seed: int = 0
    """Seed for choosing among crops of the same size."""
    max_pixels: int = 40_000_000
    """Skip photos with more pixels than this."""
    output: Path = Path("runs/parts")
    """Folder for the crops and parts.json; to continue a stopped run, give the same command again."""

    @property
    def source(self) -> str:
        """Return the kind of source that the evidence comes from."""
        plain = self.evidence == "mser" or self.evidence.startswith("onnx:")
        return self.evidence if plain or self.evidence.endswith(".json") else "a folder of masks"

    def check(self) -> None:
        super().check()
        check_output(self.output)
        check_evidence(self.evidence)

    def run(self) -> None:
        from xattn.parts import cut_parts
        from xattn.parts.cutting import OUTCOMES

        parts = cut_parts(
            self.photos,
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
