"""Studies of ``xattn study`` whose data are generated, so that they need no photos."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from xattn.eval.studies.lesion_configs import LesionConfig


@dataclass(frozen=True, kw_only=True)
class StudyLesions:
    """Attention-gated U-Nets beside a plain one on generated lesions, and where their gates point."""

    study: tyro.conf.OmitArgPrefixes[LesionConfig] = field(default_factory=LesionConfig)
    quick: bool = False
    """A few samples and steps, to see that all runs."""
    output: Path = Path("runs/study-lesions")
    """Folder of what is finished, of the trained networks, and of report.md."""

    def run(self) -> None:
        from xattn.eval.studies import lesions

        config = self.study.quick() if self.quick else self.study
        for line in lesions.study(self.output, config):
            print(line, flush=True)
