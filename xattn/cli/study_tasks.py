"""Commands of ``xattn study`` for systems on tasks of their own, with data that are generated."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from xattn.eval.studies.actions.config import ActionStudyConfig
from xattn.eval.studies.face_config import FaceStudyConfig


@dataclass(frozen=True, kw_only=True)
class StudyActions:
    """Class-semantic attention over time: detectors of actions in generated sequences."""

    study: tyro.conf.OmitArgPrefixes[ActionStudyConfig] = field(default_factory=ActionStudyConfig)
    quick: bool = False
    """A few steps on short sequences, to see that all runs."""
    output: Path = Path("runs/study-actions")
    """Folder of what is finished, and of report.md."""

    def run(self) -> None:
        from xattn.eval.studies import action_detection

        config = self.study.quick() if self.quick else self.study
        for line in action_detection.study(self.output, config):
            print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class StudyFaces:
    """ARBEx on generated faces: two streams against each alone, with reliability balancing and without."""

    study: tyro.conf.OmitArgPrefixes[FaceStudyConfig] = field(default_factory=FaceStudyConfig)
    quick: bool = False
    """A short training of each, to see that all runs."""
    output: Path = Path("runs/study-faces")
    """Folder of what is finished, and of report.md."""

    def run(self) -> None:
        from xattn.eval.studies import faces

        config = self.study.quick() if self.quick else self.study
        for line in faces.study(self.output, config):
            print(line, flush=True)
